"""Wan's autoencoders of video, 2.1 and 2.2: the original WanVAE_'s layout ↔ diffusers' AutoencoderKLWan.

Original: https://github.com/Wan-Video/Wan2.1/blob/9737cba9c1c3c4d04b33fcad41c111989865d315/wan/modules/vae.py
and https://github.com/Wan-Video/Wan2.2/blob/42bf4cfaa384bc21833865abc2f9e6c0e67233dc/wan/modules/vae2_2.py

2.1 numbers the layers of all levels through; 2.2 ("residual" in diffusers) has a block for each level.

    s layers of a level of 2.1's decoder: its residual blocks, and the one that makes the video larger
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from conversions.wan.vae_headers import diffusers_headers, original_headers
from porter.core.checkpoint import Header
from porter.core.configs import ConfigFacts
from porter.core.errors import RecipeError
from porter.core.patterns import count_blocks
from porter.core.recipe import Recipe, Rule, tensor_shape

COLOURS = 3  # channels of a video, fixed in the original code
PATCH = 2  # side of the patches that 2.2 folds into channels, fixed in the original code

# The latents' statistics of Wan 2.1, which a config.json of the class that leaves them out means.
_MEAN = [
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
]  # fmt: skip
_STD = [
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.916,
]  # fmt: skip

FACTS = ConfigFacts(
    "AutoencoderKLWan",
    keys=(
        "base_dim", "decoder_base_dim", "z_dim", "dim_mult", "num_res_blocks", "attn_scales", "temperal_downsample",
        "dropout", "latents_mean", "latents_std", "is_residual", "in_channels", "out_channels", "patch_size",
        "scale_factor_temporal", "scale_factor_spatial",
    ),
    needed=("latents_mean", "latents_std"),  # constants of the original's code: every latent depends on them
    assumed={"dropout": 0.0},  # of training only
    defaults={"latents_mean": _MEAN, "latents_std": _STD, "dropout": 0.0},
    aliases={"dim": "base_dim", "dec_dim": "decoder_base_dim"},
)  # fmt: skip


def infer_config(header: Header, config: Mapping[str, Any]) -> dict[str, Any]:
    """The full config: all but the latents' statistics is in the tensors.

    Raises:
        RecipeError: a key is missing, unknown or contradicts the tensors, or the layers form no levels.
    """
    nested = any(name.startswith("encoder.downsamples.0.downsamples.") for name in header)
    depth, ends = _nested(header) if nested else _flat(header)
    first = "{}.downsamples.0.residual.2.weight" if nested else "{}.residual.2.weight"
    starts = [f"encoder.downsamples.{i if nested else i * (depth + 1)}" for i in range(len(ends) + 1)]
    widths = [tensor_shape(header, first.format(at), 5)[0] for at in starts]
    base, in_channels, *_ = tensor_shape(header, "encoder.conv1.weight", 5)
    out_channels, finest, *_ = tensor_shape(header, "decoder.head.2.weight", 5)
    if not base or any(width % base for width in widths) or not widths[0] or finest % (widths[0] // base):
        raise RecipeError(
            "the widths are no multiples of the first one", expected=f"multiples of {base}",
            found=f"{widths}, and {finest} at the decoder's end",
        )  # fmt: skip
    decoder_base = finest // (widths[0] // base)
    z, patch = tensor_shape(header, "conv2.weight", 5)[0], PATCH if nested else 1
    if in_channels != COLOURS * patch**2:
        raise RecipeError(
            "encoder.conv1.weight does not take a video", expected=f"{COLOURS * patch**2} channels",
            found=f"{in_channels}",
        )  # fmt: skip
    temporal = [f"{at}.time_conv.weight" in header for at in ends]
    full = FACTS.complete(config, {
        "base_dim": base,
        "decoder_base_dim": decoder_base if decoder_base != base else None,  # as diffusers writes it: the same
        "z_dim": z,
        "dim_mult": [width // base for width in widths],
        "num_res_blocks": depth,
        "attn_scales": [],
        "temperal_downsample": temporal,
        "is_residual": nested,
        "in_channels": in_channels,
        "out_channels": out_channels,
        "patch_size": patch if nested else None,
        "scale_factor_temporal": 2 ** sum(temporal),
        "scale_factor_spatial": patch * 2 ** len(ends),
    })  # fmt: skip
    for key in ("latents_mean", "latents_std"):
        if not _numbers(full[key], z):
            raise RecipeError(
                f"{FACTS.class_name}: {key} does not fit the latents", expected=f"{z} numbers, one a channel",
                found=f"{key}: {full[key]}"[:200], hint=f"porter convert … --config FILE, with {key} in it",
            )  # fmt: skip
    return full


def _numbers(value: Any, count: int) -> bool:
    """Whether it is a list of `count` finite numbers."""
    return isinstance(value, list) and len(value) == count and all(
        isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x) for x in value
    )  # fmt: skip


def _nested(header: Header) -> tuple[int, list[str]]:
    """Residual blocks of a level, and the layer that ends each level but the last."""
    levels = count_blocks(header, "encoder.downsamples")
    depth = count_blocks(header, f"encoder.downsamples.{levels - 1}.downsamples")
    return depth, [f"encoder.downsamples.{i}.downsamples.{depth}" for i in range(levels - 1)]


def _flat(header: Header) -> tuple[int, list[str]]:
    """The same of layers that are numbered through, where every `depth + 1`-th makes the video smaller."""
    layers = count_blocks(header, "encoder.downsamples")
    ends = [i for i in range(layers) if f"encoder.downsamples.{i}.resample.1.weight" in header]
    depth = (layers - len(ends)) // (len(ends) + 1)
    if not depth or ends != [i * (depth + 1) + depth for i in range(len(ends))]:
        raise RecipeError(
            "encoder.downsamples has no levels of equal depth",
            expected="a resample after as many residual blocks each",
            found=f"{layers} layers, of which {ends} are resamples",
        )  # fmt: skip
    return depth, [f"encoder.downsamples.{i}" for i in ends]


def parameters(config: Mapping[str, Any]) -> dict[str, int]:
    """`s`, and flags: which release, and what there is only where sizes or widths change."""
    widths, nested = list(config["dim_mult"]), bool(config["is_residual"])
    up = [(before if nested or not i else before // 2, width) for i, (before, width) in enumerate(_upwards(config))]
    return {
        "s": config["num_res_blocks"] + 2,
        "nested": int(nested), "flat": int(not nested), "several": int(len(widths) > 1),
        "temporal": int(any(config["temperal_downsample"])),
        "narrows": int(any(a != b for a, b in zip([1, *widths], widths, strict=False))),
        "widens": int(any(a != b for a, b in up)),
    }  # fmt: skip


def _upwards(config: Mapping[str, Any]) -> list[tuple[int, int]]:
    """(before, width) of each level of the decoder."""
    base = config.get("decoder_base_dim") or config["base_dim"]
    widths = [base * factor for factor in reversed(config["dim_mult"])]
    return list(zip([widths[0], *widths], widths, strict=False))


_P = "{p:weight|bias}"
_RESIDUAL = {"residual.{l:0=norm1|3=norm2}.gamma": "{l}.gamma", "residual.{l:2=conv1|6=conv2}." + _P: "{l}.{p}"}
_SHORTCUT = {"shortcut." + _P: "conv_shortcut.{p}"}
_SAMPLER = {"resample.1." + _P: "resample.1.{p}"}
_TIME = {"time_conv." + _P: "time_conv.{p}"}
_THROUGH = "the original numbers the layers of all levels through, diffusers counts them in each level"


def _layers(source: str, target: str, kinds: Mapping[str, str], when: str, why: str = "another name") -> list[Rule]:
    """A rule for each kind of tensor of a layer."""
    return [Rule(f"{source}.{here}", f"{target}.{there}", why=why, when=when) for here, there in kinds.items()]


_DOWN, _UP = "encoder.downsamples.{i:int}", "decoder.upsamples.{i:int}"
_NESTED_DOWN, _NESTED_UP = f"{_DOWN}.downsamples.{{j:int}}", f"{_UP}.upsamples.{{j:int}}"
_RESNET = "decoder.up_blocks.{i//s}.resnets.{i-i//s*s}"

AUTOENCODER = Recipe(
    name="wan-autoencoder",
    source_layout="original",
    target_layout="diffusers",
    rules=(
        Rule("{x:conv1=quant_conv|conv2=post_quant_conv}." + _P, "{x}.{p}"),
        Rule("{e:encoder|decoder}.conv1." + _P, "{e}.conv_in.{p}"),
        Rule("{e:encoder|decoder}.head.0.gamma", "{e}.norm_out.gamma"),
        Rule("{e:encoder|decoder}.head.2." + _P, "{e}.conv_out.{p}"),
        *_layers("{e:encoder|decoder}.middle.{i:0=0|2=1}", "{e}.mid_block.resnets.{i}", _RESIDUAL, "1"),
        Rule("{e:encoder|decoder}.middle.1.norm.gamma", "{e}.mid_block.attentions.0.norm.gamma"),
        Rule("{e:encoder|decoder}.middle.1.{l:to_qkv|proj}." + _P, "{e}.mid_block.attentions.0.{l}.{p}"),
        # 2.1: the encoder's layers are numbered through on both sides
        *_layers(_DOWN, "encoder.down_blocks.{i}", _RESIDUAL, "flat"),
        *_layers(_DOWN, "encoder.down_blocks.{i}", _SHORTCUT, "flat*narrows"),
        *_layers(_DOWN, "encoder.down_blocks.{i}", _SAMPLER, "flat*several"),
        *_layers(_DOWN, "encoder.down_blocks.{i}", _TIME, "flat*temporal"),
        *_layers(_UP, _RESNET, _RESIDUAL, "flat", _THROUGH),
        *_layers(_UP, _RESNET, _SHORTCUT, "flat*widens", _THROUGH),
        *_layers(_UP, "decoder.up_blocks.{i//s}.upsamplers.0", _SAMPLER, "flat*several", _THROUGH),
        *_layers(_UP, "decoder.up_blocks.{i//s}.upsamplers.0", _TIME, "flat*temporal", _THROUGH),
        # 2.2
        *_layers(_NESTED_DOWN, "encoder.down_blocks.{i}.resnets.{j}", _RESIDUAL, "nested"),
        *_layers(_NESTED_DOWN, "encoder.down_blocks.{i}.resnets.{j}", _SHORTCUT, "nested*narrows"),
        *_layers(_NESTED_DOWN, "encoder.down_blocks.{i}.downsampler", _SAMPLER, "nested*several"),
        *_layers(_NESTED_DOWN, "encoder.down_blocks.{i}.downsampler", _TIME, "nested*temporal"),
        *_layers(_NESTED_UP, "decoder.up_blocks.{i}.resnets.{j}", _RESIDUAL, "nested"),
        *_layers(_NESTED_UP, "decoder.up_blocks.{i}.resnets.{j}", _SHORTCUT, "nested*widens"),
        *_layers(_NESTED_UP, "decoder.up_blocks.{i}.upsampler", _SAMPLER, "nested*several"),
        *_layers(_NESTED_UP, "decoder.up_blocks.{i}.upsampler", _TIME, "nested*temporal"),
    ),
    parameters=parameters,
    source_headers=original_headers,
    target_headers=diffusers_headers,
    infer_config=infer_config,
)  # fmt: skip
