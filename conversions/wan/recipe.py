"""Wan's transformer: the original WanModel's layout ↔ diffusers' WanTransformer3DModel.

Wan 2.1 (text, image, first and last frame to video) and Wan 2.2 (text, image, text and image to video).

Original: https://github.com/Wan-Video/Wan2.1/blob/9737cba9c1c3c4d04b33fcad41c111989865d315/wan/modules/model.py
and https://github.com/Wan-Video/Wan2.2/blob/42bf4cfaa384bc21833865abc2f9e6c0e67233dc/wan/modules/model.py

    h hidden size · n blocks · f width of the feed-forward
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
from porter.core.ops import Concat
from porter.core.patterns import count_blocks
from porter.core.recipe import INPUTS, OUTPUTS, Recipe, Rule, tensor_shape

ORIGINAL = "WanModel"
NORM = "rms_norm_across_heads"  # the only norm of q and k that diffusers' class has

FACTS = ConfigFacts(
    "WanTransformer3DModel",
    keys=(
        "patch_size", "num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "text_dim",
        "freq_dim", "ffn_dim", "num_layers", "cross_attn_norm", "qk_norm", "eps", "image_dim", "added_kv_proj_dim",
        "rope_max_seq_len", "pos_embed_seq_len",
    ),
    needed=("num_attention_heads", "eps"),  # the norms of q and k go over all heads, so no shape shows a head
    assumed={"rope_max_seq_len": 1024},  # how many positions are tabulated, which changes none of them
    defaults={"num_attention_heads": 40, "attention_head_dim": 128, "eps": 1e-6, "rope_max_seq_len": 1024},
    aliases={"num_heads": "num_attention_heads", "in_dim": "in_channels", "out_dim": "out_channels"},
    fixed={"text_len": 512, "window_size": [-1, -1]},
)  # fmt: skip


def infer_config(header: Header, config: Mapping[str, Any]) -> dict[str, Any]:
    """The full config: all but the number of heads and the norms' eps is in the tensors.

    `config` may also be the original's config.json.

    Raises:
        RecipeError: a key is missing, unknown or contradicts the tensors, or the class cannot express the model.
    """
    hidden, in_channels, *patch = tensor_shape(header, "patch_embedding.weight", 5)
    layers = count_blocks(header, "blocks")
    out = tensor_shape(header, "head.head.weight", 2)[0]
    if not math.prod(patch) or out % math.prod(patch):
        raise RecipeError(
            "head.head.weight does not fit the patches", expected=f"a multiple of {math.prod(patch)} rows",
            found=f"{out}",
        )  # fmt: skip
    if "blocks.0.self_attn.norm_q.weight" not in header:
        raise RecipeError(
            f"{FACTS.class_name} cannot express attention without norms of q and k",
            expected="blocks.0.self_attn.norm_q.weight", found="no such tensor",
        )  # fmt: skip
    image, places = "img_emb.proj.0.weight" in header, "img_emb.emb_pos" in header
    added = "blocks.0.cross_attn.k_img.weight" in header
    full = FACTS.complete(_known(config, hidden), {
        "patch_size": patch,
        "attention_head_dim": None,
        "in_channels": in_channels,
        "out_channels": out // math.prod(patch),
        "text_dim": tensor_shape(header, "text_embedding.0.weight", 2)[1],
        "freq_dim": tensor_shape(header, "time_embedding.0.weight", 2)[1],
        "ffn_dim": tensor_shape(header, "blocks.0.ffn.0.weight", 2)[0],
        "num_layers": layers,
        "cross_attn_norm": "blocks.0.norm3.weight" in header,
        "qk_norm": NORM,
        "image_dim": tensor_shape(header, "img_emb.proj.0.weight", 1)[0] if image else None,
        "added_kv_proj_dim": tensor_shape(header, "blocks.0.cross_attn.k_img.weight", 2)[1] if added else None,
        "pos_embed_seq_len": tensor_shape(header, "img_emb.emb_pos", 3)[1] if places else None,
    })  # fmt: skip
    heads, eps = full["num_attention_heads"], full["eps"]
    width = full["attention_head_dim"] or (hidden // heads if type(heads) is int and heads > 0 else 0)
    if not all(type(value) is int for value in (heads, width)) or heads * width != hidden:
        raise RecipeError(
            f"{FACTS.class_name}: the heads do not fill the width",
            expected=f"num_attention_heads, and attention_head_dim if it is given, with a product of {hidden}",
            found=f"{heads!r} heads, {full['attention_head_dim']!r} wide",
            hint="give the right ones with --config FILE",
        )  # fmt: skip
    if isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 < eps < 1:
        raise RecipeError(f"{FACTS.class_name}: eps is no small number", expected="such as 1e-06", found=f"{eps!r}")
    return full | {"attention_head_dim": width}


def _known(config: Mapping[str, Any], hidden: int) -> dict[str, Any]:
    """`config` without what only the original's config.json says: its class, the width (checked) and the task."""
    if config.get("dim", hidden) != hidden:
        raise RecipeError(
            "the config's dim does not fit the tensors", expected=f"dim: {hidden} (from the tensors)",
            found=f"dim: {config['dim']}", hint="give the right one with --config FILE",
        )  # fmt: skip
    theirs = config.get("_class_name") == ORIGINAL
    left = {"dim", "model_type"} | ({"_class_name"} if theirs else set())
    return {key: value for key, value in config.items() if key not in left}


