"""Z-Image's transformer: the original code's layout and the single file's ↔ diffusers' ZImageTransformer2DModel.

Original: https://github.com/Tongyi-MAI/Z-Image/blob/c7ec13578cc27b01d547e1b3c62bc8b95bc6cb6e/src/zimage/transformer.py
Its names and shapes are diffusers' own, so that a bare file of it lacks nothing but a config.json. diffusers fixes two
of its facts: as many key and value heads as heads, and 1e-5 in the norms of queries and keys.

Single file: the layout that ComfyUI's NextDiT reads. Queries, keys and values are one matrix, the one patch size has no
name, and the unused norm_final of its ancestor Lumina stands in some files.

    h width · L, R how many layers and refiners
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conversions.common.shapes import Shapes, linear, norm
from porter.core.checkpoint import ANY, Header, TensorInfo, specs
from porter.core.configs import ConfigFacts
from porter.core.errors import RecipeError
from porter.core.onload import on_load
from porter.core.ops import Concat, Drop, Split
from porter.core.patterns import count_blocks
from porter.core.recipe import INPUTS, OUTPUTS, Recipe, Rule, tensor_shape

SINUSOIDS, MIDDLE = 256, 1024  # of the timestep's embedder, fixed in both
CONDITION = 256  # the most that the modulations are made of, fixed in both
PATCH = (2, 1)  # side and frames of a single file's patches, fixed in its readers

FACTS = ConfigFacts(
    "ZImageTransformer2DModel",
    keys=(
        "all_patch_size", "all_f_patch_size", "in_channels", "dim", "n_layers", "n_refiner_layers", "n_heads",
        "n_kv_heads", "norm_eps", "qk_norm", "cap_feat_dim", "siglip_feat_dim", "rope_theta", "t_scale", "axes_dims",
        "axes_lens",
    ),
    needed=("norm_eps", "rope_theta", "t_scale", "axes_dims"),
    defaults={"norm_eps": 1e-5, "rope_theta": 256.0, "t_scale": 1000.0, "axes_dims": [32, 48, 48],
              "axes_lens": [1024, 512, 512]},
    assumed={"axes_lens": [1536, 512, 512]},
)  # fmt: skip


def infer_config(header: Header, config: Mapping[str, Any]) -> dict[str, Any]:
    """The full config from the original's names; the rotary embedding, the time's scale and epsilon must be given.

    Raises:
        RecipeError: a key is missing, unknown or contradicts the tensors, or the tensors contradict each other.
    """
    sizes = [name.split(".")[1] for name in header if name.startswith("all_x_embedder.") and name.endswith(".weight")]
    pairs = [tuple(int(part) for part in size.split("-")) for size in sizes if size.replace("-", "").isdigit()]
    if not pairs or any(len(pair) != 2 or not min(pair) for pair in pairs):
        raise RecipeError("no embedder of patches", expected="all_x_embedder.2-1.weight", found=", ".join(sizes))
    ((patch, frames), name) = pairs[0], sizes[0]
    head = "layers.0.attention.norm_q.weight"
    return _config(header, config, head, f"all_x_embedder.{name}.weight", patch**2 * frames, {
        "all_patch_size": [pair[0] for pair in pairs], "all_f_patch_size": [pair[1] for pair in pairs],
    })  # fmt: skip


def infer_single_file(header: Header, config: Mapping[str, Any]) -> dict[str, Any]:
    """The same from a single file's names; `_norm_final` says whether it has the unused norm.

    Raises:
        RecipeError: as `infer_config`.
    """
    side, frames = PATCH
    seen = {"all_patch_size": [side], "all_f_patch_size": [frames]}
    full = _config(header, config, "layers.0.attention.q_norm.weight", "x_embedder.weight", side**2 * frames, seen)
    return full | {"_norm_final": "norm_final.weight" in header}


def _config(
    header: Header, config: Mapping[str, Any], head: str, embedder: str, patch: int, seen: Mapping[str, Any]
) -> dict[str, Any]:
    dim, columns = tensor_shape(header, embedder, 2)
    normed = head in header
    heads = dim // (tensor_shape(header, head, 1)[0] or dim) if normed else None
    siglip = "siglip_embedder.0.weight"
    full = FACTS.complete(config, {
        **seen,
        "in_channels": columns // patch,
        "dim": dim,
        "n_layers": count_blocks(header, "layers"),
        "n_refiner_layers": count_blocks(header, "noise_refiner"),
        "n_heads": heads,
        "n_kv_heads": heads,
        "qk_norm": normed,
        "cap_feat_dim": tensor_shape(header, "cap_embedder.0.weight", 1)[0],
        "siglip_feat_dim": tensor_shape(header, siglip, 1)[0] if siglip in header else None,
    })  # fmt: skip
    if not isinstance(full["n_heads"], int) or full["n_heads"] < 1 or full["n_kv_heads"] != full["n_heads"]:
        raise RecipeError(
            f"{FACTS.class_name}: the heads are not known", expected="n_heads in the config, as many for keys",
            found=f"n_heads: {full['n_heads']}, n_kv_heads: {full['n_kv_heads']}",
            hint="porter convert … --config FILE, with n_heads and n_kv_heads in it",
        )  # fmt: skip
    FACTS.check_axes(full, "axes_dims", dim // full["n_heads"])
    return full


def parameters(config: Mapping[str, Any]) -> dict[str, int]:
    """The numbers that the rules use; all but `h` are flags."""
    return {
        "h": config["dim"], "normed": int(bool(config["qk_norm"])), "siglip": int(bool(config["siglip_feat_dim"])),
        "norm_final": int(bool(config.get("_norm_final"))),
    }  # fmt: skip


def _shared(config: Mapping[str, Any]) -> Shapes:
    """What both layouts call alike: the embedders, and the blocks without their attention."""
    h: int = config["dim"]
    shapes: Shapes = {"x_pad_token": (1, h), "cap_pad_token": (1, h)}
    condition, hidden = min(h, CONDITION), int(h / 3 * 8)
    shapes |= linear("t_embedder.mlp.0", MIDDLE, SINUSOIDS) | linear("t_embedder.mlp.2", condition, MIDDLE)
    shapes |= norm("cap_embedder.0", config["cap_feat_dim"], bias=False)
    shapes |= linear("cap_embedder.1", h, config["cap_feat_dim"])
    if config["siglip_feat_dim"]:
        shapes |= norm("siglip_embedder.0", config["siglip_feat_dim"], bias=False)
        shapes |= linear("siglip_embedder.1", h, config["siglip_feat_dim"]) | {"siglip_pad_token": (1, h)}
    for at, modulated in _blocks(config):
        for name, rows, columns in (("w1", hidden, h), ("w2", h, hidden), ("w3", hidden, h)):
            shapes |= linear(f"{at}.feed_forward.{name}", rows, columns, bias=False)
        for name in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"):
            shapes |= norm(f"{at}.{name}", h, bias=False)
        shapes |= linear(f"{at}.adaLN_modulation.0", 4 * h, condition) if modulated else {}
    return shapes


def _blocks(config: Mapping[str, Any]) -> list[tuple[str, bool]]:
    """Every block's path, and whether the time modulates it."""
    refiners = {"noise_refiner": True, "context_refiner": False}
    refiners |= {"siglip_refiner": False} if config["siglip_feat_dim"] else {}
    found = [(f"{name}.{i}", on) for name, on in refiners.items() for i in range(config["n_refiner_layers"])]
    return found + [(f"layers.{i}", True) for i in range(config["n_layers"])]


