"""The original MMDiT and autoencoder of Stable Diffusion 3.5's repository, at tiny size.

See `conversions.record_reference`.

The original's width is 64 for each block, so two blocks are 128 wide.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from conversions.common.autoencoder_kl.recording import LEVELS, image_and_latents
from conversions.record_reference import Original, Passes

REPOSITORY, COMMIT = "Stability-AI/sd3.5", "fbf8f483f992d8d6ad4eaaeb23b1dc5f523c3b3a"


def _build(**options: Any) -> nn.Module:
    context = {"target": "torch.nn.Linear", "params": {"in_features": 24, "out_features": 128}}
    module: nn.Module = importlib.import_module("mmditx").MMDiTX(
        input_size=None, pos_embed_max_size=6, patch_size=2, in_channels=4, depth=2, num_patches=36,
        adm_in_channels=20, context_embedder_config=context, **options,
    )  # fmt: skip
    return module


def _passes(module: Any, draw: torch.Generator) -> Passes:
    """Two different pictures of 4 x 3 patches, five text tokens, two times."""
    inputs: dict[str, Tensor] = {
        "x": torch.randn(2, 4, 8, 6, generator=draw),
        "t": torch.tensor([937.5, 210.0]),
        "y": torch.randn(2, 20, generator=draw),
        "context": torch.randn(2, 5, 24, generator=draw),
    }
    return {"forward": (lambda m, given: m(**given), inputs)}


LATENTS = 5


def _vae() -> nn.Module:
    """The original's class takes no sizes, its two halves do."""
    original = importlib.import_module("sd3_impls")
    module: nn.Module = original.SDVAE(device="meta")
    sizes = {"ch": 32, "ch_mult": LEVELS, "num_res_blocks": 1, "z_channels": LATENTS}
    module.encoder, module.decoder = original.VAEEncoder(**sizes), original.VAEDecoder(**sizes)
    return module


def _vae_passes(module: Any, draw: torch.Generator) -> Passes:
    """`encode` and `decode` themselves add a random draw, and casts that only CUDA makes."""
    pixels, latents = image_and_latents(LATENTS, draw)
    return {
        "moments": (lambda m, given: m.encoder(given["x"]), pixels),
        "decode": (lambda m, given: m.decoder(given["z"]), latents),
    }


ORIGINALS = (
    Original("transformer-medium", "transformer", REPOSITORY, COMMIT, ("mmditx.py",), _build, _passes),
    Original(
        "transformer-3.5-medium", "transformer", REPOSITORY, COMMIT, ("mmditx.py",),
        lambda: _build(qk_norm="rms", x_block_self_attn_layers=[0]), _passes,
    ),
    Original(
        "transformer-3.5-large", "transformer", REPOSITORY, COMMIT, ("mmditx.py",), lambda: _build(qk_norm="rms"),
        _passes,
    ),
    Original(
        "vae", "vae", REPOSITORY, COMMIT, ("sd3_impls.py",), _vae, _vae_passes,
        {"scaling_factor": 1.5305, "shift_factor": 0.0609},
    ),
)  # fmt: skip
