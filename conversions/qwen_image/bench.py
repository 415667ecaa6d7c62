"""Qwen-Image's benchmark: the denoiser at 1024 x 1024, with guidance."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from runtime.bench.case import BenchCase, Given

RELEASED: dict[str, Any] = {
    "patch_size": 2, "in_channels": 64, "out_channels": 16, "num_layers": 60, "attention_head_dim": 128,
    "num_attention_heads": 24, "joint_attention_dim": 3584, "guidance_embeds": False, "axes_dims_rope": [16, 56, 56],
}  # fmt: skip


def _inputs(config: Mapping[str, Any], sizes: Mapping[str, int], draw: Callable[..., Tensor]) -> Given:
    """One picture of rows x columns packed patches and `text` tokens."""
    rows, columns = sizes["rows"], sizes["columns"]
    latents = draw(1, rows * columns, config["in_channels"])  # (B, S, C)
    return {
        "hidden_states": latents,
        "encoder_hidden_states": draw(1, sizes["text"], config["joint_attention_dim"]),
        "timestep": torch.full((1,), 0.5, dtype=latents.dtype, device=latents.device),
        "img_shapes": [[(1, rows, columns)]],  # of each picture of the batch
    }


def _native(model: Any, given: Given) -> Given:
    shapes = given["img_shapes"][0]
    text, device = given["encoder_hidden_states"].shape[1], given["hidden_states"].device
    table = tuple(part.to(device) for part in model.rotary(shapes, text))
    return given | {"img_shapes": shapes, "rotary": table}


CASES = (
    BenchCase(
        "Qwen-Image, 1024 x 1024", RELEASED, "conversions.qwen_image.model:QwenImageTransformer",
        "QwenImageTransformer2DModel", _inputs, {"text": 64, "rows": 64, "columns": 64}, _native, passes=2,
        small={"num_layers": 2, "num_attention_heads": 4}, small_sizes={"text": 32, "rows": 16, "columns": 16},
    ),
)  # fmt: skip
