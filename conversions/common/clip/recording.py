"""open_clip's text tower at tiny size, for the families that use it; see `conversions.record_reference`."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers  # noqa: F401 (before modules are declared absent: it asks which ones there are)
from torch import Tensor, nn

from conversions.common.clip.case import HIDDEN
from conversions.record_reference import Original, Passes

REPOSITORY, COMMIT = "mlfoundations/open_clip", "89fb801f1e6087880e951fc8354b8a2077b79c6d"
FILES = ("src/open_clip/model.py", "src/open_clip/transformer.py", "src/open_clip/layers.py")
ABSENT = (
    "torchvision", "torchvision.transforms", "torchvision.transforms.functional", "torchvision.ops",
    "torchvision.ops.misc", "timm", "timm.layers", "timm.models", "timm.models.layers", "timm.utils", "ftfy",
)  # fmt: skip
LAYERS, HEADS, TOKENS, VOCABULARY = 4, 2, 9, 50
# What no tensor says, in transformers' words; id 2 stands for the original's pooling: at the highest id.
CONFIG = {"num_attention_heads": HEADS, "hidden_act": "gelu", "layer_norm_eps": 1e-5, "eos_token_id": 2}


def tower() -> nn.Module:
    """The released towers' class without its images; its mask is finite (`HIDDEN`)."""
    package = ModuleType("open_clip")  # without its __init__, which imports tokenizers and training transforms
    root = next(Path(folder) for folder in sys.path if (Path(folder) / "open_clip").is_dir())
    package.__path__ = [str(root / "open_clip")]
    sys.modules["open_clip"] = package
    original = importlib.import_module("open_clip.model")
    text = original.CLIPTextCfg(
        context_length=TOKENS, vocab_size=VOCABULARY, width=32, heads=HEADS, layers=LAYERS, mlp_ratio=3.0
    )
    module: nn.Module = original.CLIP(24, original.CLIPVisionCfg(layers=1, width=64), text)
    del module.visual
    mask: Tensor = module.get_buffer("attn_mask")
    mask.masked_fill_(mask < 0, HIDDEN)
    return module


def _texts(draw: torch.Generator) -> dict[str, Tensor]:
    """Two texts that end, with the highest id, at different places."""
    ids = torch.randint(3, VOCABULARY - 1, (2, TOKENS), generator=draw)
    ids[0, 6], ids[1, 3] = VOCABULARY - 1, VOCABULARY - 1
    return {"text": ids}


def _encode(module: Any, draw: torch.Generator) -> Passes:
    """As Stable Diffusion XL reads it: the last layer's input, and the pooled text."""
    wanted: dict[str, Any] = {"text_indices": [LAYERS - 2], "normalize": False}
    return {"encode": (lambda m, given: m.forward_intermediates(text=given["text"], **wanted), _texts(draw))}


def _penultimate(module: Any, draw: torch.Generator) -> Passes:
    """As Stable Diffusion 2.x reads it: the last layer's input, normalised."""
    wanted: dict[str, Any] = {
        "text_indices": [LAYERS - 2], "normalize_intermediates": True, "intermediates_only": True,
    }  # fmt: skip
    return {
        "penultimate": (
            lambda m, given: m.forward_intermediates(text=given["text"], **wanted)["text_intermediates"][0],
            _texts(draw),
        )
    }


def recorded(component: str, *, whole: bool) -> Original:
    """The trace of a family's text encoder: of the whole tower, or of all but its last layer."""
    return Original(
        component, component, REPOSITORY, COMMIT, FILES, tower, _encode if whole else _penultimate, CONFIG,
        paths=("src",), absent=ABSENT,
        skip="" if whole else rf"transformer\.resblocks\.{LAYERS - 1}(\..+)?",  # runs, and nobody reads it
    )  # fmt: skip
