"""DiT: the original class-to-image transformer's layout ↔ diffusers' DiTTransformer2DModel.

Original: https://github.com/facebookresearch/DiT/blob/ed81ce2229091fd4ecc9a223645f95cf379d582b/models.py
The original has one embedder of times and one of classes; diffusers gives every block both. The class table has one row
more than classes: the last stands for no class.

diffusers computes two things otherwise than the original, and no config changes the first: the sinusoids of the time
(its frequencies fall to 1/10000, the original's to just above it), and the epsilon of a block's second norm, where this
recipe writes the original's.

    h width · n blocks
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from conversions.common.shapes import Shapes, conv, linear
from porter.core.checkpoint import ANY, Header, TensorInfo, specs
from porter.core.configs import ConfigFacts
from porter.core.errors import RecipeError
from porter.core.ops import Copy, Drop, Split
from porter.core.patterns import count_blocks
from porter.core.recipe import Recipe, Rule, tensor_shape

SINUSOIDS = 256  # width of the timestep's sinusoids, fixed in both
MLP_RATIO = 4  # fixed in diffusers
EPSILON = 1e-6  # of the original's norms

FACTS = ConfigFacts(
    "DiTTransformer2DModel",
    keys=(
        "num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "num_layers", "sample_size",
        "patch_size", "num_embeds_ada_norm", "norm_eps", "dropout", "norm_num_groups", "upcast_attention",
    ),
    needed=("num_attention_heads",),
    defaults={"num_attention_heads": 16},
    aliases={"num_heads": "num_attention_heads"},
    fixed={
        "attention_bias": True, "activation_fn": "gelu-approximate", "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False,
    },
)  # fmt: skip


def infer_config(header: Header, config: Mapping[str, Any]) -> dict[str, Any]:
    """The full config; how many heads the queries have is in no tensor and must be given.

    Raises:
        RecipeError: a key is missing, unknown or contradicts the tensors, or the tensors contradict each other.
    """
    hidden, channels, patch, _ = tensor_shape(header, "x_embedder.proj.weight", 4)
    places = tensor_shape(header, "pos_embed", 3)[1]
    side, heads = math.isqrt(places), config.get("num_attention_heads", config.get("num_heads"))
    if side * side != places or not patch:
        raise RecipeError("pos_embed is not a square of positions", expected="a square", found=f"{places}")
    if heads is not None and (type(heads) is not int or heads < 1 or hidden % heads):
        raise RecipeError(
            f"{FACTS.class_name}: num_attention_heads does not divide the width",
            expected=f"a divisor of {hidden}", found=f"num_attention_heads: {heads}",
            hint="porter convert … --config FILE, with num_attention_heads in it",
        )  # fmt: skip
    full = FACTS.complete({"norm_eps": EPSILON, **config}, {
        "in_channels": channels,
        "out_channels": tensor_shape(header, "final_layer.linear.weight", 2)[0] // patch**2,
        "num_layers": count_blocks(header, "blocks"),
        "sample_size": side * patch,
        "patch_size": patch,
        "num_embeds_ada_norm": tensor_shape(header, "y_embedder.embedding_table.weight", 2)[0] - 1,
        **({"attention_head_dim": hidden // heads} if heads else {}),
    })  # fmt: skip
    return full | {"attention_head_dim": hidden // full["num_attention_heads"]}


def parameters(config: Mapping[str, Any]) -> dict[str, int]:
    """The numbers that the rules use."""
    return {"h": config["num_attention_heads"] * config["attention_head_dim"], "n": config["num_layers"]}


def _sizes(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Width, rows of the class table, and rows of the last layer."""
    width: int = config["num_attention_heads"] * config["attention_head_dim"]
    return width, config["num_embeds_ada_norm"] + 1, config["patch_size"] ** 2 * config["out_channels"]


