"""The original Mochi transformer against diffusers' class, at small width.

    porter parity --case conversions/mochi/original.py:transformer --reference-repo <checkout>/src --shims

diffusers' converter knows 48 blocks, and the original rounds the width of its MLPs up to 256, so both stay. The
original asserts bfloat16, which would round on both sides. What was measured is not in this file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from parity.case import Case, Draw, Side

REPOSITORY, COMMIT = "genmoai/mochi", "0c86aebf386e6622deadfb47ff1996878cefc0ac"
SOURCE = "src"  # of the checkout, where its packages are

WIDTH, TOKENS = 96, 24


def _original(config: Mapping[str, Any]) -> nn.Module:
    from genmo.mochi_preview.dit.joint_model.asymm_models_joint import AsymmDiTJoint  # type: ignore[import-not-found]

    module: nn.Module = AsymmDiTJoint(
        patch_size=2, in_channels=4, hidden_size_x=WIDTH, hidden_size_y=WIDTH, depth=48, num_heads=4, mlp_ratio_x=4.0,
        mlp_ratio_y=4.0, t5_feat_dim=16, t5_token_length=6, timestep_scale=1000.0, qkv_bias=False, qk_norm=True,
        attention_mode="flash",
    )  # fmt: skip
    return module


def _diffusers(config: Mapping[str, Any]) -> nn.Module:
    from diffusers import MochiTransformer3DModel

    module: nn.Module = MochiTransformer3DModel(
        patch_size=2, num_attention_heads=4, attention_head_dim=WIDTH // 4, num_layers=48, pooled_projection_dim=WIDTH,
        in_channels=4, text_embed_dim=16, time_embed_dim=256, max_sequence_length=6,
    )  # fmt: skip
    return module


def _convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    from diffusers.loaders.single_file_utils import convert_mochi_transformer_checkpoint_to_diffusers

    made: dict[str, Tensor] = convert_mochi_transformer_checkpoint_to_diffusers(state)
    return made


def _inputs(config: Mapping[str, Any], draw: Draw) -> dict[str, Tensor]:
    """Two videos of 2 x 3 x 4 patches; texts of six and four tokens."""
    mask = torch.arange(6) < torch.tensor([[6], [4]])
    return {
        "x": draw("x", 2, 4, 2, 6, 8),
        "sigma": draw.uniform("sigma", 2),
        "text": draw("text", 2, 6, 16),
        "mask": mask,
    }


def _run_original(m: Any, x: Mapping[str, Tensor]) -> Any:
    """With the places of tokens that are no padding, as the original's pipeline counts them."""
    mask = F.pad(x["mask"], (TOKENS, 0), value=True)
    lengths = mask.sum(-1, dtype=torch.int32)
    packed = {
        "cu_seqlens_kv": F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)),
        "max_seqlen_in_batch_kv": int(lengths.max()),
        "valid_token_indices_kv": mask.flatten().nonzero().flatten(),
    }
    return m(x["x"], x["sigma"], [x["text"]], [x["mask"]], packed_indices=packed)


def _run_diffusers(m: Any, x: Mapping[str, Tensor]) -> Any:
    return m(x["x"], x["text"], (1 - x["sigma"]) * 1000, x["mask"], return_dict=False)[0]


transformer = Case(
    Side(_original, _run_original, halves=False, asserts=False),
    Side(_diffusers, _run_diffusers),
    _inputs,
    _convert,
    name="transformer",
)
