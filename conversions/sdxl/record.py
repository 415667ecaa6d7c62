"""The original UNets, autoencoder and second text encoder of Stable Diffusion XL, at tiny size.

They come from two repositories; see `conversions.record_reference`.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from conversions.common.autoencoder_kl.recording import ddconfig, image_and_latents, without_lightning
from conversions.common.clip.recording import recorded
from conversions.common.unet.record import POOLED, SINUSOIDS, SIZES, generative_models, pooled_and_sizes
from conversions.record_reference import Original, Passes

REPOSITORY, COMMIT = "Stability-AI/generative-models", "0ad7de9a5cb53fd63d6d30a4f385485e72e08597"
LATENTS = 4


def _bare(*names: str) -> None:
    """Packages of the checkout without their `__init__`, which import the training code and its dependencies."""
    root = next(Path(folder) for folder in sys.path if (Path(folder) / "sgm").is_dir())
    for name in names:
        package = ModuleType(name)
        package.__path__ = [str(root / name.replace(".", "/"))]
        sys.modules.setdefault(name, package)


def _vae() -> nn.Module:
    """The released config asks for xformers' attention, which is the default's in another arrangement."""
    without_lightning()
    _bare("sgm", "sgm.models", "sgm.modules")
    cls = importlib.import_module("sgm.models.autoencoder").AutoencoderKL
    module = cls(embed_dim=LATENTS, ddconfig=ddconfig(LATENTS), lossconfig={"target": "torch.nn.Identity"})
    module.regularization.sample = False  # the distribution's mean, not a draw
    found: nn.Module = module
    return found


def _vae_passes(module: Any, draw: torch.Generator) -> Passes:
    pixels, latents = image_and_latents(LATENTS, draw)
    return {
        "encode": (lambda m, given: m.encode(given["x"]), pixels),
        "decode": (lambda m, given: m.decode(given["z"]), latents),
    }


_TOLD: dict[str, Any] = {"addition_embed_type": "text_time", "addition_time_embed_dim": SINUSOIDS}
_LABELS: dict[str, Any] = {"num_classes": "sequential", "adm_in_channels": POOLED + SIZES * SINUSOIDS}

UNETS = (
    # As released: no transformers at the finest level, deeper ones at coarser levels.
    generative_models(
        "unet-base", {"attention_head_dim": [2, 4, 8], **_TOLD}, pooled_and_sizes, num_res_blocks=1,
        channel_mult=[1, 2, 4], attention_resolutions=[4, 2], transformer_depth=[1, 1, 2], num_head_channels=16,
        **_LABELS,
    ),
    # As released: none at the finest and the coarsest level, but in the middle.
    generative_models(
        "unet-refiner", {"attention_head_dim": [2, 4, 4], **_TOLD}, pooled_and_sizes, num_res_blocks=1,
        channel_mult=[1, 2, 2], attention_resolutions=[2], transformer_depth=2, num_head_channels=16, **_LABELS,
    ),
)  # fmt: skip
ORIGINALS = (
    *UNETS,
    recorded("text_encoder_2", whole=True),
    Original(
        "vae", "vae", REPOSITORY, COMMIT, ("sgm/models/autoencoder.py", "sgm/modules/diffusionmodules/model.py"),
        _vae, _vae_passes, {"scaling_factor": 0.13025, "shift_factor": None},
    ),
)  # fmt: skip
