"""The original SkyReels-V2 transformer against diffusers' class, at tiny size, with one time for each frame.

    porter parity --case conversions/skyreels_v2/original.py:transformer --reference-repo <checkout> --shims

The original's attention casts to bfloat16 for its kernel. What was measured is not in this file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from parity.case import Case, Draw, Side

REPOSITORY, COMMIT = "SkyworkAI/SkyReels-V2", "abed76fec91103e4543c747eee45334137b3a558"


def _original(config: Mapping[str, Any]) -> nn.Module:
    from skyreels_v2_infer.modules.transformer import WanModel  # type: ignore[import-not-found]

    module: nn.Module = WanModel(
        model_type="t2v", patch_size=(1, 2, 2), text_len=6, in_dim=4, dim=32, ffn_dim=40, freq_dim=12, text_dim=20,
        out_dim=4, num_heads=2, num_layers=2, inject_sample_info=True,
    )  # fmt: skip
    return module


def _diffusers(config: Mapping[str, Any]) -> nn.Module:
    from diffusers import SkyReelsV2Transformer3DModel

    module: nn.Module = SkyReelsV2Transformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=20,
        freq_dim=12, ffn_dim=40, num_layers=2, inject_sample_info=True,
    )  # fmt: skip
    return module


def _convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The converter of Wan, whose layout it is but for the frame rate."""
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    made: dict[str, Tensor] = convert_wan_transformer_to_diffusers(state)
    ends = {"fps_projection.0": "fps_projection.net.0.proj", "fps_projection.2": "fps_projection.net.2"}
    return {
        next((name.replace(old, new) for old, new in ends.items() if name.startswith(old)), name): tensor
        for name, tensor in made.items()
    }


def _inputs(config: Mapping[str, Any], draw: Draw) -> dict[str, Tensor]:
    """One video of 3 x 4 x 3 patches: the frame rate of several does not run in diffusers."""
    return {
        "x": draw("x", 1, 4, 3, 8, 6), "t": draw.integers("t", 1000, 1, 3), "text": draw("text", 1, 6, 20),
        "fps": torch.tensor([1]),
    }  # fmt: skip


def _run_original(m: Any, x: Mapping[str, Tensor]) -> Any:
    return m(x["x"], x["t"], x["text"], fps=x["fps"])


def _run_diffusers(m: Any, x: Mapping[str, Tensor]) -> Any:
    return m(x["x"], x["t"], x["text"], enable_diffusion_forcing=True, fps=x["fps"], return_dict=False)[0]


transformer = Case(
    # The packages' own imports are of pipelines and text encoders.
    Side(_original, _run_original, halves=False, bare=("skyreels_v2_infer", "skyreels_v2_infer.modules")),
    Side(_diffusers, _run_diffusers),
    _inputs,
    _convert,
    name="transformer",
)