def parameters(config: Mapping[str, Any]) -> dict[str, int]:
    """Flags: image tokens, keys and values for them, their positions, and a norm before the cross attention."""
    return {
        "image": int(config.get("image_dim") is not None),
        "added": int(config.get("added_kv_proj_dim") is not None),
        "places": int(config.get("pos_embed_seq_len") is not None),
        "crossed": int(bool(config["cross_attn_norm"])),
    }


def _hidden(config: Mapping[str, Any]) -> int:
    return int(config["num_attention_heads"] * config["attention_head_dim"])


def original_headers(config: Mapping[str, Any], dtype: str = ANY) -> dict[str, TensorInfo]:
    """All tensors of the original layout."""
    h, f, image = _hidden(config), config["ffn_dim"], config.get("image_dim")
    shapes: Shapes = conv("patch_embedding", h, config["in_channels"], *config["patch_size"])
    for name, width in (("text_embedding", config["text_dim"]), ("time_embedding", config["freq_dim"])):
        shapes |= linear(f"{name}.0", h, width) | linear(f"{name}.2", h, h)
    shapes |= linear("time_projection.1", 6 * h, h)
    for i in range(config["num_layers"]):
        at = f"blocks.{i}"
        shapes[f"{at}.modulation"] = (1, 6, h)
        for attention in ("self_attn", "cross_attn"):
            for name in "qkvo":
                shapes |= linear(f"{at}.{attention}.{name}", h, h)
            for name in ("norm_q", "norm_k"):
                shapes |= norm(f"{at}.{attention}.{name}", h, bias=False)
        if config.get("added_kv_proj_dim") is not None:
            for name in ("k_img", "v_img"):
                shapes |= linear(f"{at}.cross_attn.{name}", h, config["added_kv_proj_dim"])
            shapes |= norm(f"{at}.cross_attn.norm_k_img", h, bias=False)
        shapes |= norm(f"{at}.norm3", h) if config["cross_attn_norm"] else {}
        shapes |= linear(f"{at}.ffn.0", f, h) | linear(f"{at}.ffn.2", h, f)
    shapes |= {"head.modulation": (1, 2, h)}
    shapes |= linear("head.head", math.prod(config["patch_size"]) * config["out_channels"], h)
    if image is not None:
        shapes |= norm("img_emb.proj.0", image) | linear("img_emb.proj.1", image, image)
        shapes |= linear("img_emb.proj.3", h, image) | norm("img_emb.proj.4", h)
        if config.get("pos_embed_seq_len") is not None:
            shapes["img_emb.emb_pos"] = (1, config["pos_embed_seq_len"], image)
    return specs(shapes, dtype)


def diffusers_headers(config: Mapping[str, Any], dtype: str = ANY) -> dict[str, TensorInfo]:
    """All tensors of WanTransformer3DModel for its config."""
    h, f, image = _hidden(config), config["ffn_dim"], config.get("image_dim")
    shapes: Shapes = conv("patch_embedding", h, config["in_channels"], *config["patch_size"])
    for name, width in (("time", config["freq_dim"]), ("text", config["text_dim"])):
        at = f"condition_embedder.{name}_embedder"
        shapes |= linear(f"{at}.linear_1", h, width) | linear(f"{at}.linear_2", h, h)
    shapes |= linear("condition_embedder.time_proj", 6 * h, h)
    if image is not None:
        at = "condition_embedder.image_embedder"
        shapes |= norm(f"{at}.norm1", image) | linear(f"{at}.ff.net.0.proj", image, image)
        shapes |= linear(f"{at}.ff.net.2", h, image) | norm(f"{at}.norm2", h)
        if config.get("pos_embed_seq_len") is not None:
            shapes[f"{at}.pos_embed"] = (1, config["pos_embed_seq_len"], image)
    for i in range(config["num_layers"]):
        at = f"blocks.{i}"
        shapes[f"{at}.scale_shift_table"] = (1, 6, h)
        for attention in ("attn1", "attn2"):
            for name in ("to_q", "to_k", "to_v", "to_out.0"):
                shapes |= linear(f"{at}.{attention}.{name}", h, h)
            for name in ("norm_q", "norm_k"):
                shapes |= norm(f"{at}.{attention}.{name}", h, bias=False)
        if config.get("added_kv_proj_dim") is not None:
            for name in ("add_k_proj", "add_v_proj"):
                shapes |= linear(f"{at}.attn2.{name}", h, config["added_kv_proj_dim"])
            shapes |= norm(f"{at}.attn2.norm_added_k", h, bias=False)
        shapes |= norm(f"{at}.norm2", h) if config["cross_attn_norm"] else {}
        shapes |= linear(f"{at}.ffn.net.0.proj", f, h) | linear(f"{at}.ffn.net.2", h, f)
    shapes |= {"scale_shift_table": (1, 2, h)}
    out = math.prod(config["patch_size"]) * (config["out_channels"] or config["in_channels"])
    return specs(shapes | linear("proj_out", out, h), dtype)


