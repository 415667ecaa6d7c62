"""CLIP's text encoders: open_clip's layout ↔ transformers', and files that have transformers' own names.

Original: https://github.com/mlfoundations/open_clip/blob/89fb801f1e6087880e951fc8354b8a2077b79c6d/src/open_clip/model.py

Three recipes share this file:

    WITH_PROJECTION   the whole tower → CLIPTextModelWithProjection (Stable Diffusion XL's second encoder)
    PENULTIMATE       the tower without its last layer → CLIPTextModel (Stable Diffusion 2.x reads the one before)
    KEPT              transformers' names, as inside checkpoints of Stable Diffusion 1.x and XL → CLIPTextModel

Targets have the names of released files, all behind `text_model.`; transformers 5 leaves that out of CLIPTextModel in
memory and of what it saves, and reads both.

    h width · n layers of the target
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from conversions.common.shapes import Shapes, linear, norm
from porter.core.checkpoint import ANY, Header, TensorInfo, specs
from porter.core.configs import ConfigFacts
from porter.core.errors import RecipeError
from porter.core.ops import Drop, Split, Transpose
from porter.core.patterns import count_blocks
from porter.core.recipe import Recipe, Rule, tensor_shape

Config = Mapping[str, Any]

TEXT, PROJECTED = "CLIPTextModel", "CLIPTextModelWithProjection"
_MERGED = (
    "transformer.text_model.embeddings.position_ids"  # what some mergers of checkpoints add to open_clip's tensors
)
_UNUSED = "_unused"  # private key of a config: name -> shape of what a file has and the target's class does not
# What a config.json of transformers says besides: of its making, and (`dropout`) of no class today.
_ASIDE = ("architectures", "torch_dtype", "dtype", "transformers_version", "dropout")
_CLASS_DEFAULTS = {
    "num_attention_heads": 8, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "eos_token_id": 49407,
    "bos_token_id": 49406,
}  # fmt: skip


def _facts(class_name: str) -> ConfigFacts:
    """`eos_token_id` chooses whose output is pooled: 2 means the highest id's, as open_clip does it."""
    return ConfigFacts(
        class_name,
        keys=(
            "vocab_size", "hidden_size", "intermediate_size", "projection_dim", "num_hidden_layers",
            "num_attention_heads", "max_position_embeddings", "hidden_act", "layer_norm_eps", "attention_dropout",
            "initializer_range", "initializer_factor", "pad_token_id", "bos_token_id", "eos_token_id", "model_type",
        ),
        needed=("num_attention_heads", "hidden_act", "layer_norm_eps", "eos_token_id"),
        defaults=_CLASS_DEFAULTS,
        assumed={
            "attention_dropout": 0.0, "initializer_range": 0.02, "initializer_factor": 1.0, "pad_token_id": 1,
            "bos_token_id": 0, "projection_dim": 512,
        },
        aliases={"heads": "num_attention_heads"},
    )  # fmt: skip


FACTS = {TEXT: _facts(TEXT), PROJECTED: _facts(PROJECTED)}


