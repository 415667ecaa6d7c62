"""The original UNet and autoencoder of Stable Diffusion 1.x, at tiny size; see `conversions.record_reference`."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn

from conversions.common.autoencoder_kl.recording import ddconfig, image_and_latents, without_lightning
from conversions.common.unet.record import latent_diffusion
from conversions.record_reference import Original, Passes

REPOSITORY, COMMIT = "CompVis/stable-diffusion", "21f890f9da3cfbeaba8e2ac3c425ee9e998d5229"
LATENTS = 4


def _vae() -> nn.Module:
    without_lightning()
    cls = importlib.import_module("ldm.models.autoencoder").AutoencoderKL
    module: nn.Module = cls(ddconfig(LATENTS), {"target": "torch.nn.Identity"}, LATENTS)
    return module


def _vae_passes(module: Any, draw: torch.Generator) -> Passes:
    pixels, latents = image_and_latents(LATENTS, draw)
    return {
        "encode": (lambda m, given: m.encode(given["x"]).mode(), pixels),
        "decode": (lambda m, given: m.decode(given["z"]), latents),
    }


UNETS = (
    # As released: no transformers at the coarsest level, as many heads at each.
    latent_diffusion(
        "unet", {"attention_head_dim": 4}, attention_resolutions=[2, 1], num_res_blocks=2, channel_mult=[1, 2, 2],
        num_heads=4,
    ),
)  # fmt: skip
ORIGINALS = (
    *UNETS,
    Original(
        "vae", "vae", REPOSITORY, COMMIT, ("ldm/models/autoencoder.py", "ldm/modules/diffusionmodules/model.py"),
        _vae, _vae_passes, {"scaling_factor": 0.18215, "shift_factor": None},
        absent=("taming", "taming.modules", "taming.modules.vqvae", "taming.modules.vqvae.quantize"),
    ),
)  # fmt: skip
