"""Qwen-Image's transformer: names and shapes of every release are those of diffusers' QwenImageTransformer2DModel.

`ON_LOAD` packs them for the native model while they are read. What a bare file lacks is its config.json, which a
conversion writes. Single files of Qwen-Image-Edit-2511 hold an empty tensor that marks them: their tokens of given
pictures are modulated as at time 0.

    h width · n blocks
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conversions.common.shapes import Shapes, linear, norm
from porter.core.checkpoint import ANY, Header, TensorInfo, specs
from porter.core.configs import ConfigFacts
from porter.core.errors import RecipeError
from porter.core.onload import on_load
from porter.core.ops import Concat, Drop
from porter.core.patterns import count_blocks
from porter.core.recipe import INPUTS, OUTPUTS, Recipe, Rule, tensor_shape

SINUSOIDS = 256  # width of the timestep's sinusoids, fixed in the class
MLP_RATIO = 4  # fixed in the class
MARK = "__index_timestep_zero__"

FACTS = ConfigFacts(
    "QwenImageTransformer2DModel",
    keys=(
        "patch_size", "in_channels", "out_channels", "num_layers", "attention_head_dim", "num_attention_heads",
        "joint_attention_dim", "guidance_embeds", "axes_dims_rope", "zero_cond_t", "use_additional_t_cond",
        "use_layer3d_rope",
    ),
    needed=("axes_dims_rope", "zero_cond_t", "use_layer3d_rope"),
    defaults={"axes_dims_rope": [16, 56, 56], "zero_cond_t": False, "use_layer3d_rope": False},
    assumed={"guidance_embeds": False},  # the class has it and does nothing with it
)  # fmt: skip


def infer_config(header: Header, config: Mapping[str, Any]) -> dict[str, Any]:
    """The full config; `_marked` says whether the file has the mark, which stands for `zero_cond_t`.

    `patch_size` only divides the last layer's rows; where it is not given, it is the releases' own.

    Raises:
        RecipeError: a key is missing, unknown or contradicts the tensors.
    """
    hidden, in_channels = tensor_shape(header, "img_in.weight", 2)
    (head,) = tensor_shape(header, "transformer_blocks.0.attn.norm_q.weight", 1)
    rows, patch = tensor_shape(header, "proj_out.weight", 2)[0], config.get("patch_size", 2)
    if not head or hidden % head or type(patch) is not int or patch < 1 or rows % patch**2:
        raise RecipeError(
            "the heads do not fill the width, or the patches the last layer",
            expected=f"a width that {head} divides, and rows that {patch} x {patch} divides",
            found=f"{hidden} and {rows}",
        )  # fmt: skip
    marked = {"zero_cond_t": True} if MARK in header else {}
    full = FACTS.complete({**marked, **config}, {
        "patch_size": patch,
        "in_channels": in_channels,
        "out_channels": rows // patch**2,
        "num_layers": count_blocks(header, "transformer_blocks"),
        "attention_head_dim": head,
        "num_attention_heads": hidden // head,
        "joint_attention_dim": tensor_shape(header, "txt_in.weight", 2)[1],
        "use_additional_t_cond": _LAYERS in header,
        **marked,
    })  # fmt: skip
    FACTS.check_axes(full, "axes_dims_rope", head)
    return full | {"_marked": bool(marked)}


def parameters(config: Mapping[str, Any]) -> dict[str, int]:
    """Flags that the rules use."""
    return {"marked": int(bool(config.get("_marked"))), "layered": int(bool(config["use_additional_t_cond"]))}


def diffusers_headers(config: Mapping[str, Any], dtype: str = ANY) -> dict[str, TensorInfo]:
    """All tensors of QwenImageTransformer2DModel for its config."""
    d, text = config["attention_head_dim"], config["joint_attention_dim"]
    h = config["num_attention_heads"] * d
    shapes: Shapes = linear("time_text_embed.timestep_embedder.linear_1", h, SINUSOIDS)
    shapes |= linear("time_text_embed.timestep_embedder.linear_2", h, h)
    shapes |= {_LAYERS: (2, h)} if config["use_additional_t_cond"] else {}
    shapes |= (
        norm("txt_norm", text, bias=False) | linear("txt_in", h, text) | linear("img_in", h, config["in_channels"])
    )
    for i in range(config["num_layers"]):
        at = f"transformer_blocks.{i}"
        for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"):
            shapes |= linear(f"{at}.attn.{name}", h, h)
        for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            shapes |= norm(f"{at}.attn.{name}", d, bias=False)
        for stream in ("img", "txt"):
            shapes |= linear(f"{at}.{stream}_mod.1", 6 * h, h)
            shapes |= linear(f"{at}.{stream}_mlp.net.0.proj", MLP_RATIO * h, h)
            shapes |= linear(f"{at}.{stream}_mlp.net.2", h, MLP_RATIO * h)
    rows = config["patch_size"] ** 2 * config["out_channels"]
    return specs(shapes | linear("norm_out.linear", 2 * h, h) | linear("proj_out", rows, h), dtype)


def single_file_headers(config: Mapping[str, Any], dtype: str = ANY) -> dict[str, TensorInfo]:
    """The same, with the mark where the file has it."""
    marked = specs({MARK: (0,)}, dtype) if config.get("_marked") else {}
    return {**diffusers_headers(config, dtype), **marked}


_LAYERS = "time_text_embed.addition_t_embedding.weight"
_P, _B, _T = "{p:weight|bias}", "transformer_blocks.{i:int}.", "transformer_blocks.{i}."
_KEPT = "the name is the same in both"

TRANSFORMER = Recipe(
    name="qwen-image-transformer",
    source_layout="single-file",
    target_layout="diffusers",
    rules=(
        Rule(MARK, (), (Drop("a mark without numbers; the config says zero_cond_t"),), when="marked"),
        Rule(
            "time_text_embed.timestep_embedder.linear_{j:1|2}." + _P,
            "time_text_embed.timestep_embedder.linear_{j}.{p}", (), _KEPT,
        ),
        Rule(_LAYERS, _LAYERS, (), _KEPT, "layered"),
        Rule("txt_norm.weight", "txt_norm.weight", (), _KEPT),
        Rule("{e:txt_in|img_in|norm_out.linear|proj_out}." + _P, "{e}.{p}", (), _KEPT),
        Rule(_B + "attn.to_{x:q|k|v|out.0|add_out}." + _P, _T + "attn.to_{x}.{p}", (), _KEPT),
        Rule(_B + "attn.add_{x:q|k|v}_proj." + _P, _T + "attn.add_{x}_proj.{p}", (), _KEPT),
        Rule(_B + "attn.norm_{x:q|k|added_q|added_k}.weight", _T + "attn.norm_{x}.weight", (), _KEPT),
        Rule(_B + "{s:img|txt}_mod.1." + _P, _T + "{s}_mod.1.{p}", (), _KEPT),
        Rule(_B + "{s:img|txt}_mlp.net.{l:0.proj|2}." + _P, _T + "{s}_mlp.net.{l}.{p}", (), _KEPT),
    ),
    parameters=parameters,
    source_headers=single_file_headers,
    target_headers=diffusers_headers,
    infer_config=infer_config,
)  # fmt: skip

_PACKED = "one product reads the input once"

ON_LOAD = on_load(
    "qwen-image-on-load",
    Rule(
        (_B + "attn.to_q." + _P, _T + "attn.to_k.{p}", _T + "attn.to_v.{p}"),
        _T + "attn.to_qkv.{p}", (Concat(),), _PACKED, shard=OUTPUTS,
    ),
    Rule(
        (_B + "attn.add_q_proj." + _P, _T + "attn.add_k_proj.{p}", _T + "attn.add_v_proj.{p}"),
        _T + "attn.add_qkv_proj.{p}", (Concat(),), _PACKED, shard=OUTPUTS,
    ),
    Rule(_B + "attn.{o:to_out.0|to_add_out}." + _P, _T + "attn.{o}.{p}", shard=INPUTS),
    Rule(_B + "{s:img|txt}_mlp.net.0.proj." + _P, _T + "{s}_mlp.net.0.proj.{p}", shard=OUTPUTS),
    Rule(_B + "{s:img|txt}_mlp.net.2." + _P, _T + "{s}_mlp.net.2.{p}", shard=INPUTS),
)  # fmt: skip
