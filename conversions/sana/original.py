"""The original DC-AE, as Sana uses it, against diffusers' class, at tiny size.

    porter parity --case sana:vae --reference-repo <checkout>

Its norm is a Triton kernel; what it computes stands here in torch. What was measured is not in this file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from parity.case import Case, Draw, Side

REPOSITORY, COMMIT = "mit-han-lab/efficientvit", "de7d7733cc0329f391b33f1f459271562ec27bd5"

WIDTHS, DEPTHS = [16, 32, 64], [1, 1, 1]
MISSING = ("triton", "omegaconf", "torchvision", "timm", "onnx", "onnxsim", "segment_anything")  # for training


class _Norm:
    """The Triton kernel's arithmetic: the root mean square over channels, a weight and a bias."""

    @staticmethod
    def apply(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:  # x (b, c, h, w)
        rms = torch.rsqrt(x.square().mean(1, keepdim=True) + eps)
        return x * rms * weight.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)


def _original(config: Mapping[str, Any]) -> nn.Module:
    from efficientvit.models.efficientvit.dc_ae import (  # type: ignore[import-not-found]
        DCAE,
        DCAEConfig,
        DecoderConfig,
        EncoderConfig,
    )
    from efficientvit.models.nn import norm  # type: ignore[import-not-found]

    norm.TritonRMSNorm2dFunc = _Norm
    own = {"in_channels": 3, "latent_channels": config["latents"], "width_list": WIDTHS, "depth_list": DEPTHS}
    own["block_type"] = ["ResBlock", "ResBlock", "EViTS5_GLU"]
    module: nn.Module = DCAE(
        DCAEConfig(
            latent_channels=config["latents"],
            encoder=EncoderConfig(**own, downsample_block_type="Conv"),
            decoder=DecoderConfig(**own, upsample_block_type="InterpolateConv", norm="trms2d", act="silu"),
        )
    )
    return module


def _diffusers(config: Mapping[str, Any]) -> nn.Module:
    from diffusers import AutoencoderDC

    sides: dict[str, Any] = {}
    for side in ("encoder", "decoder"):
        sides[f"{side}_block_types"] = ["ResBlock", "ResBlock", "EfficientViTBlock"]
        sides[f"{side}_block_out_channels"] = WIDTHS
        sides[f"{side}_layers_per_block"] = DEPTHS
        sides[f"{side}_qkv_multiscales"] = ((), (), (5,))
    module: nn.Module = AutoencoderDC(
        in_channels=3, latent_channels=config["latents"], attention_head_dim=32, downsample_block_type="Conv",
        upsample_block_type="interpolate", **sides,
    )  # fmt: skip
    return module


def _convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    from diffusers.loaders.single_file_utils import convert_autoencoder_dc_checkpoint_to_diffusers

    made: dict[str, Tensor] = convert_autoencoder_dc_checkpoint_to_diffusers(dict(state))
    return made


def _pictures(config: Mapping[str, Any], draw: Draw) -> dict[str, dict[str, Tensor]]:
    """A picture of 32 x 48, and latents of a quarter of its sides."""
    return {"encode": {"x": draw("x", 1, 3, 32, 48)}, "decode": {"z": draw("z", 1, config["latents"], 8, 12)}}


vae = Case(
    Side(_original, {"encode": lambda m, x: m.encode(x["x"]), "decode": lambda m, x: m.decode(x["z"])}, stubs=MISSING),
    Side(_diffusers, {"encode": lambda m, x: m.encode(x["x"]).latent, "decode": lambda m, x: m.decode(x["z"]).sample}),
    _pictures, _convert, {"latents": 4}, name="vae",
)  # fmt: skip
