"""The original HunyuanVideo transformer against diffusers' class, at tiny size.

    porter parity --case conversions/hunyuanvideo/original.py:transformer --reference-repo <checkout> --shims

What was measured is not in this file.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from parity.case import Case, Draw, Side

REPOSITORY, COMMIT = "Tencent-Hunyuan/HunyuanVideo", "fa14b001c18f37191c938a9ef6baad3b9b472759"

WIDTH, AXES = 32, [4, 6, 6]


def _original(config: Mapping[str, Any]) -> nn.Module:
    from hyvideo.modules.models import HYVideoDiffusionTransformer  # type: ignore[import-not-found]

    module: nn.Module = HYVideoDiffusionTransformer(
        SimpleNamespace(text_states_dim=20, text_states_dim_2=12), patch_size=[1, 2, 2], in_channels=4,
        hidden_size=WIDTH, heads_num=2, mm_double_blocks_depth=2, mm_single_blocks_depth=2, rope_dim_list=AXES,
        guidance_embed=True,
    )  # fmt: skip
    return module


def _diffusers(config: Mapping[str, Any]) -> nn.Module:
    from diffusers import HunyuanVideoTransformer3DModel

    module: nn.Module = HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2, num_single_layers=2,
        text_embed_dim=20, pooled_projection_dim=12, rope_axes_dim=tuple(AXES),
    )  # fmt: skip
    return module


def _convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' converter, but for the fused layer of single blocks: it splits at the released width."""
    from diffusers.loaders.single_file_utils import convert_hunyuan_video_transformer_to_diffusers

    fused = {name: state.pop(name) for name in list(state) if ".linear1." in name and "single_blocks" in name}
    made: dict[str, Tensor] = convert_hunyuan_video_transformer_to_diffusers(state)
    for name, tensor in fused.items():
        block, _, kind = name.replace("single_blocks", "single_transformer_blocks").rpartition(".linear1.")
        for part, rows in zip(
            ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
            torch.split(tensor, [WIDTH] * 3 + [4 * WIDTH]),
            strict=True,
        ):
            made[f"{block}.{part}.{kind}"] = rows
    return made


def _inputs(config: Mapping[str, Any], draw: Draw) -> dict[str, Tensor]:
    """Two videos of 3 x 4 x 3 patches; texts of seven and four tokens."""
    return {
        "x": draw("x", 2, 4, 3, 8, 6), "t": draw.uniform("t", 2, high=1000), "text": draw("text", 2, 7, 20),
        "mask": (torch.arange(7) < torch.tensor([[7], [4]])).long(), "pooled": draw("pooled", 2, 12),
        "guidance": torch.tensor([6000.0, 1000.0]),
    }  # fmt: skip


def _run_original(m: Any, x: Mapping[str, Tensor]) -> Any:
    from hyvideo.modules.posemb_layers import get_nd_rotary_pos_embed  # type: ignore[import-not-found]

    cos, sin = get_nd_rotary_pos_embed(AXES, [3, 4, 3], theta=256, use_real=True)
    return m(x["x"], x["t"], x["text"], x["mask"], x["pooled"], cos, sin, x["guidance"], return_dict=False)


def _run_diffusers(m: Any, x: Mapping[str, Tensor]) -> Any:
    return m(x["x"], x["t"], x["text"], x["mask"], x["pooled"], x["guidance"], return_dict=False)[0]


transformer = Case(
    Side(_original, _run_original), Side(_diffusers, _run_diffusers), _inputs, _convert, name="transformer"
)