def _ends(config: Mapping[str, Any], embedder: str, final: str, patch: int) -> Shapes:
    """The embedder of patches and the final layer."""
    h, size = config["dim"], patch * config["in_channels"]
    shapes = linear(embedder, h, size) | linear(f"{final}.linear", size, h)
    return shapes | linear(f"{final}.adaLN_modulation.1", h, min(h, CONDITION))


def diffusers_headers(config: Mapping[str, Any], dtype: str = ANY) -> dict[str, TensorInfo]:
    """All tensors of ZImageTransformer2DModel for its config; the original code's are the same."""
    h, shapes = config["dim"], _shared(config)
    for patch, frames in zip(config["all_patch_size"], config["all_f_patch_size"], strict=True):
        size = f"{patch}-{frames}"
        shapes |= _ends(config, f"all_x_embedder.{size}", f"all_final_layer.{size}", patch**2 * frames)
    for at, _ in _blocks(config):
        for name in ("to_q", "to_k", "to_v", "to_out.0"):
            shapes |= linear(f"{at}.attention.{name}", h, h, bias=False)
        if config["qk_norm"]:
            for name in ("norm_q", "norm_k"):
                shapes |= norm(f"{at}.attention.{name}", h // config["n_heads"], bias=False)
    return specs(shapes, dtype)


def single_file_headers(config: Mapping[str, Any], dtype: str = ANY) -> dict[str, TensorInfo]:
    """All tensors of a single file for ZImageTransformer2DModel's config."""
    h, shapes = config["dim"], _shared(config)
    shapes |= _ends(config, "x_embedder", "final_layer", PATCH[0] ** 2 * PATCH[1])
    for at, _ in _blocks(config):
        shapes |= linear(f"{at}.attention.qkv", 3 * h, h, bias=False) | linear(f"{at}.attention.out", h, h, bias=False)
        if config["qk_norm"]:
            for name in ("q_norm", "k_norm"):
                shapes |= norm(f"{at}.attention.{name}", h // config["n_heads"], bias=False)
    shapes |= norm("norm_final", h, bias=False) if config.get("_norm_final") else {}
    return specs(shapes, dtype)


_P = "{p:weight|bias}"
_BLOCK, _AT = "{b:layers|noise_refiner|context_refiner|siglip_refiner}.{i:int}.", "{b}.{i}."
_KEPT = "the name is the same in both"
_SAME = (
    Rule("{t:x|cap}_pad_token", "{t}_pad_token", (), _KEPT),
    Rule("t_embedder.mlp.{j:0|2}." + _P, "t_embedder.mlp.{j}.{p}", (), _KEPT),
    Rule("cap_embedder.{j:0|1}." + _P, "cap_embedder.{j}.{p}", (), _KEPT),
    Rule("siglip_embedder.{j:0|1}." + _P, "siglip_embedder.{j}.{p}", (), _KEPT, "siglip"),
    Rule("siglip_pad_token", "siglip_pad_token", (), _KEPT, "siglip"),
    Rule(_BLOCK + "feed_forward.{w:w1|w2|w3}.weight", _AT + "feed_forward.{w}.weight", (), _KEPT),
    Rule(_BLOCK + "{k:attention|ffn}_norm{j:1|2}.weight", _AT + "{k}_norm{j}.weight", (), _KEPT),
    Rule(_BLOCK + f"adaLN_modulation.0.{_P}", _AT + "adaLN_modulation.0.{p}", (), _KEPT),
)
_SIZE = "{side:int}-{frames:int}"
_ONE = f"{PATCH[0]}-{PATCH[1]}"

TRANSFORMER = Recipe(
    name="z-image-transformer",
    source_layout="original",
    target_layout="diffusers",
    rules=(
        *_SAME,
        Rule(f"all_x_embedder.{_SIZE}.{_P}", "all_x_embedder.{side}-{frames}.{p}", (), _KEPT),
        Rule(
            "all_final_layer." + _SIZE + ".{k:linear|adaLN_modulation.1}." + _P,
            "all_final_layer.{side}-{frames}.{k}.{p}", (), _KEPT,
        ),
        Rule(_BLOCK + "attention.{k:to_q|to_k|to_v|to_out.0}.weight", _AT + "attention.{k}.weight", (), _KEPT),
        Rule(_BLOCK + "attention.norm_{x:q|k}.weight", _AT + "attention.norm_{x}.weight", (), _KEPT, "normed"),
    ),
    parameters=parameters,
    source_headers=diffusers_headers,
    target_headers=diffusers_headers,
    infer_config=infer_config,
)  # fmt: skip

SINGLE_FILE = Recipe(
    name="z-image-transformer-single-file",
    source_layout="single-file",
    target_layout="diffusers",
    rules=(
        *_SAME,
        Rule(f"x_embedder.{_P}", f"all_x_embedder.{_ONE}.{{p}}"),
        Rule("final_layer.{k:linear|adaLN_modulation.1}." + _P, f"all_final_layer.{_ONE}.{{k}}.{{p}}"),
        Rule(
            _BLOCK + "attention.qkv.weight", tuple(f"{_AT}attention.to_{x}.weight" for x in "qkv"),
            (Split(("h", "h", "h")),), "the file computes q, k and v with one matrix, stacked in this order",
        ),
        Rule(_BLOCK + "attention.out.weight", _AT + "attention.to_out.0.weight"),
        Rule(_BLOCK + "attention.{x:q|k}_norm.weight", _AT + "attention.norm_{x}.weight", when="normed"),
        Rule("norm_final.weight", (), (Drop("Lumina's last norm; Z-Image does not use it"),), when="norm_final"),
    ),
    parameters=parameters,
    source_headers=single_file_headers,
    target_headers=diffusers_headers,
    infer_config=infer_single_file,
)  # fmt: skip

_PACKED = "one product reads the input once"

ON_LOAD = on_load(
    "z-image-on-load",
    Rule(
        (_BLOCK + "attention.to_q.weight", _AT + "attention.to_k.weight", _AT + "attention.to_v.weight"),
        _AT + "attention.to_qkv.weight", (Concat(),), _PACKED, shard=OUTPUTS,
    ),
    Rule(_BLOCK + "attention.to_out.0.weight", _AT + "attention.to_out.0.weight", shard=INPUTS),
    Rule(
        (_BLOCK + "feed_forward.w1.weight", _AT + "feed_forward.w3.weight"),
        _AT + "feed_forward.w13.weight", (Concat(),), _PACKED, shard=OUTPUTS,
    ),
    Rule(_BLOCK + "feed_forward.w2.weight", _AT + "feed_forward.w2.weight", shard=INPUTS),
)  # fmt: skip
