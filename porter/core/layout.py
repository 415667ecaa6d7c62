"""What file names and class names say: which files are a component's weights, and whether a library has a class."""

from __future__ import annotations

import importlib.util
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

LIBRARIES = ("diffusers", "transformers")
WEIGHT_SUFFIXES = (".safetensors", ".sft", ".bin", ".ckpt", ".pt", ".pth", ".gguf", ".msgpack", ".onnx")
_WEIGHTS = re.compile(
    r"(?P<stem>diffusion_pytorch_model|pytorch_model|model)(?:\.(?P<variant>[A-Za-z0-9_]+))?(?:-(?P<shard>\d+)-of-(?P<of>\d+))?"
    r"\.(?P<kind>safetensors|bin)"
)
_WEIGHTLESS = re.compile(r"(Scheduler|Tokenizer(Fast)?|Processor(Fast)?|FeatureExtractor|Guider)$")
# What a reader of a plan looks for first in a config, in this order.
_HIGHLIGHTS = (
    *("num_layers", "num_single_layers", "num_hidden_layers", "num_attention_heads", "num_heads", "attention_head_dim"),
    *("hidden_size", "d_model", "in_channels", "block_out_channels", "layers_per_block", "latent_channels"),
    *("scaling_factor", "shift_factor", "joint_attention_dim", "cross_attention_dim", "pooled_projection_dim"),
    *("axes_dims_rope", "guidance_embeds", "vocab_size", "max_position_embeddings", "model_max_length"),
    *("num_train_timesteps", "shift", "use_dynamic_shifting", "prediction_type"),
)


@dataclass(frozen=True)
class Weights:
    """The weight files of one component folder: the chosen set, and what else lies there."""

    files: tuple[str, ...] = ()
    variant: str | None = None
    pickled: bool = False
    other_variants: tuple[str, ...] = ()


def find_weights(names: Iterable[str], folder: str) -> Weights:
    """The weights among `names` that lie in `folder` ("" is the root); the plain set before variants such as fp16.

    Names of one set: one file, or all its shards. Safetensors are preferred to pickles.
    """
    prefix = f"{folder}/" if folder else ""
    sets: dict[tuple[bool, str], list[str]] = defaultdict(list)
    for name in names:
        inner = name.removeprefix(prefix)
        if name.startswith(prefix) and "/" not in inner and (match := _WEIGHTS.fullmatch(inner)):
            sets[match["kind"] == "bin", match["variant"] or ""].append(name)
    if not sets:
        return Weights()
    pickled, variant = chosen = min(sets)
    others = sorted({other for _, other in sets if other != variant})
    return Weights(tuple(_one_set(sets[chosen])), variant or None, pickled, tuple(others))


def _one_set(names: Sequence[str]) -> list[str]:
    """One whole file wins over shards of the same weights lying beside it."""
    whole = [name for name in names if not re.search(r"-\d+-of-\d+\.", name)]
    return sorted(whole)[:1] or sorted(names)


def missing_shards(files: Sequence[str]) -> list[int]:
    """Numbers of shards that `…-00001-of-00003…` names promise and `files` lack."""
    numbers = [match for name in files if (match := re.search(r"-(\d+)-of-(\d+)\.", name))]
    total = max((int(match[2]) for match in numbers), default=0)
    return sorted(set(range(1, total + 1)) - {int(match[1]) for match in numbers})


def weightless(class_name: str) -> bool:
    """Whether a class of this name holds no weights: schedulers, tokenizers, processors."""
    return bool(_WEIGHTLESS.search(class_name))


def highlights(config: dict[str, Any], limit: int = 8) -> dict[str, Any]:
    """The entries of a config that say most about the architecture."""
    found = {key: config[key] for key in _HIGHLIGHTS if config.get(key) is not None}
    return dict(list(found.items())[:limit])


@cache
def library_has(library: str, class_name: str) -> bool | None:
    """Whether the installed `library` defines `class_name`, from its source text and without importing it.

    None where the library is not installed.
    """
    spec = importlib.util.find_spec(library) if library in LIBRARIES else None
    if spec is None or spec.origin is None:
        return None
    root = Path(spec.origin).parent
    if re.search(rf"[\"']{re.escape(class_name)}[\"']", (root / "__init__.py").read_text("utf-8")):
        return True
    names = {class_name, class_name.removesuffix("Fast")}
    pattern = re.compile(rb"[\"'(](" + "|".join(map(re.escape, names)).encode() + rb")[\"']")
    automatic = sorted((root / "models" / "auto").glob("*.py"))
    if any(pattern.search(file.read_bytes()) for file in automatic):
        return True
    # A class outside the automatic tables: the folder that its name begins with (`CLIPTextModelWithProjection` → clip).
    lowered = class_name.lower()
    folders = (folder for folder in (root / "models").glob("*/") if lowered.startswith(folder.name.replace("_", "")))
    definition = re.compile(rb"^class (" + "|".join(map(re.escape, names)).encode() + rb")\b", re.MULTILINE)
    return any(definition.search(file.read_bytes()) for folder in folders for file in sorted(folder.glob("*.py")))
