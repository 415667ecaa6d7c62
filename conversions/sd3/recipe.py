"""The transformer of Stable Diffusion 3 and 3.5: the original MMDiT's layout ↔ diffusers' SD3Transformer2DModel.

Original: https://github.com/Stability-AI/sd3.5/blob/fbf8f483f992d8d6ad4eaaeb23b1dc5f523c3b3a/mmditx.py

    h hidden size · n blocks; the last block's context stream ends before its attention's projection
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from conversions.common.shapes import Shapes, conv, linear, norm
from porter.core.checkpoint import ANY, Header, TensorInfo, specs
from porter.core.configs import ConfigFacts
from porter.core.errors import RecipeError
from porter.core.onload import on_load
from porter.core.ops import Concat, PermuteBlocks, Split
from porter.core.patterns import count_blocks
from porter.core.recipe import INPUTS, OUTPUTS, Recipe, Rule, tensor_shape

SINUSOIDS = 256  # width of the timestep's sinusoids, fixed in both
MLP_RATIO = 4  # fixed in diffusers
HEAD = 64  # width of a head, fixed in the original code

FACTS = ConfigFacts(
    "SD3Transformer2DModel",
    keys=(
        "sample_size", "patch_size", "in_channels", "num_layers", "attention_head_dim", "num_attention_heads",
        "joint_attention_dim", "caption_projection_dim", "pooled_projection_dim", "out_channels", "pos_embed_max_size",
        "dual_attention_layers", "qk_norm",
    ),
    assumed={"sample_size": 128},
    defaults={"sample_size": 128},
)  # fmt: skip


def infer_config(header: Header, config: Mapping[str, Any]) -> dict[str, Any]:
    """The full config: all but `sample_size`, which no result depends on, is in the tensors.

    Raises:
        RecipeError: a key is unknown or contradicts the tensors, or the tensors contradict each other.
    """
    hidden, in_channels, patch, _ = tensor_shape(header, "x_embedder.proj.weight", 4)
    _, places, _ = tensor_shape(header, "pos_embed", 3)
    side = math.isqrt(places)
    layers = count_blocks(header, "joint_blocks")
    if side * side != places or hidden % HEAD or not patch:
        raise RecipeError(
            "pos_embed is not a square of positions, or the heads do not fill the width",
            expected=f"a square of positions, and a width that {HEAD} divides", found=f"{places} and {hidden}",
        )  # fmt: skip
    dual = [i for i in range(layers) if f"joint_blocks.{i}.x_block.attn2.qkv.weight" in header]
    out = tensor_shape(header, "final_layer.linear.weight", 2)[0]
    normed = "joint_blocks.0.x_block.attn.ln_q.weight" in header
    return FACTS.complete(config, {
        "patch_size": patch,
        "in_channels": in_channels,
        "out_channels": out // patch**2,
        "num_layers": layers,
        "attention_head_dim": HEAD,
        "num_attention_heads": hidden // HEAD,
        "joint_attention_dim": tensor_shape(header, "context_embedder.weight", 2)[1],
        "caption_projection_dim": hidden,
        "pooled_projection_dim": tensor_shape(header, "y_embedder.mlp.0.weight", 2)[1],
        "pos_embed_max_size": side,
        "dual_attention_layers": dual,
        "qk_norm": "rms_norm" if normed else None,
    })  # fmt: skip


def _hidden(config: Mapping[str, Any]) -> int:
    return int(config["num_attention_heads"] * config["attention_head_dim"])


def parameters(config: Mapping[str, Any]) -> dict[str, int]:
    """The numbers that the rules use; `dual` and `normed` are flags."""
    return {
        "h": _hidden(config), "n": config["num_layers"], "more": int(config["num_layers"] > 1),
        "dual": int(bool(config["dual_attention_layers"])), "normed": int(bool(config["qk_norm"])),
    }  # fmt: skip


def original_headers(config: Mapping[str, Any], dtype: str = ANY) -> dict[str, TensorInfo]:
    """All tensors of the original layout."""
    h, n, patch = _hidden(config), config["num_layers"], config["patch_size"]
    shapes: Shapes = {"pos_embed": (1, config["pos_embed_max_size"] ** 2, h)}
    shapes |= conv("x_embedder.proj", h, config["in_channels"], patch, patch)
    for name, width in (("t_embedder", SINUSOIDS), ("y_embedder", config["pooled_projection_dim"])):
        shapes |= linear(f"{name}.mlp.0", h, width) | linear(f"{name}.mlp.2", h, h)
    shapes |= linear("context_embedder", h, config["joint_attention_dim"])
    for i in range(n):
        for stream in ("context_block", "x_block"):
            at, whole, dual = f"joint_blocks.{i}.{stream}", stream == "x_block" or i < n - 1, False
            dual = stream == "x_block" and i in config["dual_attention_layers"]
            for attention in ("attn", "attn2") if dual else ("attn",):
                shapes |= linear(f"{at}.{attention}.qkv", 3 * h, h)
                if config["qk_norm"]:
                    for name in ("ln_q", "ln_k"):
                        shapes |= norm(f"{at}.{attention}.{name}", config["attention_head_dim"], bias=False)
                shapes |= linear(f"{at}.{attention}.proj", h, h) if whole else {}
            if whole:
                shapes |= linear(f"{at}.mlp.fc1", MLP_RATIO * h, h) | linear(f"{at}.mlp.fc2", h, MLP_RATIO * h)
            shapes |= linear(f"{at}.adaLN_modulation.1", (9 if dual else 6 if whole else 2) * h, h)
    shapes |= linear("final_layer.linear", patch**2 * config["out_channels"], h)
    return specs(shapes | linear("final_layer.adaLN_modulation.1", 2 * h, h), dtype)


def diffusers_headers(config: Mapping[str, Any], dtype: str = ANY) -> dict[str, TensorInfo]:
    """All tensors of SD3Transformer2DModel for its config."""
    h, n, patch, d = _hidden(config), config["num_layers"], config["patch_size"], config["attention_head_dim"]
    shapes: Shapes = {"pos_embed.pos_embed": (1, config["pos_embed_max_size"] ** 2, h)}
    shapes |= conv("pos_embed.proj", h, config["in_channels"], patch, patch)
    for name, width in (("timestep", SINUSOIDS), ("text", config["pooled_projection_dim"])):
        at = f"time_text_embed.{name}_embedder"
        shapes |= linear(f"{at}.linear_1", h, width) | linear(f"{at}.linear_2", h, h)
    shapes |= linear("context_embedder", config["caption_projection_dim"], config["joint_attention_dim"])
    for i in range(n):
        at, whole, dual = f"transformer_blocks.{i}", i < n - 1, i in config["dual_attention_layers"]
        shapes |= linear(f"{at}.norm1.linear", (9 if dual else 6) * h, h)
        shapes |= linear(f"{at}.norm1_context.linear", (6 if whole else 2) * h, h)
        for attention in ("attn", "attn2") if dual else ("attn",):
            for name in ("to_q", "to_k", "to_v", "to_out.0"):
                shapes |= linear(f"{at}.{attention}.{name}", h, h)
            if config["qk_norm"]:
                for name in ("norm_q", "norm_k"):
                    shapes |= norm(f"{at}.{attention}.{name}", d, bias=False)
        for name in ("add_q_proj", "add_k_proj", "add_v_proj", *(("to_add_out",) if whole else ())):
            shapes |= linear(f"{at}.attn.{name}", h, h)
        if config["qk_norm"]:
            for name in ("norm_added_q", "norm_added_k"):
                shapes |= norm(f"{at}.attn.{name}", d, bias=False)
        for stream in ("ff", "ff_context") if whole else ("ff",):
            shapes |= linear(f"{at}.{stream}.net.0.proj", MLP_RATIO * h, h)
            shapes |= linear(f"{at}.{stream}.net.2", h, MLP_RATIO * h)
    shapes |= linear("norm_out.linear", 2 * h, h)
    return specs(shapes | linear("proj_out", patch**2 * config["out_channels"], h), dtype)


_X, _C, _T = "joint_blocks.{i:int}.x_block.", "joint_blocks.{i:int}.context_block.", "transformer_blocks.{i}."
_LAST, _BEFORE = "joint_blocks.{i:int==n-1}.context_block.", "joint_blocks.{i:int<n-1}.context_block."
_P = "{p:weight|bias}"
_FUSED = "the original computes q, k and v with one matrix, stacked in this order"
_SWAP = "this modulation gives (shift, scale) in the original, (scale, shift) in diffusers"
_QKV = Split(("h", "h", "h"))

TRANSFORMER = Recipe(
    name="sd3-transformer",
    source_layout="original",
    target_layout="diffusers",
    rules=(
        Rule("pos_embed", "pos_embed.pos_embed"),
        Rule(f"x_embedder.proj.{_P}", "pos_embed.proj.{p}"),
        Rule("t_embedder.mlp.{j:0=1|2=2}." + _P, "time_text_embed.timestep_embedder.linear_{j}.{p}"),
        Rule("y_embedder.mlp.{j:0=1|2=2}." + _P, "time_text_embed.text_embedder.linear_{j}.{p}"),
        Rule(f"context_embedder.{_P}", "context_embedder.{p}"),
        Rule(f"{_X}adaLN_modulation.1.{_P}", _T + "norm1.linear.{p}"),
        Rule(f"{_BEFORE}adaLN_modulation.1.{_P}", _T + "norm1_context.linear.{p}", when="more"),
        Rule(f"{_LAST}adaLN_modulation.1.{_P}", _T + "norm1_context.linear.{p}", (PermuteBlocks((1, 0)),), _SWAP),
        Rule(
            f"{_X}attn.qkv.{_P}", (_T + "attn.to_q.{p}", _T + "attn.to_k.{p}", _T + "attn.to_v.{p}"), (_QKV,), _FUSED,
        ),
        Rule(
            f"{_X}attn2.qkv.{_P}", (_T + "attn2.to_q.{p}", _T + "attn2.to_k.{p}", _T + "attn2.to_v.{p}"), (_QKV,),
            _FUSED, "dual",
        ),
        Rule(
            f"{_C}attn.qkv.{_P}",
            (_T + "attn.add_q_proj.{p}", _T + "attn.add_k_proj.{p}", _T + "attn.add_v_proj.{p}"), (_QKV,), _FUSED,
        ),
        Rule(_X + "attn.ln_{x:q|k}.weight", _T + "attn.norm_{x}.weight", when="normed"),
        Rule(_X + "attn2.ln_{x:q|k}.weight", _T + "attn2.norm_{x}.weight", when="normed*dual"),
        Rule(_C + "attn.ln_{x:q|k}.weight", _T + "attn.norm_added_{x}.weight", when="normed"),
        Rule(f"{_X}attn.proj.{_P}", _T + "attn.to_out.0.{p}"),
        Rule(f"{_X}attn2.proj.{_P}", _T + "attn2.to_out.0.{p}", when="dual"),
        Rule(f"{_BEFORE}attn.proj.{_P}", _T + "attn.to_add_out.{p}", when="more"),
        Rule(_X + "mlp.{f:fc1=0.proj|fc2=2}." + _P, _T + "ff.net.{f}.{p}"),
        Rule(_BEFORE + "mlp.{f:fc1=0.proj|fc2=2}." + _P, _T + "ff_context.net.{f}.{p}", when="more"),
        Rule(f"final_layer.adaLN_modulation.1.{_P}", "norm_out.linear.{p}", (PermuteBlocks((1, 0)),), _SWAP),
        Rule(f"final_layer.linear.{_P}", "proj_out.{p}"),
    ),
    parameters=parameters,
    source_headers=original_headers,
    target_headers=diffusers_headers,
    infer_config=infer_config,
)  # fmt: skip

_PACKED = "one product reads the input once"
_B = "transformer_blocks.{i:int}."

ON_LOAD = on_load(
    "sd3-on-load",
    Rule(
        (_B + "{a:attn|attn2}.to_q.{p:weight|bias}", _T + "{a}.to_k.{p}", _T + "{a}.to_v.{p}"),
        _T + "{a}.to_qkv.{p}", (Concat(),), _PACKED, shard=OUTPUTS,
    ),
    Rule(
        (_B + "attn.add_q_proj.{p:weight|bias}", _T + "attn.add_k_proj.{p}", _T + "attn.add_v_proj.{p}"),
        _T + "attn.add_qkv_proj.{p}", (Concat(),), _PACKED, shard=OUTPUTS,
    ),
    Rule(_B + "{o:attn.to_out.0|attn2.to_out.0|attn.to_add_out}.{p:weight|bias}", _T + "{o}.{p}", shard=INPUTS),
    Rule(_B + "{f:ff|ff_context}.net.0.proj.{p:weight|bias}", _T + "{f}.net.0.proj.{p}", shard=OUTPUTS),
    Rule(_B + "{f:ff|ff_context}.net.2.{p:weight|bias}", _T + "{f}.net.2.{p}", shard=INPUTS),
)  # fmt: skip
