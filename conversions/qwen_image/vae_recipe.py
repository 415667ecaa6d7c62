"""Qwen-Image's autoencoder: the layout of Wan 2.1's, which single files have ↔ diffusers' AutoencoderKLQwenImage.

Qwen-Image released it in diffusers' layout. ComfyUI's file of it has the names of the code that it was trained with:
https://github.com/Wan-Video/Wan2.1/blob/9737cba9c1c3c4d04b33fcad41c111989865d315/wan/modules/vae.py
Wan's own autoencoder has the same rules, in `conversions/wan`, for another class and for a second generation.

    n levels · r residual blocks of an encoder's level, a decoder's has one more · s layers of a decoder's level
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from conversions.common.shapes import Shapes, conv
from porter.core.checkpoint import ANY, Header, TensorInfo, specs
from porter.core.configs import ConfigFacts
from porter.core.errors import RecipeError
from porter.core.patterns import count_blocks
from porter.core.recipe import Recipe, Rule, tensor_shape

# The latents' statistics of Qwen-Image, which a config.json of the class that leaves them out means.
_MEAN = [
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
]  # fmt: skip
_STD = [
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.916,
]  # fmt: skip

FACTS = ConfigFacts(
    "AutoencoderKLQwenImage",
    keys=(
        "base_dim", "z_dim", "dim_mult", "num_res_blocks", "attn_scales", "temperal_downsample", "dropout",
        "input_channels", "latents_mean", "latents_std",
    ),
    needed=("latents_mean", "latents_std"),  # constants of the code that runs it: every latent depends on them
    defaults={"latents_mean": _MEAN, "latents_std": _STD},
)  # fmt: skip


def infer_config(header: Header, config: Mapping[str, Any]) -> dict[str, Any]:
    """The full config: all but the latents' statistics is in the tensors.

    Raises:
        RecipeError: a key is missing, unknown or contradicts the tensors, or the layers form no levels.
    """
    base, channels, *_ = tensor_shape(header, "encoder.conv1.weight", 5)
    layers, at = count_blocks(header, "encoder.downsamples"), "encoder.downsamples.{}.{}.weight"
    ends = [i for i in range(layers) if at.format(i, "resample.1") in header]
    depth = (layers - len(ends)) // (len(ends) + 1)
    if not depth or ends != [(i + 1) * (depth + 1) - 1 for i in range(len(ends))]:
        raise RecipeError(
            "encoder.downsamples has no levels of equal depth", expected="a resample after as many blocks each",
            found=f"{layers} layers, of which {ends} are resamples",
        )  # fmt: skip
    widths = [tensor_shape(header, at.format(i * (depth + 1), "residual.2"), 5)[0] for i in range(len(ends) + 1)]
    if not base or any(width % base for width in widths):
        raise RecipeError(
            "the widths are no multiples of the first", expected=f"multiples of {base}", found=f"{widths}"
        )
    z = tensor_shape(header, "conv2.weight", 5)[0]
    full = FACTS.complete(config, {
        "base_dim": base,
        "z_dim": z,
        "dim_mult": [width // base for width in widths],
        "num_res_blocks": depth,
        "attn_scales": [],
        "temperal_downsample": [at.format(i, "time_conv") in header for i in ends],
        "input_channels": channels,
    })  # fmt: skip
    for key in ("latents_mean", "latents_std"):
        value = full[key]
        if not (isinstance(value, list) and len(value) == z and all(map(_finite, value))):
            raise RecipeError(
                f"{FACTS.class_name}: {key} does not fit the latents", expected=f"{z} numbers, one a channel",
                found=f"{key}: {value}"[:200], hint=f"porter convert … --config FILE, with {key} in it",
            )  # fmt: skip
    return full


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class _Layer:
    """A layer with its path in both layouts: `columns` channels go in, `rows` come out, `time` over frames."""

    kind: str
    source: str
    target: str
    rows: int
    columns: int
    time: int = 0


def _layers(config: Mapping[str, Any]) -> Iterator[_Layer]:
    """Every layer of the encoder and the decoder."""
    base, depth, last = config["base_dim"], config["num_res_blocks"], len(config["dim_mult"]) - 1
    widths, temporal = [base * factor for factor in config["dim_mult"]], list(config["temperal_downsample"])
    channels, z, inner = config["input_channels"], config["z_dim"], widths[-1]
    yield _Layer("point", "conv1", "quant_conv", 2 * z, 2 * z)
    yield _Layer("point", "conv2", "post_quant_conv", z, z)
    for side, into, out, finest in (("encoder", base, 2 * z, inner), ("decoder", inner, channels, widths[0])):
        yield _Layer("cube", f"{side}.conv1", f"{side}.conv_in", into, channels if side == "encoder" else z)
        for old, new in (("middle.0", "resnets.0"), ("middle.2", "resnets.1")):
            yield _Layer("residual", f"{side}.{old}", f"{side}.mid_block.{new}", inner, inner)
        yield _Layer("attention", f"{side}.middle.1", f"{side}.mid_block.attentions.0", inner, inner)
        yield _Layer("norm", f"{side}.head.0", f"{side}.norm_out", finest, finest)
        yield _Layer("cube", f"{side}.head.2", f"{side}.conv_out", out, finest)
    number, before = 0, base
    for level, width in enumerate(widths):
        for _ in range(depth):
            yield _Layer("residual", f"encoder.downsamples.{number}", f"encoder.down_blocks.{number}", width, before)
            number, before = number + 1, width
        if level < last:
            at = f"encoder.downsamples.{number}", f"encoder.down_blocks.{number}"
            yield _Layer("sampler", *at, width, width, width if temporal[level] else 0)
            number += 1
    number, before = 0, inner
    for level, width in enumerate(reversed(widths)):
        to = f"decoder.up_blocks.{level}"
        for block in range(depth + 1):
            yield _Layer("residual", f"decoder.upsamples.{number}", f"{to}.resnets.{block}", width, before)
            number, before = number + 1, width
        if level < last:
            time = 2 * width if temporal[::-1][level] else 0
            yield _Layer("sampler", f"decoder.upsamples.{number}", f"{to}.upsamplers.0", width // 2, width, time)
            number, before = number + 1, width // 2


_PARTS = {  # norm, convolution, norm, convolution and shortcut of a residual block
    "original": ("residual.0", "residual.2", "residual.3", "residual.6", "shortcut"),
    "diffusers": ("norm1", "conv1", "norm2", "conv2", "conv_shortcut"),
}


def _tensors(layer: _Layer, layout: str) -> Shapes:
    """The tensors of a layer in one layout."""
    at, rows, columns = layer.source if layout == "original" else layer.target, layer.rows, layer.columns
    if layer.kind == "norm":
        return {f"{at}.gamma": (rows, 1, 1, 1)}
    if layer.kind in ("point", "cube"):
        return conv(at, rows, columns, *((1,) * 3 if layer.kind == "point" else (3,) * 3))
    if layer.kind == "attention":
        shapes = {f"{at}.norm.gamma": (rows, 1, 1)} | conv(f"{at}.to_qkv", 3 * rows, rows, 1, 1)
        return shapes | conv(f"{at}.proj", rows, rows, 1, 1)
    if layer.kind == "sampler":
        shapes = conv(f"{at}.resample.1", rows, columns, 3, 3)
        return shapes | (conv(f"{at}.time_conv", layer.time, columns, 3, 1, 1) if layer.time else {})
    norm1, conv1, norm2, conv2, shortcut = (f"{at}.{name}" for name in _PARTS[layout])
    shapes = {f"{norm1}.gamma": (columns, 1, 1, 1), f"{norm2}.gamma": (rows, 1, 1, 1)}
    shapes |= conv(conv1, rows, columns, 3, 3, 3) | conv(conv2, rows, rows, 3, 3, 3)
    return shapes | (conv(shortcut, rows, columns, 1, 1, 1) if rows != columns else {})


def original_headers(config: Mapping[str, Any], dtype: str = ANY) -> dict[str, TensorInfo]:
    """All tensors of the original layout for an AutoencoderKLQwenImage config."""
    return specs({k: shape for layer in _layers(config) for k, shape in _tensors(layer, "original").items()}, dtype)


def diffusers_headers(config: Mapping[str, Any], dtype: str = ANY) -> dict[str, TensorInfo]:
    """All tensors of AutoencoderKLQwenImage for its config."""
    return specs({k: shape for layer in _layers(config) for k, shape in _tensors(layer, "diffusers").items()}, dtype)


def parameters(config: Mapping[str, Any]) -> dict[str, int]:
    """The numbers that the rules use; all but `s` are flags."""
    layers = list(_layers(config))
    shortcuts = [layer.source for layer in layers if layer.kind == "residual" and layer.rows != layer.columns]
    return {
        "s": config["num_res_blocks"] + 2, "several": int(len(config["dim_mult"]) > 1),
        "temporal": int(any(layer.time for layer in layers)),
        "down": int(any(at.startswith("encoder") for at in shortcuts)),
        "up": int(any(at.startswith("decoder") for at in shortcuts)),
    }  # fmt: skip


_P, _NORM, _CONV = "{p:weight|bias}", "residual.{k:0=norm1|3=norm2}.gamma", "residual.{k:2=conv1|6=conv2}."
_BOTH, _MIDDLE = "{e:encoder|decoder}.", "{e}.mid_block.resnets.{i}."
_DOWN, _DOWN_TO = "encoder.downsamples.{i:int}.", "encoder.down_blocks.{i}."
_UP, _UP_TO = "decoder.upsamples.{i:int}.", "decoder.up_blocks.{i//s}."
_RESNET = _UP_TO + "resnets.{i-i//s*s}."
_THROUGH = "the original numbers the layers of all levels through, diffusers counts them in each level"

AUTOENCODER = Recipe(
    name="qwen-image-autoencoder",
    source_layout="original",
    target_layout="diffusers",
    rules=(
        Rule("{x:conv1=quant_conv|conv2=post_quant_conv}." + _P, "{x}.{p}"),
        Rule(f"{_BOTH}conv1.{_P}", "{e}.conv_in.{p}"),
        Rule(f"{_BOTH}head.0.gamma", "{e}.norm_out.gamma"),
        Rule(f"{_BOTH}head.2.{_P}", "{e}.conv_out.{p}"),
        Rule(_BOTH + "middle.{i:0=0|2=1}." + _NORM, _MIDDLE + "{k}.gamma"),
        Rule(_BOTH + "middle.{i:0=0|2=1}." + _CONV + _P, _MIDDLE + "{k}.{p}"),
        Rule(f"{_BOTH}middle.1.norm.gamma", "{e}.mid_block.attentions.0.norm.gamma"),
        Rule(_BOTH + "middle.1.{l:to_qkv|proj}." + _P, "{e}.mid_block.attentions.0.{l}.{p}"),
        Rule(_DOWN + _NORM, _DOWN_TO + "{k}.gamma"),
        Rule(_DOWN + _CONV + _P, _DOWN_TO + "{k}.{p}"),
        Rule(f"{_DOWN}shortcut.{_P}", _DOWN_TO + "conv_shortcut.{p}", when="down"),
        Rule(f"{_DOWN}resample.1.{_P}", _DOWN_TO + "resample.1.{p}", when="several"),
        Rule(f"{_DOWN}time_conv.{_P}", _DOWN_TO + "time_conv.{p}", when="temporal"),
        Rule(_UP + _NORM, _RESNET + "{k}.gamma", why=_THROUGH),
        Rule(_UP + _CONV + _P, _RESNET + "{k}.{p}", why=_THROUGH),
        Rule(f"{_UP}shortcut.{_P}", _RESNET + "conv_shortcut.{p}", why=_THROUGH, when="up"),
        Rule(f"{_UP}resample.1.{_P}", _UP_TO + "upsamplers.0.resample.1.{p}", why=_THROUGH, when="several"),
        Rule(f"{_UP}time_conv.{_P}", _UP_TO + "upsamplers.0.time_conv.{p}", why=_THROUGH, when="temporal"),
    ),
    parameters=parameters,
    source_headers=original_headers,
    target_headers=diffusers_headers,
    infer_config=infer_config,
)  # fmt: skip
