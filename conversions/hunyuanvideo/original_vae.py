"""The original HunyuanVideo autoencoder against diffusers' class, at tiny size.

    porter parity --case conversions/hunyuanvideo/original_vae.py:vae --reference-repo <checkout>

What was measured is not in this file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from parity.case import Case, Draw, Side

REPOSITORY, COMMIT = "Tencent-Hunyuan/HunyuanVideo", "fa14b001c18f37191c938a9ef6baad3b9b472759"

CONFIG = {
    "in_channels": 3, "out_channels": 3, "latent_channels": 4, "block_out_channels": (16, 16, 32, 32),
    "layers_per_block": 1, "norm_num_groups": 8,
}  # fmt: skip


def _original_vae(config: Mapping[str, Any]) -> nn.Module:
    from hyvideo.vae.autoencoder_kl_causal_3d import AutoencoderKLCausal3D  # type: ignore[import-not-found]

    module: nn.Module = AutoencoderKLCausal3D(
        down_block_types=["DownEncoderBlockCausal3D"] * 4, up_block_types=["UpDecoderBlockCausal3D"] * 4,
        act_fn="silu", **config,
    )  # fmt: skip
    return module


def _diffusers_vae(config: Mapping[str, Any]) -> nn.Module:
    from diffusers import AutoencoderKLHunyuanVideo

    module: nn.Module = AutoencoderKLHunyuanVideo(**config)
    return module


def _videos(config: Mapping[str, Any], draw: Draw) -> dict[str, dict[str, Tensor]]:
    """Five frames of 16 x 16, and latents of as many."""
    return {"encode": {"video": draw("video", 1, 3, 5, 16, 16)}, "decode": {"z": draw("z", 1, 4, 2, 2, 2)}}


CALLS = {
    "encode": lambda m, x: m.encode(x["video"]).latent_dist.parameters,
    "decode": lambda m, x: m.decode(x["z"]).sample,
}

# Both sides call everything alike, so nothing is converted.
vae = Case(Side(_original_vae, CALLS), Side(_diffusers_vae, CALLS), _videos, config=CONFIG, name="vae")