def _complete(class_name: str, given: Config, seen: Config, unused: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The full config: `seen` in the tensors, and the rest given; `unused` beside it."""
    if stated := given.get("architectures"):
        given = {**given, "_class_name": stated[0] if isinstance(stated, list) else stated}
    elif "model_type" in given:
        given = {**given, "_class_name": class_name}
    named = {key: value for key, value in given.items() if key not in _ASIDE}
    full = FACTS[class_name].complete(named, {**seen, "model_type": "clip_text_model"})
    heads = full["num_attention_heads"]
    if type(heads) is not int or heads < 1 or full["hidden_size"] % heads:
        raise RecipeError(
            f"{class_name}: the heads do not fill the width", expected=f"a divisor of {full['hidden_size']}",
            found=f"num_attention_heads: {heads!r}", hint="give the right one with --config FILE",
        )  # fmt: skip
    return full | ({_UNUSED: {name: list(shape) for name, shape in unused.items()}} if unused else {})


def _infer_open_clip(class_name: str, last: int) -> Callable[[Header, Config], dict[str, Any]]:
    """`last`: how many layers at the end are left out."""

    def infer_config(header: Header, config: Config) -> dict[str, Any]:
        """The full config; how many heads there are, the activation and the pooling stand in no tensor.

        Raises:
            RecipeError: a key is missing, unknown or contradicts the tensors.
        """
        vocabulary, width = tensor_shape(header, "token_embedding.weight", 2)
        layers = count_blocks(header, "transformer.resblocks") - last
        if layers < 1:
            raise RecipeError("too few layers", expected=f"{1 + last} or more", found=f"{layers + last}")
        seen = {
            "vocab_size": vocabulary,
            "hidden_size": width,
            "intermediate_size": tensor_shape(header, "transformer.resblocks.0.mlp.c_fc.weight", 2)[0],
            "num_hidden_layers": layers,
            "max_position_embeddings": tensor_shape(header, "positional_embedding", 2)[0],
        }
        images = (name for name in header if name.startswith("visual."))
        aside = ["logit_scale", "text_projection", _MERGED, *images]
        if class_name == PROJECTED:
            seen["projection_dim"] = tensor_shape(header, "text_projection", 2)[1]
            aside.remove("text_projection")
        return _complete(class_name, config, seen, {name: header[name].shape for name in aside if name in header})

    return infer_config


def _infer_kept(header: Header, config: Config) -> dict[str, Any]:
    """The full config of CLIPTextModel, by tensors of its own names.

    Raises:
        RecipeError: a key is missing, unknown or contradicts the tensors.
    """
    vocabulary, width = tensor_shape(header, "text_model.embeddings.token_embedding.weight", 2)
    seen = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": tensor_shape(header, "text_model.encoder.layers.0.mlp.fc1.weight", 2)[0],
        "num_hidden_layers": count_blocks(header, "text_model.encoder.layers"),
        "max_position_embeddings": tensor_shape(header, "text_model.embeddings.position_embedding.weight", 2)[0],
    }
    buffer = "text_model.embeddings.position_ids"
    return _complete(TEXT, config, seen, {buffer: header[buffer].shape} if buffer in header else {})


def _parameters(config: Config) -> dict[str, int]:
    """The numbers that the rules use; all but `h` and `n` are flags."""
    unused = config.get(_UNUSED, {})
    return {
        "h": config["hidden_size"], "n": config["num_hidden_layers"], "scale": int("logit_scale" in unused),
        "projection": int("text_projection" in unused),
        "positions": int("text_model.embeddings.position_ids" in unused or _MERGED in unused),
        "images": int(any(name.startswith("visual.") for name in unused)),
    }  # fmt: skip


def _open_clip_headers(projected: bool, last: int) -> Callable[..., dict[str, TensorInfo]]:
    def original_headers(config: Config, dtype: str = ANY) -> dict[str, TensorInfo]:
        """All tensors of open_clip's text tower."""
        h, f = config["hidden_size"], config["intermediate_size"]
        shapes: Shapes = {"positional_embedding": (config["max_position_embeddings"], h)}
        shapes |= {"text_projection": (h, config["projection_dim"])} if projected else {}
        for i in range(config["num_hidden_layers"] + last):
            at = f"transformer.resblocks.{i}"
            shapes |= norm(f"{at}.ln_1", h) | {f"{at}.attn.in_proj_weight": (3 * h, h)}
            shapes |= {f"{at}.attn.in_proj_bias": (3 * h,)} | linear(f"{at}.attn.out_proj", h, h)
            shapes |= norm(f"{at}.ln_2", h) | linear(f"{at}.mlp.c_fc", f, h) | linear(f"{at}.mlp.c_proj", h, f)
        shapes |= {"token_embedding.weight": (config["vocab_size"], h)} | norm("ln_final", h)
        return specs(shapes | _unused(config), dtype)

    return original_headers


def _kept_headers(config: Config, dtype: str = ANY) -> dict[str, TensorInfo]:
    """All tensors of CLIPTextModel, with a buffer that older versions of transformers saved."""
    return {**_transformers_headers(False)(config, dtype), **specs(_unused(config), dtype)}


def _unused(config: Config) -> Shapes:
    return {name: tuple(shape) for name, shape in config.get(_UNUSED, {}).items()}


def _transformers_headers(projected: bool) -> Callable[..., dict[str, TensorInfo]]:
    def transformers_headers(config: Config, dtype: str = ANY) -> dict[str, TensorInfo]:
        """All tensors of transformers' class, as released files name them."""
        h, f = config["hidden_size"], config["intermediate_size"]
        at = "text_model.embeddings"
        shapes: Shapes = {f"{at}.token_embedding.weight": (config["vocab_size"], h)}
        shapes |= {f"{at}.position_embedding.weight": (config["max_position_embeddings"], h)}
        for i in range(config["num_hidden_layers"]):
            at = f"text_model.encoder.layers.{i}"
            for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
                shapes |= linear(f"{at}.self_attn.{name}", h, h)
            shapes |= norm(f"{at}.layer_norm1", h) | linear(f"{at}.mlp.fc1", f, h) | linear(f"{at}.mlp.fc2", h, f)
            shapes |= norm(f"{at}.layer_norm2", h)
        shapes |= norm("text_model.final_layer_norm", h)
        return specs(shapes | ({"text_projection.weight": (config["projection_dim"], h)} if projected else {}), dtype)

    return transformers_headers


_P = "{p:weight|bias}"
_B, _LAST, _T = (
    "transformer.resblocks.{i:int<n}.",
    "transformer.resblocks.{i:int==n}.",
    "text_model.encoder.layers.{i}.",
)
_WHOLE = "{l:ln_1|ln_2|attn.out_proj|mlp.c_fc|mlp.c_proj}." + _P
_FUSED = "the original computes q, k and v with one matrix, stacked in this order"
_TURNED = "the original multiplies by the matrix from the right, a linear layer by its transpose"
_IMAGES = "the image tower: texts are encoded without it"
_SCALE = "logit_scale: compares texts with images, and no text's encoding depends on it"
_COUNTS = "position_ids: a buffer that counts from 0"
_BEFORE = "the last layer: the model reads the output of the one before"


def _open_clip_rules(projected: bool) -> Iterator[Rule]:
    yield Rule("token_embedding.weight", "text_model.embeddings.token_embedding.weight")
    yield Rule("positional_embedding", "text_model.embeddings.position_embedding.weight")
    qkv = tuple(_T + f"self_attn.{name}_proj.{{p}}" for name in "qkv")
    yield Rule(_B + "attn.in_proj_{p:weight|bias}", qkv, (Split(("h", "h", "h")),), _FUSED)
    yield Rule(_B + f"attn.out_proj.{_P}", _T + "self_attn.out_proj.{p}")
    yield Rule(_B + "ln_{k:1|2}." + _P, _T + "layer_norm{k}.{p}")
    yield Rule(_B + "mlp.{l:c_fc=fc1|c_proj=fc2}." + _P, _T + "mlp.{l}.{p}")
    yield Rule(f"ln_final.{_P}", "text_model.final_layer_norm.{p}")
    yield Rule("logit_scale", (), (Drop(_SCALE),), when="scale")
    yield Rule(_MERGED, (), (Drop(_COUNTS),), when="positions")
    for name in (
        "{l:class_embedding|positional_embedding|proj|conv1.weight}", "ln_{k:pre|post}." + _P,
        "transformer.resblocks.{i:int}.attn.in_proj_{p:weight|bias}", "transformer.resblocks.{i:int}." + _WHOLE,
    ):  # fmt: skip
        yield Rule(f"visual.{name}", (), (Drop(_IMAGES),), when="images")
    if projected:
        yield Rule("text_projection", "text_projection.weight", (Transpose(),), _TURNED)
        return
    yield Rule("text_projection", (), (Drop("text_projection: only a pooled text is projected"),), when="projection")
    yield Rule(_LAST + "attn.in_proj_{p:weight|bias}", (), (Drop(_BEFORE),))
    yield Rule(_LAST + _WHOLE, (), (Drop(_BEFORE),))


def _open_clip(name: str, class_name: str, last: int) -> Recipe:
    projected = class_name == PROJECTED
    return Recipe(
        name=name, source_layout="original", target_layout="transformers", rules=tuple(_open_clip_rules(projected)),
        parameters=_parameters, source_headers=_open_clip_headers(projected, last),
        target_headers=_transformers_headers(projected), infer_config=_infer_open_clip(class_name, last),
    )  # fmt: skip


_LAYER = (
    "{l:self_attn.q_proj|self_attn.k_proj|self_attn.v_proj|self_attn.out_proj|layer_norm1|layer_norm2|mlp.fc1|mlp.fc2}"
)

WITH_PROJECTION = _open_clip("open-clip-text-with-projection", PROJECTED, 0)
PENULTIMATE = _open_clip("open-clip-text-penultimate", TEXT, 1)
KEPT = Recipe(
    name="clip-text",
    source_layout="original",
    target_layout="transformers",
    rules=(
        Rule(
            "text_model.embeddings.{e:token_embedding|position_embedding}.weight", "text_model.embeddings.{e}.weight",
            why="the same name",
        ),
        Rule("text_model.encoder.layers.{i:int}." + _LAYER + f".{_P}", _T + "{l}.{p}", why="the same name"),
        Rule(f"text_model.final_layer_norm.{_P}", "text_model.final_layer_norm.{p}", why="the same name"),
        Rule(
            "text_model.embeddings.position_ids", (), (Drop(_COUNTS),), when="positions",
        ),
    ),
    parameters=_parameters,
    source_headers=_kept_headers,
    target_headers=_transformers_headers(False),
    infer_config=_infer_kept,
)  # fmt: skip