_P = "{p:weight|bias}"
_B, _T = "blocks.{i:int}.", "blocks.{i}."
_A = "{a:self_attn=attn1|cross_attn=attn2}."
_IMAGE = "condition_embedder.image_embedder."
_TRADED = "the original calls the norm before the cross attention norm3, diffusers norm2"

TRANSFORMER = Recipe(
    name="wan-transformer",
    source_layout="original",
    target_layout="diffusers",
    rules=(
        Rule(f"patch_embedding.{_P}", "patch_embedding.{p}"),
        Rule("{e:text|time}_embedding.{j:0=1|2=2}." + _P, "condition_embedder.{e}_embedder.linear_{j}.{p}"),
        Rule(f"time_projection.1.{_P}", "condition_embedder.time_proj.{p}"),
        Rule("img_emb.proj.{l:0=norm1|1=ff.net.0.proj|3=ff.net.2|4=norm2}." + _P, _IMAGE + "{l}.{p}", when="image"),
        Rule("img_emb.emb_pos", _IMAGE + "pos_embed", when="places"),
        Rule(_B + "modulation", _T + "scale_shift_table"),
        Rule(_B + _A + "{x:q=to_q|k=to_k|v=to_v|o=to_out.0}." + _P, _T + "{a}.{x}.{p}"),
        Rule(_B + _A + "norm_{x:q|k}.weight", _T + "{a}.norm_{x}.weight"),
        Rule(_B + "cross_attn.{x:k|v}_img." + _P, _T + "attn2.add_{x}_proj.{p}", when="added"),
        Rule(_B + "cross_attn.norm_k_img.weight", _T + "attn2.norm_added_k.weight", when="added"),
        Rule(_B + "norm3." + _P, _T + "norm2.{p}", why=_TRADED, when="crossed"),
        Rule(_B + "ffn.{j:0=0.proj|2=2}." + _P, _T + "ffn.net.{j}.{p}"),
        Rule("head.modulation", "scale_shift_table"),
        Rule(f"head.head.{_P}", "proj_out.{p}"),
    ),
    parameters=parameters,
    source_headers=original_headers,
    target_headers=diffusers_headers,
    infer_config=infer_config,
    keep_dtype=(  # as diffusers' class keeps them in float32
        "condition_embedder.time_embedder.{l:linear_1|linear_2}." + _P,
        _IMAGE + "{l:norm1|norm2}." + _P,
        "blocks.{i:int}.norm2." + _P,
        "blocks.{i:int}.scale_shift_table",
        "scale_shift_table",
    ),
)  # fmt: skip

_PACKED = "one product reads the input once"

ON_LOAD = on_load(
    "wan-on-load",
    Rule(
        (_B + "attn1.to_q." + _P, _T + "attn1.to_k.{p}", _T + "attn1.to_v.{p}"),
        _T + "attn1.to_qkv.{p}", (Concat(),), _PACKED, shard=OUTPUTS,
    ),
    Rule(_B + "attn2.to_q." + _P, _T + "attn2.to_q.{p}", shard=OUTPUTS),
    Rule((_B + "attn2.to_k." + _P, _T + "attn2.to_v.{p}"), _T + "attn2.to_kv.{p}", (Concat(),), _PACKED, shard=OUTPUTS),
    Rule(
        (_B + "attn2.add_k_proj." + _P, _T + "attn2.add_v_proj.{p}"),
        _T + "attn2.add_kv_proj.{p}", (Concat(),), _PACKED, shard=OUTPUTS,
    ),
    # The norms go over all heads: each rank has the weights of its own, and adds up the squares with the others.
    Rule(_B + "{a:attn1|attn2}.{n:norm_q|norm_k|norm_added_k}.weight", _T + "{a}.{n}.weight", shard=OUTPUTS),
    Rule(_B + "{a:attn1|attn2}.to_out.0." + _P, _T + "{a}.to_out.0.{p}", shard=INPUTS),
    Rule(_B + "ffn.net.0.proj." + _P, _T + "ffn.net.0.proj.{p}", shard=OUTPUTS),
    Rule(_B + "ffn.net.2." + _P, _T + "ffn.net.2.{p}", shard=INPUTS),
)  # fmt: skip
