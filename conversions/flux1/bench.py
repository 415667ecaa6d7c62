"""FLUX.1's benchmark: the denoiser of FLUX.1-dev at 1024 x 1024."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from conversions.flux1.scale import DEV
from runtime.bench.case import BenchCase, Given


def _inputs(config: Mapping[str, Any], sizes: Mapping[str, int], draw: Callable[..., Tensor]) -> Given:
    """One picture of rows x columns packed patches and `text` tokens."""
    text, rows, columns = sizes["text"], sizes["rows"], sizes["columns"]
    latents = draw(1, rows * columns, config["in_channels"])  # (B, S, C)
    grid = torch.cartesian_prod(torch.zeros(1), torch.arange(float(rows)), torch.arange(float(columns)))  # (S, 3)
    return {
        "hidden_states": latents,
        "encoder_hidden_states": draw(1, text, config["joint_attention_dim"]),
        "pooled_projections": draw(1, config["pooled_projection_dim"]),
        "timestep": torch.full((1,), 0.5, dtype=latents.dtype, device=latents.device),
        "guidance": torch.full((1,), 3.5, device=latents.device),
        "img_ids": grid.to(latents.device),
        "txt_ids": torch.zeros(text, 3, device=latents.device),
    }


def _native(model: Any, given: Given) -> Given:
    return given | {"rotary": model.rotary(given["txt_ids"], given["img_ids"])}


CASES = (
    BenchCase(
        "FLUX.1-dev, 1024 x 1024", DEV, "conversions.flux1.model:FluxTransformer", "FluxTransformer2DModel", _inputs,
        {"text": 512, "rows": 64, "columns": 64}, _native,
        small={"num_layers": 2, "num_single_layers": 4, "num_attention_heads": 4},
        small_sizes={"text": 64, "rows": 16, "columns": 16},
    ),
)  # fmt: skip
