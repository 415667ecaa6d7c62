"""The original HunyuanVideo-1.5 transformer against diffusers' class, at tiny size.

    porter parity --case conversions/hunyuanvideo15/original.py:transformer --reference-repo <checkout> --shims

The width of its byT5 mapper is fixed in the original. What was measured is not in this file.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from parity.case import Case, Draw, Side

REPOSITORY, COMMIT = "Tencent-Hunyuan/HunyuanVideo-1.5", "60783e704160023913bee78f0b47036d393d4dfa"

# diffusers' converter reads 54 blocks: these are its renames, in order.
RENAMES = {
    "time_in.mlp.0": "time_embed.timestep_embedder.linear_1", "time_in.mlp.2": "time_embed.timestep_embedder.linear_2",
    "txt_in.t_embedder.mlp.0": "context_embedder.time_text_embed.timestep_embedder.linear_1",
    "txt_in.t_embedder.mlp.2": "context_embedder.time_text_embed.timestep_embedder.linear_2",
    "txt_in.c_embedder": "context_embedder.time_text_embed.text_embedder",
    "txt_in.input_embedder": "context_embedder.proj_in",
    "txt_in.individual_token_refiner.blocks": "context_embedder.token_refiner.refiner_blocks",
    "self_attn_proj": "attn.to_out.0", "img_mlp": "ff", "txt_mlp": "ff_context", ".mlp.": ".ff.",
    ".fc1": ".net.0.proj", ".fc2": ".net.2", "byt5_in.layernorm": "context_embedder_2.norm",
    "byt5_in.net.0.proj": "context_embedder_2.linear_1", "byt5_in.net.2": "context_embedder_2.linear_2",
    "byt5_in.fc3": "context_embedder_2.linear_3", "vision_in.proj.0": "image_embedder.norm_in",
    "vision_in.proj.1": "image_embedder.linear_1", "vision_in.proj.3": "image_embedder.linear_2",
    "vision_in.proj.4": "image_embedder.norm_out", "img_in": "x_embedder", "cond_type_embedding": "cond_type_embed",
    "double_blocks": "transformer_blocks", "img_mod": "norm1", "txt_mod": "norm1_context",
    "img_attn_q_norm": "attn.norm_q", "img_attn_k_norm": "attn.norm_k", "txt_attn_q_norm": "attn.norm_added_q",
    "txt_attn_k_norm": "attn.norm_added_k", "img_attn_proj": "attn.to_out.0", "txt_attn_proj": "attn.to_add_out",
    "img_attn_": "attn.to_", "txt_attn_q": "attn.add_q_proj", "txt_attn_k": "attn.add_k_proj",
    "txt_attn_v": "attn.add_v_proj", "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear", "adaLN_modulation.1": "norm_out.linear",
}  # fmt: skip


def _original(config: Mapping[str, Any]) -> nn.Module:
    """Without its logger's package, and without the process group that even one process would need."""
    loguru: Any = sys.modules.setdefault("loguru", ModuleType("loguru"))
    loguru.logger = logging.getLogger(__name__)
    import hyvideo.commons.parallel_states as states  # type: ignore[import-not-found]

    states.get_parallel_state = lambda: SimpleNamespace(sp_enabled=False, sp=1)
    from hyvideo.models.transformers import hunyuanvideo_1_5_transformer as code  # type: ignore[import-not-found]

    module: nn.Module = code.HunyuanVideo_1_5_DiffusionTransformer(
        patch_size=[1, 1, 1], in_channels=4, hidden_size=32, heads_num=2, mm_double_blocks_depth=2,
        mm_single_blocks_depth=0, rope_dim_list=[4, 6, 6], text_states_dim=20, attn_mode="torch", glyph_byT5_v2=True,
        vision_projection="linear", vision_states_dim=10, use_cond_type_embedding=True,
    )  # fmt: skip
    return module


def _diffusers(config: Mapping[str, Any]) -> nn.Module:
    from diffusers import HunyuanVideo15Transformer3DModel

    module: nn.Module = HunyuanVideo15Transformer3DModel(
        in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2, text_embed_dim=20,
        image_embed_dim=10, rope_axes_dim=(4, 6, 6),
    )  # fmt: skip
    return module


def _convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    made: dict[str, Tensor] = {}
    for name, tensor in state.items():
        new = name
        for old, ours in RENAMES.items():
            new = new.replace(old, ours)
        if "self_attn_qkv" in new:
            made |= {
                new.replace("self_attn_qkv", f"attn.to_{x}"): t for x, t in zip("qkv", tensor.chunk(3), strict=True)
            }
        elif name.startswith("final_layer.adaLN"):  # shift, scale -> scale, shift
            made[new] = torch.cat(tensor.chunk(2)[::-1])
        else:
            made[new] = tensor
    return made


def _inputs(config: Mapping[str, Any], draw: Draw) -> dict[str, Tensor]:
    """Two videos of 2 x 4 x 3 places; both texts with padding; three tokens of an image."""
    return {
        "x": draw("x", 2, 9, 2, 4, 3), "t": draw.uniform("t", 2, high=1000), "text": draw("text", 2, 7, 20),
        "mask": (torch.arange(7) < torch.tensor([[5], [7]])).long(), "glyphs": draw("glyphs", 2, 4, 1472),
        "glyph_mask": (torch.arange(4) < torch.tensor([[3], [2]])).long(), "image": draw("image", 2, 3, 10),
    }  # fmt: skip


def _run_original(m: Any, x: Mapping[str, Tensor]) -> Any:
    extra = {"byt5_text_states": x["glyphs"], "byt5_text_mask": x["glyph_mask"]}
    return m(x["x"], x["t"], x["text"], None, x["mask"], vision_states=x["image"], extra_kwargs=extra)[0]


def _run_diffusers(m: Any, x: Mapping[str, Tensor]) -> Any:
    return m(
        x["x"], x["t"], x["text"], x["mask"], encoder_hidden_states_2=x["glyphs"],
        encoder_attention_mask_2=x["glyph_mask"], image_embeds=x["image"], return_dict=False,
    )[0]  # fmt: skip


BARE = ("hyvideo.models", "hyvideo.models.text_encoders", "hyvideo.models.transformers")
transformer = Case(
    Side(_original, _run_original, bare=BARE), Side(_diffusers, _run_diffusers), _inputs, _convert, name="transformer"
)