def original_headers(config: Mapping[str, Any], dtype: str = ANY) -> dict[str, TensorInfo]:
    """All tensors of the original layout."""
    (h, classes, out), patch = _sizes(config), config["patch_size"]
    shapes: Shapes = {"pos_embed": (1, (config["sample_size"] // patch) ** 2, h)}
    shapes |= conv("x_embedder.proj", h, config["in_channels"], patch, patch)
    shapes |= linear("t_embedder.mlp.0", h, SINUSOIDS) | linear("t_embedder.mlp.2", h, h)
    shapes |= {"y_embedder.embedding_table.weight": (classes, h)}
    for i in range(config["num_layers"]):
        at = f"blocks.{i}"
        shapes |= linear(f"{at}.attn.qkv", 3 * h, h) | linear(f"{at}.attn.proj", h, h)
        shapes |= linear(f"{at}.mlp.fc1", MLP_RATIO * h, h) | linear(f"{at}.mlp.fc2", h, MLP_RATIO * h)
        shapes |= linear(f"{at}.adaLN_modulation.1", 6 * h, h)
    shapes |= linear("final_layer.linear", out, h) | linear("final_layer.adaLN_modulation.1", 2 * h, h)
    return specs(shapes, dtype)


def diffusers_headers(config: Mapping[str, Any], dtype: str = ANY) -> dict[str, TensorInfo]:
    """All tensors of DiTTransformer2DModel for its config."""
    (h, classes, out), patch = _sizes(config), config["patch_size"]
    shapes: Shapes = conv("pos_embed.proj", h, config["in_channels"], patch, patch)
    for i in range(config["num_layers"]):
        at = f"transformer_blocks.{i}"
        shapes |= linear(f"{at}.norm1.emb.timestep_embedder.linear_1", h, SINUSOIDS)
        shapes |= linear(f"{at}.norm1.emb.timestep_embedder.linear_2", h, h)
        shapes |= {f"{at}.norm1.emb.class_embedder.embedding_table.weight": (classes, h)}
        shapes |= linear(f"{at}.norm1.linear", 6 * h, h)
        for name in ("to_q", "to_k", "to_v", "to_out.0"):
            shapes |= linear(f"{at}.attn1.{name}", h, h)
        shapes |= linear(f"{at}.ff.net.0.proj", MLP_RATIO * h, h) | linear(f"{at}.ff.net.2", h, MLP_RATIO * h)
    return specs(shapes | linear("proj_out_1", 2 * h, h) | linear("proj_out_2", out, h), dtype)


_P, _B, _T = "{p:weight|bias}", "blocks.{i:int}.", "transformer_blocks.{i}."
_TABLE = "embedding_table.weight"
_EACH = "transformer_blocks.{i:each n}.norm1.emb."
_SHARED = "the original has one embedder for all blocks"

TRANSFORMER = Recipe(
    name="dit-transformer",
    source_layout="original",
    target_layout="diffusers",
    rules=(
        Rule("pos_embed", (), (Drop("sines and cosines of the patches' places, not trained; diffusers makes them"),)),
        Rule(f"x_embedder.proj.{_P}", "pos_embed.proj.{p}"),
        Rule("t_embedder.mlp.{j:0=1|2=2}." + _P, _EACH + "timestep_embedder.linear_{j}.{p}", (Copy("n"),), _SHARED),
        Rule(f"y_embedder.{_TABLE}", f"{_EACH}class_embedder.{_TABLE}", (Copy("n"),), _SHARED),
        Rule(f"{_B}adaLN_modulation.1.{_P}", _T + "norm1.linear.{p}"),
        Rule(
            f"{_B}attn.qkv.{_P}", (_T + "attn1.to_q.{p}", _T + "attn1.to_k.{p}", _T + "attn1.to_v.{p}"),
            (Split(("h", "h", "h")),), "the original computes q, k and v with one matrix, stacked in this order",
        ),
        Rule(f"{_B}attn.proj.{_P}", _T + "attn1.to_out.0.{p}"),
        Rule(_B + "mlp.{f:fc1=0.proj|fc2=2}." + _P, _T + "ff.net.{f}.{p}"),
        Rule(f"final_layer.adaLN_modulation.1.{_P}", "proj_out_1.{p}"),
        Rule(f"final_layer.linear.{_P}", "proj_out_2.{p}"),
    ),
    parameters=parameters,
    source_headers=original_headers,
    target_headers=diffusers_headers,
    infer_config=infer_config,
)  # fmt: skip
