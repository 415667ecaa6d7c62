"""The original Helios transformer against diffusers' class, at tiny size; both name their weights alike.

    porter parity --case helios:transformer --reference-repo <checkout> --shims

What was measured is not in this file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from parity.case import Case, Draw, Named, Side

REPOSITORY, COMMIT = "PKU-YuanGroup/Helios", "2276f8fec633d86e4c52a0a88a17fc981298c959"

CONFIG = {
    "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 20,
    "freq_dim": 16, "ffn_dim": 40, "num_layers": 2, "rope_dim": (4, 4, 4), "guidance_cross_attn": True,
    "zero_history_timestep": True, "has_multi_term_memory_patch": True, "is_amplify_history": True,
}  # fmt: skip


def _original(config: Mapping[str, Any]) -> nn.Module:
    from helios.modules.transformer_helios import HeliosTransformer3DModel  # type: ignore[import-not-found]

    module: nn.Module = HeliosTransformer3DModel(**config)
    return module


def _diffusers(config: Mapping[str, Any]) -> nn.Module:
    from diffusers import HeliosTransformer3DModel

    module: nn.Module = HeliosTransformer3DModel(**config)
    return module


def _inputs(config: Mapping[str, Any], draw: Draw) -> dict[str, Tensor]:
    """Two videos of two latent frames of 8 x 16, after one, two and four frames of short, middle and long history."""
    places = torch.arange(9)[None].repeat(2, 1)
    return {
        "hidden_states": draw("x", 2, 4, 2, 8, 16),
        "timestep": draw.uniform("t", 2, high=1000),
        "encoder_hidden_states": draw("text", 2, 5, 20),
        "indices_hidden_states": places[:, 7:],
        "indices_latents_history_short": places[:, 6:7],
        "indices_latents_history_mid": places[:, 4:6],
        "indices_latents_history_long": places[:, :4],
        "latents_history_short": draw("short", 2, 4, 1, 8, 16),
        "latents_history_mid": draw("mid", 2, 4, 2, 8, 16),
        "latents_history_long": draw("long", 2, 4, 4, 8, 16),
    }


def _answer(model: Any, x: Named) -> Any:
    return model(**x, return_dict=False)[0]


transformer = Case(
    Side(_original, _answer, stubs=("triton",)), Side(_diffusers, _answer), _inputs, config=CONFIG, name="transformer",
)  # fmt: skip
