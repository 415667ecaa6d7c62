"""FLUX.1's transformer: the layout of the original code ↔ diffusers' FluxTransformer2DModel.

Original: https://github.com/black-forest-labs/flux/blob/802fb4713906133fcbd0d8dc5351620ca4773036/src/flux/model.py

    h hidden size · d size of a head · n double blocks · m single blocks
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from porter.core.checkpoint import ANY, Header, TensorInfo, specs
from porter.core.errors import RecipeError
from porter.core.onload import on_load
from porter.core.ops import Concat, PermuteBlocks, Split
from porter.core.patterns import count_blocks
from porter.core.recipe import INPUTS, OUTPUTS, Recipe, Rule, Shard, settle, tensor_shape

CLASS = "FluxTransformer2DModel"
SINUSOIDS = 256  # width of the timestep and guidance sinusoids, fixed in the original code
THETA = 10_000  # of the rotary embedding, fixed in diffusers
MLP_RATIO = 4  # fixed in diffusers

# The original code's parameter names → diffusers' config keys that mean the same.
_ALIASES = {
    "vec_in_dim": "pooled_projection_dim",
    "context_in_dim": "joint_attention_dim",
    "num_heads": "num_attention_heads",
    "depth": "num_layers",
    "depth_single_blocks": "num_single_layers",
    "axes_dim": "axes_dims_rope",
    "guidance_embed": "guidance_embeds",
}
# Facts that diffusers' class has no parameter for: any other value cannot be expressed there.
_FIXED = {"theta": THETA, "mlp_ratio": MLP_RATIO, "qkv_bias": True}
_KEYS = (
    "patch_size", "in_channels", "out_channels", "num_layers", "num_single_layers", "attention_head_dim",
    "num_attention_heads", "joint_attention_dim", "pooled_projection_dim", "guidance_embeds", "axes_dims_rope",
)  # fmt: skip
_CLASS_AXES = [16, 56, 56]  # what a config.json of the class means when it has no axes_dims_rope


def infer_config(header: Header, config: Mapping[str, Any]) -> dict[str, Any]:
    """The full FluxTransformer2DModel config: read off the tensors, and checked against what `config` says.

    `config` may use diffusers' keys or the original code's. The axes of the rotary embedding are in no tensor, so they
    must be given; a config.json of the class without that key means the class's own value.

    Raises:
        RecipeError: a key is missing, unknown, contradicts the tensors, or cannot be expressed in diffusers.
    """
    known = _translate(config)
    hidden, in_channels = tensor_shape(header, "img_in.weight", 2)
    double, single = count_blocks(header, "double_blocks"), count_blocks(header, "single_blocks")
    head = "double_blocks.0.img_attn.norm.query_norm.scale" if double else "single_blocks.0.norm.query_norm.scale"
    (head_dim,) = tensor_shape(header, head, 1)
    if not head_dim or hidden % head_dim:
        raise RecipeError(
            f"{head} does not divide the hidden size", expected=f"a divisor of {hidden}", found=f"{head_dim}"
        )
    if known.pop("hidden_size", hidden) != hidden:
        raise RecipeError(
            "the config's hidden_size does not fit the tensors", expected=f"hidden_size: {hidden}",
            found=f"hidden_size: {config['hidden_size']}", hint="give the right one with --config FILE",
        )  # fmt: skip
    seen: dict[str, Any] = {
        "patch_size": 1,
        "in_channels": in_channels,
        "out_channels": tensor_shape(header, "final_layer.linear.weight", 2)[0],
        "num_layers": double,
        "num_single_layers": single,
        "attention_head_dim": head_dim,
        "num_attention_heads": hidden // head_dim,
        "joint_attention_dim": tensor_shape(header, "txt_in.weight", 2)[1],
        "pooled_projection_dim": tensor_shape(header, "vector_in.in_layer.weight", 2)[1],
        "guidance_embeds": any(name.startswith("guidance_in.") for name in header),
    }
    if known.get("out_channels") is None and seen["out_channels"] == in_channels:
        seen["out_channels"] = None  # as diffusers writes it: the same as in_channels
    axes = known.get("axes_dims_rope", _CLASS_AXES if "_class_name" in config else None)
    if axes is None:
        raise RecipeError(
            f"{CLASS}: the tensors do not say axes_dims_rope", expected="axes_dims_rope in the config",
            found=f"no such key; heads of size {head_dim}",
            hint="porter convert … --config FILE, with axes_dims_rope in it",
        )  # fmt: skip
    if not _is_axes(axes, head_dim):
        raise RecipeError(
            f"{CLASS}: axes_dims_rope does not fit the heads", expected=f"three even sizes with sum {head_dim}",
            found=f"axes_dims_rope: {axes}", hint="porter convert … --config FILE, with axes_dims_rope in it",
        )  # fmt: skip
    return {"_class_name": CLASS, **settle(CLASS, known, seen), "axes_dims_rope": list(axes)}


def _translate(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` in diffusers' keys, after refusing what diffusers' class cannot express."""
    if config.get("_class_name", CLASS) != CLASS:
        raise RecipeError(f"the config is of {config['_class_name']}", expected=CLASS, found=str(config["_class_name"]))
    known: dict[str, Any] = {}
    for key, value in config.items():
        if key in _FIXED:
            if value != _FIXED[key]:
                raise RecipeError(
                    f"{CLASS} cannot express {key}", expected=f"{key}: {_FIXED[key]}", found=f"{key}: {value}"
                )
        elif key.startswith("_") or key in _KEYS or key in _ALIASES or key == "hidden_size":
            ours = _ALIASES.get(key, key)
            if ours in known and known[ours] != value:
                raise RecipeError(f"the config says {ours} twice", expected=f"{known[ours]}", found=f"{key}: {value}")
            known[ours] = value
        else:
            raise RecipeError(
                f"the config has an unknown key {key}", expected=", ".join(_KEYS), found=f"{key}: {value}"
            )
    return known


