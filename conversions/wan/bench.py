"""Wan's benchmark: the denoisers of 2.1 T2V 1.3B at 480 x 832 and 2.2 TI2V 5B at 704 x 1280, both with guidance."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from conversions.wan.model import TextCache
from conversions.wan.recipe import NORM
from runtime.bench.case import BenchCase, Given

T2V_1B: dict[str, Any] = {
    "patch_size": [1, 2, 2], "num_attention_heads": 12, "attention_head_dim": 128, "in_channels": 16,
    "out_channels": 16, "text_dim": 4096, "freq_dim": 256, "ffn_dim": 8960, "num_layers": 30, "cross_attn_norm": True,
    "qk_norm": NORM, "eps": 1e-6, "image_dim": None, "added_kv_proj_dim": None, "rope_max_seq_len": 1024,
    "pos_embed_seq_len": None,
}  # fmt: skip
TI2V_5B = {**T2V_1B, "num_attention_heads": 24, "in_channels": 48, "out_channels": 48, "ffn_dim": 14336}
SMALL = {"num_layers": 2, "num_attention_heads": 4, "ffn_dim": 1024}
SMALL_SIZES = {"text": 64, "frames": 3, "rows": 16, "columns": 16}


def _inputs(config: Mapping[str, Any], sizes: Mapping[str, int], draw: Callable[..., Tensor]) -> Given:
    """One video of `frames` latent frames of rows x columns, and `text` tokens."""
    latents = draw(1, config["in_channels"], sizes["frames"], sizes["rows"], sizes["columns"])  # (B, C, F, H, W)
    return {
        "hidden_states": latents,
        "encoder_hidden_states": draw(1, sizes["text"], config["text_dim"]),
        "timestep": torch.full((1,), 500.0, device=latents.device),
    }


def _a_time_for_each_patch(config: Mapping[str, Any], sizes: Mapping[str, int], draw: Callable[..., Tensor]) -> Given:
    """The same with the times as diffusers' pipeline gives them, where all are noise: one for each patch."""
    given = _inputs(config, sizes, draw)
    patches = sizes["frames"] * (sizes["rows"] // 2) * (sizes["columns"] // 2)
    return given | {"timestep": given["timestep"].expand(1, patches)}


def _native(model: Any, given: Given) -> Given:
    """What the loop makes once: the rotary table, and the text's keys, which the first step leaves for the others."""
    latents, times = given["hidden_states"], given["timestep"]
    table = model.rotary(latents.shape, latents.device)
    return given | {"timestep": times.reshape(1, -1)[:, 0], "rotary": table, "cache": TextCache()}


CASES = (
    BenchCase(
        "Wan 2.1 T2V 1.3B, 480 x 832, 81 frames", T2V_1B, "conversions.wan.model:WanTransformer",
        "WanTransformer3DModel", _inputs, {"text": 512, "frames": 21, "rows": 60, "columns": 104}, _native,
        passes=2, small=SMALL, small_sizes=SMALL_SIZES,
    ),
    BenchCase(
        "Wan 2.2 TI2V 5B, 704 x 1280, 121 frames", TI2V_5B, "conversions.wan.model:WanTransformer",
        "WanTransformer3DModel", _a_time_for_each_patch, {"text": 512, "frames": 31, "rows": 44, "columns": 80},
        _native, passes=2, small=SMALL, small_sizes=SMALL_SIZES,
    ),
)  # fmt: skip
