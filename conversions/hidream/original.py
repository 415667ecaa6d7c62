"""The original HiDream-I1 transformer against diffusers' class, at small width.

    porter parity --case conversions/hidream/original.py:transformer --reference-repo <checkout> --shims

Both name their weights alike. The pictures are square: of others diffusers' class makes as many tokens as its largest
picture has, which the original leaves to its pipeline. What was measured is not in this file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from parity.case import Case, Draw, Named, Side

REPOSITORY, COMMIT = "HiDream-ai/HiDream-I1", "9b42dd606fecf8f78b974adb7e4d10331c91371a"

CONFIG = {
    "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 1, "num_single_layers": 1,
    "attention_head_dim": 16, "num_attention_heads": 2, "caption_channels": [20, 24], "text_emb_dim": 12,
    "num_routed_experts": 4, "num_activated_experts": 2, "axes_dims_rope": (8, 4, 4), "max_resolution": (8, 8),
    "llama_layers": [0, 1],
}  # fmt: skip


def _original(config: Mapping[str, Any]) -> nn.Module:
    from hi_diffusers.models.transformers.transformer_hidream_image import (  # type: ignore[import-not-found]
        HiDreamImageTransformer2DModel,
    )

    module: nn.Module = HiDreamImageTransformer2DModel(**config)
    return module


def _diffusers(config: Mapping[str, Any]) -> nn.Module:
    from diffusers import HiDreamImageTransformer2DModel

    module: nn.Module = HiDreamImageTransformer2DModel(**config)
    return module


def _inputs(config: Mapping[str, Any], draw: Draw) -> dict[str, Tensor]:
    """Two pictures of 4 x 4 patches; five tokens of T5, six of each of Llama's two layers."""
    return {
        "x": draw("x", 2, 4, 8, 8),
        "t": draw.uniform("t", 2, high=1000),
        "t5": draw("t5", 2, 5, 20),
        "llama": draw("llama", 2, 2, 6, 24),
        "pooled": draw("pooled", 2, 12),
    }


def _recorded(model: Any, x: Named) -> Any:
    return model(x["x"], x["t"], [x["t5"], x["llama"]], x["pooled"], return_dict=False)[0]


def _answer(model: Any, x: Named) -> Any:
    return model(
        x["x"], timesteps=x["t"], encoder_hidden_states_t5=x["t5"], encoder_hidden_states_llama3=x["llama"],
        pooled_embeds=x["pooled"], return_dict=False,
    )[0]  # fmt: skip


transformer = Case(
    Side(_original, _recorded), Side(_diffusers, _answer), _inputs, config=CONFIG, name="transformer",
)  # fmt: skip