def _is_axes(axes: Any, head_dim: int) -> bool:
    sizes = isinstance(axes, list | tuple) and len(axes) == 3 and all(type(a) is int and a > 0 for a in axes)
    return sizes and sum(axes) == head_dim and all(a % 2 == 0 for a in axes)


def parameters(config: Mapping[str, Any]) -> dict[str, int]:
    """The numbers that the rules use."""
    hidden = config["num_attention_heads"] * config["attention_head_dim"]
    return {"h": hidden, "n": config["num_layers"], "m": config["num_single_layers"],
            "guidance": int(config["guidance_embeds"])}  # fmt: skip


def _linear(name: str, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def original_headers(config: Mapping[str, Any], dtype: str = ANY) -> dict[str, TensorInfo]:
    """All tensors of the original layout for a FluxTransformer2DModel config."""
    d, h = config["attention_head_dim"], config["num_attention_heads"] * config["attention_head_dim"]
    mlp, out = MLP_RATIO * h, config["out_channels"] or config["in_channels"]
    shapes: dict[str, tuple[int, ...]] = _linear("img_in", h, config["in_channels"])
    widths = {"time_in": SINUSOIDS, "vector_in": config["pooled_projection_dim"], "guidance_in": SINUSOIDS}
    for name, width in widths.items():
        if name != "guidance_in" or config["guidance_embeds"]:
            shapes |= _linear(f"{name}.in_layer", h, width) | _linear(f"{name}.out_layer", h, h)
    shapes |= _linear("txt_in", h, config["joint_attention_dim"])
    for i in range(config["num_layers"]):
        for stream in ("img", "txt"):
            at = f"double_blocks.{i}.{stream}"
            shapes |= _linear(f"{at}_mod.lin", 6 * h, h) | _linear(f"{at}_attn.qkv", 3 * h, h)
            shapes |= {f"{at}_attn.norm.{norm}_norm.scale": (d,) for norm in ("query", "key")}
            shapes |= _linear(f"{at}_attn.proj", h, h)
            shapes |= _linear(f"{at}_mlp.0", mlp, h) | _linear(f"{at}_mlp.2", h, mlp)
    for i in range(config["num_single_layers"]):
        at = f"single_blocks.{i}"
        shapes |= _linear(f"{at}.linear1", 3 * h + mlp, h) | _linear(f"{at}.linear2", h, h + mlp)
        shapes |= {f"{at}.norm.{norm}_norm.scale": (d,) for norm in ("query", "key")}
        shapes |= _linear(f"{at}.modulation.lin", 3 * h, h)
    shapes |= _linear("final_layer.linear", out, h) | _linear("final_layer.adaLN_modulation.1", 2 * h, h)
    return specs(shapes, dtype)


def diffusers_headers(config: Mapping[str, Any], dtype: str = ANY) -> dict[str, TensorInfo]:
    """All tensors of FluxTransformer2DModel for its config."""
    d, h = config["attention_head_dim"], config["num_attention_heads"] * config["attention_head_dim"]
    mlp, out = MLP_RATIO * h, config["out_channels"] or config["in_channels"]
    embedders = {"timestep_embedder": SINUSOIDS, "text_embedder": config["pooled_projection_dim"]}
    if config["guidance_embeds"]:
        embedders["guidance_embedder"] = SINUSOIDS
    shapes: dict[str, tuple[int, ...]] = {}
    for name, width in embedders.items():
        at = f"time_text_embed.{name}"
        shapes |= _linear(f"{at}.linear_1", h, width) | _linear(f"{at}.linear_2", h, h)
    shapes |= _linear("context_embedder", h, config["joint_attention_dim"])
    shapes |= _linear("x_embedder", h, config["in_channels"])
    for i in range(config["num_layers"]):
        at = f"transformer_blocks.{i}"
        for context, projections in (
            ("", ("to_q", "to_k", "to_v", "to_out.0")),
            ("_context", ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
        ):
            shapes |= _linear(f"{at}.norm1{context}.linear", 6 * h, h)
            for projection in projections:
                shapes |= _linear(f"{at}.attn.{projection}", h, h)
            shapes |= _linear(f"{at}.ff{context}.net.0.proj", mlp, h) | _linear(f"{at}.ff{context}.net.2", h, mlp)
        shapes |= {f"{at}.attn.norm_{name}.weight": (d,) for name in ("q", "k", "added_q", "added_k")}
    for i in range(config["num_single_layers"]):
        at = f"single_transformer_blocks.{i}"
        for projection in ("to_q", "to_k", "to_v"):
            shapes |= _linear(f"{at}.attn.{projection}", h, h)
        shapes |= {f"{at}.attn.norm_{name}.weight": (d,) for name in ("q", "k")}
        shapes |= _linear(f"{at}.norm.linear", 3 * h, h) | _linear(f"{at}.proj_mlp", mlp, h)
        shapes |= _linear(f"{at}.proj_out", h, h + mlp)
    shapes |= _linear("norm_out.linear", 2 * h, h) | _linear("proj_out", config["patch_size"] ** 2 * out, h)
    return specs(shapes, dtype)


def _embedder(source: str, target: str, when: str | None = None) -> tuple[Rule, Rule]:
    return (
        Rule(f"{source}.in_layer.{{p:weight|bias}}", f"time_text_embed.{target}.linear_1.{{p}}", when=when),
        Rule(f"{source}.out_layer.{{p:weight|bias}}", f"time_text_embed.{target}.linear_2.{{p}}", when=when),
    )


_D, _T = "double_blocks.{i:int}.", "transformer_blocks.{i}."
_S, _U = "single_blocks.{i:int}.", "single_transformer_blocks.{i}."
_FUSED = "the original computes q, k and v with one matrix, stacked in this order"
_FUSED_MLP = "the original computes q, k, v and the MLP's input with one matrix, stacked in this order"
_SWAP = "the original's last modulation gives (shift, scale), diffusers' (scale, shift)"

TRANSFORMER = Recipe(
    name="flux1-transformer",
    source_layout="original",
    target_layout="diffusers",
    rules=(
        Rule("img_in.{p:weight|bias}", "x_embedder.{p}"),
        Rule("txt_in.{p:weight|bias}", "context_embedder.{p}"),
        *_embedder("time_in", "timestep_embedder"),
        *_embedder("vector_in", "text_embedder"),
        *_embedder("guidance_in", "guidance_embedder", when="guidance"),
        Rule(_D + "img_mod.lin.{p:weight|bias}", _T + "norm1.linear.{p}", when="n"),
        Rule(_D + "txt_mod.lin.{p:weight|bias}", _T + "norm1_context.linear.{p}", when="n"),
        Rule(
            _D + "img_attn.qkv.{p:weight|bias}",
            (_T + "attn.to_q.{p}", _T + "attn.to_k.{p}", _T + "attn.to_v.{p}"),
            (Split(("h", "h", "h")),), _FUSED, "n",
        ),
        Rule(
            _D + "txt_attn.qkv.{p:weight|bias}",
            (_T + "attn.add_q_proj.{p}", _T + "attn.add_k_proj.{p}", _T + "attn.add_v_proj.{p}"),
            (Split(("h", "h", "h")),), _FUSED, "n",
        ),
        Rule(_D + "img_attn.norm.query_norm.scale", _T + "attn.norm_q.weight", when="n"),
        Rule(_D + "img_attn.norm.key_norm.scale", _T + "attn.norm_k.weight", when="n"),
        Rule(_D + "txt_attn.norm.query_norm.scale", _T + "attn.norm_added_q.weight", when="n"),
        Rule(_D + "txt_attn.norm.key_norm.scale", _T + "attn.norm_added_k.weight", when="n"),
        Rule(_D + "img_attn.proj.{p:weight|bias}", _T + "attn.to_out.0.{p}", when="n"),
        Rule(_D + "txt_attn.proj.{p:weight|bias}", _T + "attn.to_add_out.{p}", when="n"),
        Rule(_D + "img_mlp.0.{p:weight|bias}", _T + "ff.net.0.proj.{p}", when="n"),
        Rule(_D + "img_mlp.2.{p:weight|bias}", _T + "ff.net.2.{p}", when="n"),
        Rule(_D + "txt_mlp.0.{p:weight|bias}", _T + "ff_context.net.0.proj.{p}", when="n"),
        Rule(_D + "txt_mlp.2.{p:weight|bias}", _T + "ff_context.net.2.{p}", when="n"),
        Rule(_S + "modulation.lin.{p:weight|bias}", _U + "norm.linear.{p}", when="m"),
        Rule(
            _S + "linear1.{p:weight|bias}",
            (_U + "attn.to_q.{p}", _U + "attn.to_k.{p}", _U + "attn.to_v.{p}", _U + "proj_mlp.{p}"),
            (Split(("h", "h", "h", "4*h")),), _FUSED_MLP, "m",
        ),
        Rule(_S + "linear2.{p:weight|bias}", _U + "proj_out.{p}", when="m"),
        Rule(_S + "norm.query_norm.scale", _U + "attn.norm_q.weight", when="m"),
        Rule(_S + "norm.key_norm.scale", _U + "attn.norm_k.weight", when="m"),
        Rule("final_layer.adaLN_modulation.1.{p:weight|bias}", "norm_out.linear.{p}", (PermuteBlocks((1, 0)),), _SWAP),
        Rule("final_layer.linear.{p:weight|bias}", "proj_out.{p}"),
    ),
    parameters=parameters,
    source_headers=original_headers,
    target_headers=diffusers_headers,
    infer_config=infer_config,
)  # fmt: skip

_PACKED = "one product reads the input once"
_B, _P = "transformer_blocks.{i:int}.", "transformer_blocks.{i}."
_Q, _R = "single_transformer_blocks.{i:int}.", "single_transformer_blocks.{i}."

ON_LOAD = on_load(
    "flux1-on-load",
    Rule(
        (_B + "attn.to_q.{p:weight|bias}", _P + "attn.to_k.{p}", _P + "attn.to_v.{p}"),
        _P + "attn.to_qkv.{p}", (Concat(),), _PACKED, shard=OUTPUTS,
    ),
    Rule(
        (_B + "attn.add_q_proj.{p:weight|bias}", _P + "attn.add_k_proj.{p}", _P + "attn.add_v_proj.{p}"),
        _P + "attn.add_qkv_proj.{p}", (Concat(),), _PACKED, shard=OUTPUTS,
    ),
    Rule(_B + "attn.{o:to_out.0|to_add_out}.{p:weight|bias}", _P + "attn.{o}.{p}", shard=INPUTS),
    Rule(_B + "{f:ff|ff_context}.net.0.proj.{p:weight|bias}", _P + "{f}.net.0.proj.{p}", shard=OUTPUTS),
    Rule(_B + "{f:ff|ff_context}.net.2.{p:weight|bias}", _P + "{f}.net.2.{p}", shard=INPUTS),
    Rule(
        (_Q + "attn.to_q.{p:weight|bias}", _R + "attn.to_k.{p}", _R + "attn.to_v.{p}", _R + "proj_mlp.{p}"),
        _R + "to_qkv_mlp.{p}", (Concat(),), _PACKED, shard=OUTPUTS,
    ),
    Rule(_Q + "proj_out.{p:weight|bias}", _R + "proj_out.{p}", shard=Shard(1, ("h", "4*h"))),
    parameters=parameters,
)  # fmt: skip
