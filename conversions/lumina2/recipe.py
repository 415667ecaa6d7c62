"""The transformer of Lumina-Image 2.0: the original NextDiT's layout ↔ diffusers' Lumina2Transformer2DModel.

Original: https://github.com/Alpha-VLLM/Lumina-Image-2.0/blob/4a4d6f856115db07e8ae127280ebcc3d9f65004e/models/model.py
diffusers fixes 1e-5 in the norms of q and k: so has the original with apex; its own norm, taken without apex, has 1e-6.

norm_final is a parameter that the original asks for when it loads, and never runs; diffusers has none. So a file made
from diffusers' alone lacks it; with `--base` it comes back.

    h width · kv width of all keys, or of all values · f width of the feed-forward · t width of the time's embedding
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conversions.common.shapes import Shapes, linear, norm
from porter.core.checkpoint import ANY, Header, TensorInfo, specs
from porter.core.configs import ConfigFacts
from porter.core.errors import RecipeError
from porter.core.ops import Drop, Split
from porter.core.patterns import count_blocks
from porter.core.recipe import Recipe, Rule, tensor_shape

SINUSOIDS = 256  # width of the timestep's sinusoids, fixed in both
TIME = 1024  # the most that the time's embedding is wide, fixed in both
MLP_RATIO = 4  # fixed in both

FACTS = ConfigFacts(
    "Lumina2Transformer2DModel",
    keys=(
        "sample_size", "patch_size", "in_channels", "out_channels", "hidden_size", "num_layers", "num_refiner_layers",
        "num_attention_heads", "num_kv_heads", "multiple_of", "ffn_dim_multiplier", "norm_eps", "scaling_factor",
        "axes_dim_rope", "axes_lens", "cap_feat_dim",
    ),
    needed=("patch_size", "norm_eps", "axes_dim_rope"),
    defaults={"patch_size": 2, "norm_eps": 1e-5, "axes_dim_rope": [32, 32, 32]},
    assumed={
        "sample_size": 128, "scaling_factor": 1.0, "axes_lens": [300, 512, 512],
        "multiple_of": 256, "ffn_dim_multiplier": None,  # only their product counts, and the tensors show it
    },
    aliases={
        "dim": "hidden_size", "n_layers": "num_layers", "n_refiner_layers": "num_refiner_layers",
        "n_heads": "num_attention_heads", "n_kv_heads": "num_kv_heads", "axes_dims": "axes_dim_rope",
    },
    fixed={"qk_norm": True},
)  # fmt: skip
RELEASED = {2304: {"patch_size": 2, "norm_eps": 1e-5, "axes_dim_rope": [32, 32, 32]}}


def infer_config(header: Header, config: Mapping[str, Any]) -> dict[str, Any]:
    """The full config: the patch's side, the rotary axes and epsilon must be given; `_norm_final`: the file has it.

    Raises:
        RecipeError: a key is missing, unknown or contradicts the tensors, or the tensors contradict each other.
    """
    hidden, columns = tensor_shape(header, "x_embedder.weight", 2)
    (head,) = tensor_shape(header, "layers.0.attention.q_norm.weight", 1)
    rows = tensor_shape(header, "layers.0.attention.qkv.weight", 2)[0]
    inner = tensor_shape(header, "layers.0.feed_forward.w1.weight", 2)[0]
    heads = hidden // head if head else 0
    kv_heads = (rows - hidden) // (2 * head) if head else 0
    if heads * head != hidden or kv_heads < 1 or hidden + 2 * kv_heads * head != rows or heads % kv_heads:
        raise RecipeError(
            "the heads do not fill the queries, or the groups of keys and values not the heads",
            expected=f"widths that {head} divides, and a divisor of the heads",
            found=f"width {hidden}, {rows} rows of queries, keys and values",
        )  # fmt: skip
    patch = FACTS.complete(config, {}, RELEASED.get(hidden))["patch_size"]
    if type(patch) is not int or patch < 1 or columns % patch**2:
        raise RecipeError(
            f"{FACTS.class_name}: patch_size does not fit the tensors",
            expected=f"a side whose square divides {columns}", found=f"patch_size: {patch}",
            hint="porter convert … --config FILE, with patch_size in it",
        )  # fmt: skip
    channels = columns // patch**2
    full = FACTS.complete(_told(config, channels, heads), {
        "in_channels": channels,
        "out_channels": channels,
        "hidden_size": hidden,
        "num_layers": count_blocks(header, "layers"),
        "num_refiner_layers": count_blocks(header, "noise_refiner"),
        "num_attention_heads": heads,
        "num_kv_heads": kv_heads,
        "cap_feat_dim": tensor_shape(header, "cap_embedder.0.weight", 1)[0],
    })  # fmt: skip
    _check(full, head, inner)
    return full | {"_norm_final": "norm_final.weight" in header}


def _told(config: Mapping[str, Any], channels: int, heads: int) -> dict[str, Any]:
    """The config with what null means there: as many channels out as in, as many key and value heads as heads."""
    meant = {"out_channels": channels, "num_kv_heads": heads, "n_kv_heads": heads}
    return {key: meant[key] if value is None and key in meant else value for key, value in config.items()}


def _check(full: Mapping[str, Any], head: int, inner: int) -> None:
    """Refuse rotary axes that do not fill a head, and a feed-forward of another width than the tensors'."""
    FACTS.check_axes(full, "axes_dim_rope", head)
    multiple, factor = full["multiple_of"], full["ffn_dim_multiplier"]
    known = type(multiple) is int and multiple > 0 and (factor is None or type(factor) in (int, float))
    found = _inner(full) if known and abs(factor or 1) < 2**16 else None
    if found != inner:
        raise RecipeError(
            f"{FACTS.class_name}: multiple_of and ffn_dim_multiplier do not make the feed-forward's width",
            expected=f"{inner}, as the tensors have", found=f"{found} from {multiple} and {factor}",
            hint="porter convert … --config FILE, with multiple_of and ffn_dim_multiplier in it",
        )  # fmt: skip


