"""The original HunyuanDiT (v1.2 conditions) against diffusers' class, at small width.

    porter parity --case conversions/hunyuandit/original.py:transformer --reference-repo <checkout> --shims

diffusers' script cannot be imported without its arguments, so what it does stands here again. What was measured is not
in this file.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from parity.case import Case, Draw, Named, Side

REPOSITORY, COMMIT = "Tencent/HunyuanDiT", "d2cb9cde5c9dc6a6c01735dcb92fe7699ddf6bc5"

WIDTH, HEADS, DEPTH, CLIP, T5 = 96, 4, 4, 20, 16
TOP = {
    "pooler": "time_extra_emb.pooler", "t_embedder.mlp.0": "time_extra_emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_extra_emb.timestep_embedder.linear_2", "x_embedder": "pos_embed",
    "mlp_t5.0": "text_embedder.linear_1", "mlp_t5.2": "text_embedder.linear_2",
    "extra_embedder.0": "time_extra_emb.extra_embedder.linear_1",
    "extra_embedder.2": "time_extra_emb.extra_embedder.linear_2", "final_layer.linear": "proj_out",
}  # fmt: skip
BLOCK = {
    "q_norm": "norm_q", "k_norm": "norm_k", "out_proj": "to_out.0", "q_proj": "to_q",
    "default_modulation.1": "norm1.linear",
    "norm1": "norm1.norm", "norm2": "norm3", "norm3": "norm2", "mlp.fc1": "ff.net.0.proj", "mlp.fc2": "ff.net.2",
}  # fmt: skip


def _original(config: Mapping[str, Any]) -> nn.Module:
    from hydit.modules.models import HunYuanDiT  # type: ignore[import-not-found]

    options = SimpleNamespace(
        learn_sigma=True, text_states_dim=CLIP, text_states_dim_t5=T5, text_len=5, text_len_t5=4, norm="layer",
        is_ipa=False, infer_mode="torch", use_flash_attn=False, qk_norm=True, size_cond=None, use_style_cond=False,
    )  # fmt: skip
    module: nn.Module = HunYuanDiT(
        options, input_size=(8, 8), patch_size=2, in_channels=4, hidden_size=WIDTH, depth=DEPTH, num_heads=HEADS
    )
    return module


def _diffusers(config: Mapping[str, Any]) -> nn.Module:
    from diffusers import HunyuanDiT2DModel

    module: nn.Module = HunyuanDiT2DModel(
        num_attention_heads=HEADS, attention_head_dim=WIDTH // HEADS, in_channels=4, patch_size=2, sample_size=8,
        hidden_size=WIDTH, num_layers=DEPTH, cross_attention_dim=CLIP, cross_attention_dim_t5=T5, text_len=5,
        text_len_t5=4, use_style_cond_and_image_meta_size=False,
    )  # fmt: skip
    return module


def _convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    made: dict[str, Tensor] = {}
    for name, tensor in state.items():
        stem, _, kind = name.rpartition(".")
        fused = next((part for part in ("Wqkv", "kv_proj") if stem.endswith(part)), "")
        if fused:
            letters = "qkv" if fused == "Wqkv" else "kv"
            for letter, rows in zip(letters, tensor.chunk(len(letters)), strict=True):
                made[f"{stem.removesuffix(fused)}to_{letter}.{kind}"] = rows
        elif stem == "final_layer.adaLN_modulation.1":  # shift, scale -> scale, shift
            made[f"norm_out.linear.{kind}"] = torch.cat(tensor.chunk(2)[::-1])
        else:
            table = BLOCK if stem.startswith("blocks.") else TOP
            old = next((part for part in table if f".{part}." in f".{stem}."), "")
            made[f"{stem.replace(old, table[old]) if old else stem}.{kind}".lstrip(".")] = tensor
    return made


def _inputs(config: Mapping[str, Any], draw: Draw) -> dict[str, Tensor]:
    """Two pictures of 4 x 3 patches, with five tokens of CLIP and four of T5, of which the second text lacks two."""
    angles = draw("angles", 12, WIDTH // HEADS // 2).repeat_interleave(2, -1)
    shown, shown_t5 = (torch.arange(n) < torch.tensor([[n], [n - 2]]) for n in (5, 4))
    return {
        "x": draw("x", 2, 4, 8, 6), "t": draw.uniform("t", 2, high=1000), "clip": draw("clip", 2, 5, CLIP),
        "mask": shown.long(), "t5": draw("t5", 2, 4, T5), "mask_t5": shown_t5.long(), "cos": angles.cos(),
        "sin": angles.sin(),
    }  # fmt: skip


def _named(x: Named) -> dict[str, Tensor]:
    """Inputs that both sides name alike."""
    return {
        "encoder_hidden_states": x["clip"], "text_embedding_mask": x["mask"], "encoder_hidden_states_t5": x["t5"],
        "text_embedding_mask_t5": x["mask_t5"],
    }  # fmt: skip


def _recorded(model: Any, x: Named) -> Any:
    return model(x["x"], x["t"], **_named(x), cos_cis_img=x["cos"], sin_cis_img=x["sin"], return_dict=False)


def _answer(model: Any, x: Named) -> Any:
    return model(x["x"], x["t"], **_named(x), image_rotary_emb=(x["cos"], x["sin"]), return_dict=False)[0]


transformer = Case(
    Side(_original, _recorded, stubs=("peft",)), Side(_diffusers, _answer), _inputs, _convert, name="transformer",
)  # fmt: skip
