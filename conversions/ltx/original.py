"""The original LTX-Video transformer against diffusers' class, at tiny size.

    porter parity --case conversions/ltx/original.py:transformer --reference-repo <checkout> --shims

What was measured is not in this file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from parity.case import Case, Draw, Side

REPOSITORY, COMMIT = "Lightricks/LTX-Video", "5260738e171955b66c0827f9af7e84d68fd1d919"

FRAMES, HEIGHT, WIDTH = 2, 3, 4
SCALE = (8 / 25, 32, 32)  # seconds and pixels of one latent place


def _original(config: Mapping[str, Any]) -> nn.Module:
    from ltx_video.models.transformers.transformer3d import Transformer3DModel  # type: ignore[import-not-found]

    module: nn.Module = Transformer3DModel(
        num_attention_heads=4, attention_head_dim=12, in_channels=8, out_channels=8, num_layers=2,
        cross_attention_dim=48, attention_bias=True, activation_fn="gelu-approximate", norm_elementwise_affine=False,
        norm_eps=1e-6, caption_channels=20, adaptive_norm="single_scale_shift", standardization_norm="rms_norm",
        qk_norm="rms_norm", positional_embedding_type="rope", positional_embedding_theta=10000.0,
        positional_embedding_max_pos=[20, 2048, 2048], timestep_scale_multiplier=1000,
    )  # fmt: skip
    return module


def _diffusers(config: Mapping[str, Any]) -> nn.Module:
    from diffusers import LTXVideoTransformer3DModel

    module: nn.Module = LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=4, attention_head_dim=12, cross_attention_dim=48,
        num_layers=2, caption_channels=20,
    )  # fmt: skip
    return module


def _convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    from diffusers.loaders.single_file_utils import convert_ltx_transformer_checkpoint_to_diffusers

    made: dict[str, Tensor] = convert_ltx_transformer_checkpoint_to_diffusers(state)
    return made


def _inputs(config: Mapping[str, Any], draw: Draw) -> dict[str, Tensor]:
    """Two videos of 2 x 3 x 4 tokens; texts of five and three tokens; times from 0 to 1, as the original has them."""
    return {
        "x": draw("x", 2, FRAMES * HEIGHT * WIDTH, 8), "text": draw("text", 2, 5, 20), "t": draw.uniform("t", 2),
        "mask": torch.arange(5) < torch.tensor([[5], [3]]),
    }  # fmt: skip


def _run_original(m: Any, x: Mapping[str, Tensor]) -> Any:
    places = torch.meshgrid(*(torch.arange(n) for n in (FRAMES, HEIGHT, WIDTH)), indexing="ij")
    grid = torch.stack([p.flatten() * s for p, s in zip(places, SCALE, strict=True)]).repeat(2, 1, 1)
    return m(
        x["x"], indices_grid=grid, encoder_hidden_states=x["text"], timestep=x["t"], encoder_attention_mask=x["mask"],
        return_dict=False,
    )[0]  # fmt: skip


def _run_diffusers(m: Any, x: Mapping[str, Tensor]) -> Any:
    return m(
        x["x"], encoder_hidden_states=x["text"], timestep=x["t"] * 1000, encoder_attention_mask=x["mask"],
        num_frames=FRAMES, height=HEIGHT, width=WIDTH, rope_interpolation_scale=SCALE, return_dict=False,
    )[0]  # fmt: skip


transformer = Case(
    Side(_original, _run_original), Side(_diffusers, _run_diffusers), _inputs, _convert, name="transformer"
)