def _inner(config: Mapping[str, Any]) -> int:
    """The width of the feed-forward, as both codes compute it."""
    width, factor, multiple = MLP_RATIO * config["hidden_size"], config["ffn_dim_multiplier"], config["multiple_of"]
    inner = width if factor is None else int(factor * width)
    return int(-(-inner // multiple) * multiple)


def _kv(config: Mapping[str, Any]) -> int:
    """The width of all key heads."""
    return int(config["hidden_size"] // config["num_attention_heads"] * config["num_kv_heads"])


def parameters(config: Mapping[str, Any]) -> dict[str, int]:
    """The numbers that the rules use; `refined` and `norm_final` are flags."""
    return {
        "h": config["hidden_size"], "kv": _kv(config), "refined": int(config["num_refiner_layers"] > 0),
        "norm_final": int(bool(config.get("_norm_final"))),
    }  # fmt: skip


def _blocks(config: Mapping[str, Any]) -> list[tuple[str, bool]]:
    """Every block's path, and whether the time modulates it."""
    kinds = (("noise_refiner", True), ("context_refiner", False))
    found = [(f"{name}.{i}", on) for name, on in kinds for i in range(config["num_refiner_layers"])]
    return found + [(f"layers.{i}", True) for i in range(config["num_layers"])]


def original_headers(config: Mapping[str, Any], dtype: str = ANY) -> dict[str, TensorInfo]:
    """All tensors of the original layout."""
    h, kv, f, t = config["hidden_size"], _kv(config), _inner(config), min(config["hidden_size"], TIME)
    patch, head = config["patch_size"] ** 2, config["hidden_size"] // config["num_attention_heads"]
    shapes: Shapes = linear("x_embedder", h, patch * config["in_channels"])
    shapes |= linear("t_embedder.mlp.0", t, SINUSOIDS) | linear("t_embedder.mlp.2", t, t)
    shapes |= norm("cap_embedder.0", config["cap_feat_dim"], bias=False)
    shapes |= linear("cap_embedder.1", h, config["cap_feat_dim"])
    for at, modulated in _blocks(config):
        shapes |= linear(f"{at}.attention.qkv", h + 2 * kv, h, bias=False)
        shapes |= linear(f"{at}.attention.out", h, h, bias=False)
        for name in ("q_norm", "k_norm"):
            shapes |= norm(f"{at}.attention.{name}", head, bias=False)
        for name, rows, columns in (("w1", f, h), ("w2", h, f), ("w3", f, h)):
            shapes |= linear(f"{at}.feed_forward.{name}", rows, columns, bias=False)
        for name in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"):
            shapes |= norm(f"{at}.{name}", h, bias=False)
        shapes |= linear(f"{at}.adaLN_modulation.1", 4 * h, t) if modulated else {}
    shapes |= norm("norm_final", h, bias=False) if config.get("_norm_final") else {}
    shapes |= linear("final_layer.linear", patch * config["out_channels"], h)
    return specs(shapes | linear("final_layer.adaLN_modulation.1", h, t), dtype)


def diffusers_headers(config: Mapping[str, Any], dtype: str = ANY) -> dict[str, TensorInfo]:
    """All tensors of Lumina2Transformer2DModel for its config."""
    h, kv, f, t = config["hidden_size"], _kv(config), _inner(config), min(config["hidden_size"], TIME)
    patch, head = config["patch_size"] ** 2, config["hidden_size"] // config["num_attention_heads"]
    shapes: Shapes = linear("x_embedder", h, patch * config["in_channels"])
    for name, columns in (("linear_1", SINUSOIDS), ("linear_2", t)):
        shapes |= linear(f"time_caption_embed.timestep_embedder.{name}", t, columns)
    shapes |= norm("time_caption_embed.caption_embedder.0", config["cap_feat_dim"], bias=False)
    shapes |= linear("time_caption_embed.caption_embedder.1", h, config["cap_feat_dim"])
    for at, modulated in _blocks(config):
        for name, rows in (("to_q", h), ("to_k", kv), ("to_v", kv), ("to_out.0", h)):
            shapes |= linear(f"{at}.attn.{name}", rows, h, bias=False)
        for name in ("norm_q", "norm_k"):
            shapes |= norm(f"{at}.attn.{name}", head, bias=False)
        for name, rows, columns in (("linear_1", f, h), ("linear_2", h, f), ("linear_3", f, h)):
            shapes |= linear(f"{at}.feed_forward.{name}", rows, columns, bias=False)
        for name in ("norm1.norm" if modulated else "norm1", "norm2", "ffn_norm1", "ffn_norm2"):
            shapes |= norm(f"{at}.{name}", h, bias=False)
        shapes |= linear(f"{at}.norm1.linear", 4 * h, t) if modulated else {}
    shapes |= linear("norm_out.linear_1", h, t)
    return specs(shapes | linear("norm_out.linear_2", patch * config["out_channels"], h), dtype)


_P = "{p:weight|bias}"
_BLOCK, _AT = "{b:layers|noise_refiner|context_refiner}.{i:int}.", "{b}.{i}."
_TIMED = "{b:layers|noise_refiner}.{i:int}."  # the time modulates these

TRANSFORMER = Recipe(
    name="lumina2-transformer",
    source_layout="original",
    target_layout="diffusers",
    rules=(
        Rule(f"x_embedder.{_P}", "x_embedder.{p}"),
        Rule("t_embedder.mlp.{j:0=1|2=2}." + _P, "time_caption_embed.timestep_embedder.linear_{j}.{p}"),
        Rule("cap_embedder.{j:0|1}." + _P, "time_caption_embed.caption_embedder.{j}.{p}"),
        Rule(
            f"{_BLOCK}attention.qkv.weight", tuple(f"{_AT}attn.to_{x}.weight" for x in "qkv"),
            (Split(("h", "kv", "kv")),),
            "the original computes q, k and v with one matrix; several heads of q share one of k and v",
        ),
        Rule(_BLOCK + "attention.{x:q|k}_norm.weight", _AT + "attn.norm_{x}.weight"),
        Rule(f"{_BLOCK}attention.out.weight", f"{_AT}attn.to_out.0.weight"),
        Rule(_BLOCK + "feed_forward.w{j:1|2|3}.weight", _AT + "feed_forward.linear_{j}.weight"),
        Rule(_BLOCK + "ffn_norm{j:1|2}.weight", _AT + "ffn_norm{j}.weight"),
        Rule(f"{_TIMED}attention_norm1.weight", f"{_AT}norm1.norm.weight"),
        Rule("context_refiner.{i:int}.attention_norm1.weight", "context_refiner.{i}.norm1.weight", when="refined"),
        Rule(f"{_BLOCK}attention_norm2.weight", f"{_AT}norm2.weight"),
        Rule(f"{_TIMED}adaLN_modulation.1.{_P}", _AT + "norm1.linear.{p}"),
        Rule(f"final_layer.adaLN_modulation.1.{_P}", "norm_out.linear_1.{p}"),
        Rule(f"final_layer.linear.{_P}", "norm_out.linear_2.{p}"),
        Rule(
            "norm_final.weight", (), (Drop("norm_final: the original has it and does not run it"),),
            when="norm_final",
        ),
    ),
    parameters=parameters,
    source_headers=original_headers,
    target_headers=diffusers_headers,
    infer_config=infer_config,
)  # fmt: skip
