"""AutoencoderKL: the layout of latent diffusion's original code ↔ diffusers' AutoencoderKL.

Original, as Stable Diffusion 1.x and 2.x have it; XL's, 3's and FLUX.1's are the same code, written anew:
https://github.com/CompVis/stable-diffusion/blob/21f890f9da3cfbeaba8e2ac3c425ee9e998d5229/ldm/models/autoencoder.py
https://github.com/Stability-AI/generative-models/blob/0ad7de9a5cb53fd63d6d30a4f385485e72e08597/sgm/models/autoencoder.py
https://github.com/Stability-AI/sd3.5/blob/fbf8f483f992d8d6ad4eaaeb23b1dc5f523c3b3a/sd3_impls.py
https://github.com/black-forest-labs/flux/blob/802fb4713906133fcbd0d8dc5351620ca4773036/src/flux/modules/autoencoder.py

3's and FLUX.1's lack the two 1x1 convolutions around the latents. A file of the training code also holds the loss.

    n levels of resolution · the original counts `up` blocks from the finest level, diffusers from the coarsest
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from conversions.common.shapes import Shapes, conv, norm
from porter.core.checkpoint import ANY, Header, TensorInfo, specs
from porter.core.errors import RecipeError
from porter.core.ops import Drop, Squeeze
from porter.core.patterns import Pattern, count_blocks
from porter.core.recipe import Recipe, Rule, settle, tensor_shape

CLASS = "AutoencoderKL"
GROUPS = 32  # of every group norm, fixed in the original code

_KEYS = (
    "in_channels", "out_channels", "down_block_types", "up_block_types", "block_out_channels", "layers_per_block",
    "act_fn", "latent_channels", "norm_num_groups", "sample_size", "scaling_factor", "shift_factor", "latents_mean",
    "latents_std", "force_upcast", "use_quant_conv", "use_post_quant_conv", "mid_block_add_attention",
)  # fmt: skip
_NEEDED = ("scaling_factor", "shift_factor")  # in no tensor, and every latent depends on them
# What a config.json of the class means by leaving them out, as those of Stable Diffusion 1.x, 2.x and XL do.
_CLASS_DEFAULTS: Mapping[str, Any] = {"scaling_factor": 0.18215, "shift_factor": None}
_TRAINING = "_training"  # private key of a config: name -> shape of the loss's tensors, where a file has them
# flag -> the tensors of the training's loss that it stands for, and what they are
_LOSS = {
    "loss_logvar": ("loss.logvar", "the loss's log-variance"),
    "loss_vgg": (
        "loss.perceptual_loss.net.slice{s:int}.{i:int}.{p:weight|bias}", "the VGG network of the perceptual loss"
    ),
    "loss_lin": ("loss.perceptual_loss.lin{s:int}.model.{i:int}.weight", "the perceptual loss's weights per channel"),
    "loss_scaling": (
        "loss.perceptual_loss.scaling_layer.{p:shift|scale}", "the perceptual loss's normalisation of images"
    ),
    "loss_discriminator": (
        "loss.discriminator.main.{i:int}.{p:weight|bias|running_mean|running_var|num_batches_tracked}",
        "the discriminator of the training",
    ),
}  # fmt: skip


def infer_config(header: Header, config: Mapping[str, Any]) -> dict[str, Any]:
    """The full AutoencoderKL config: read off the tensors, and checked against what `config` says.

    Raises:
        RecipeError: a key is missing, unknown, contradicts the tensors, or cannot be expressed in diffusers.
    """
    if config.get("_class_name", CLASS) != CLASS:
        raise RecipeError(f"the config is of {config['_class_name']}", expected=CLASS, found=str(config["_class_name"]))
    for key, value in config.items():
        if not key.startswith("_") and key not in _KEYS:
            raise RecipeError(
                f"the config has an unknown key {key}", expected=", ".join(_KEYS), found=f"{key}: {value}"
            )
    if "_class_name" in config:
        config = {**_CLASS_DEFAULTS, **config}
    absent = [key for key in _NEEDED if key not in config]
    if absent:
        names = " and ".join(absent)
        raise RecipeError(
            f"{CLASS}: the tensors do not say {names}", expected=f"{names} in the config", found="no such key",
            hint=f"porter convert … --config FILE, with {names} in it",
        )  # fmt: skip
    for key in _NEEDED:
        if not _is_number(config[key]) and not (key == "shift_factor" and config[key] is None):
            raise RecipeError(
                f"{CLASS}: {key} is no number", expected=f"{key}: a number", found=f"{key}: {config[key]!r}"
            )
    levels = count_blocks(header, "encoder.down")
    widths = [tensor_shape(header, f"encoder.down.{i}.block.0.conv2.weight", 4)[0] for i in range(levels)]
    seen = {
        "in_channels": tensor_shape(header, "encoder.conv_in.weight", 4)[1],
        "out_channels": tensor_shape(header, "decoder.conv_out.weight", 4)[0],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": widths,
        "layers_per_block": count_blocks(header, "encoder.down.0.block"),
        "act_fn": "silu",
        "latent_channels": tensor_shape(header, "decoder.conv_in.weight", 4)[1],
        "norm_num_groups": GROUPS,
        "use_quant_conv": "quant_conv.weight" in header,
        "use_post_quant_conv": "post_quant_conv.weight" in header,
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in header,
    }
    full = {key: value for key, value in settle(CLASS, config, seen).items() if key != _TRAINING}
    loss = {name: list(info.shape) for name, info in header.items() if name.startswith("loss.")}
    return {"_class_name": CLASS, **full} | ({_TRAINING: loss} if loss else {})


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def parameters(config: Mapping[str, Any]) -> dict[str, int]:
    """The numbers that the rules use; all but `n` are flags."""
    widths, training = list(config["block_out_channels"]), config.get(_TRAINING, {})
    return {
        "n": len(widths),
        "resampled": int(len(widths) > 1),
        "shortcut": int(len(set(widths)) > 1),
        "attention": int(config["mid_block_add_attention"]),
        "quant": int(config["use_quant_conv"]),
        "post_quant": int(config["use_post_quant_conv"]),
        **{flag: int(any(Pattern(text).find(training, {}))) for flag, (text, _) in _LOSS.items()},
    }


def _conv(name: str, rows: int, columns: int, kernel: int = 3) -> Shapes:
    return conv(name, rows, columns, kernel, kernel)


def _resnet(name: str, rows: int, columns: int, shortcut: str) -> Shapes:
    shapes = norm(f"{name}.norm1", columns) | _conv(f"{name}.conv1", rows, columns)
    shapes |= norm(f"{name}.norm2", rows) | _conv(f"{name}.conv2", rows, rows)
    return shapes | (_conv(f"{name}.{shortcut}", rows, columns, 1) if rows != columns else {})


def original_headers(config: Mapping[str, Any], dtype: str = ANY) -> dict[str, TensorInfo]:
    """All tensors of the original layout for an AutoencoderKL config."""
    widths, layers, z = list(config["block_out_channels"]), config["layers_per_block"], config["latent_channels"]
    last = len(widths) - 1
    shapes = _conv("encoder.conv_in", widths[0], config["in_channels"])
    for i, width in enumerate(widths):
        for j in range(layers):
            shapes |= _resnet(f"encoder.down.{i}.block.{j}", width, widths[max(i - 1, 0)] if j == 0 else width,
                              "nin_shortcut")  # fmt: skip
        if i != last:
            shapes |= _conv(f"encoder.down.{i}.downsample.conv", width, width)
    shapes |= _original_middle("encoder", widths[last], config["mid_block_add_attention"])
    shapes |= norm("encoder.norm_out", widths[last]) | _conv("encoder.conv_out", 2 * z, widths[last])
    shapes |= _conv("decoder.conv_in", widths[last], z)
    shapes |= _original_middle("decoder", widths[last], config["mid_block_add_attention"])
    for i, width in enumerate(widths):
        for j in range(layers + 1):
            shapes |= _resnet(f"decoder.up.{i}.block.{j}", width, widths[min(i + 1, last)] if j == 0 else width,
                              "nin_shortcut")  # fmt: skip
        if i != 0:
            shapes |= _conv(f"decoder.up.{i}.upsample.conv", width, width)
    shapes |= norm("decoder.norm_out", widths[0]) | _conv("decoder.conv_out", config["out_channels"], widths[0])
    shapes |= {name: tuple(shape) for name, shape in config.get(_TRAINING, {}).items()}
    return specs(shapes | _quant(config, z), dtype)


def _original_middle(at: str, width: int, attention: bool) -> Shapes:
    shapes = _resnet(f"{at}.mid.block_1", width, width, "nin_shortcut")
    shapes |= _resnet(f"{at}.mid.block_2", width, width, "nin_shortcut")
    if attention:
        shapes |= norm(f"{at}.mid.attn_1.norm", width)
        for name in ("q", "k", "v", "proj_out"):
            shapes |= _conv(f"{at}.mid.attn_1.{name}", width, width, 1)
    return shapes


def diffusers_headers(config: Mapping[str, Any], dtype: str = ANY) -> dict[str, TensorInfo]:
    """All tensors of AutoencoderKL for its config."""
    widths, layers, z = list(config["block_out_channels"]), config["layers_per_block"], config["latent_channels"]
    shapes: Shapes = {}
    for at, order, depth, resampler in (
        ("encoder", widths, layers, "downsamplers"), ("decoder", widths[::-1], layers + 1, "upsamplers"),
    ):  # fmt: skip
        encodes = at == "encoder"
        shapes |= _conv(f"{at}.conv_in", order[0], config["in_channels"] if encodes else z)
        blocks = f"{at}.down_blocks" if encodes else f"{at}.up_blocks"
        before = order[0]
        for i, width in enumerate(order):
            for j in range(depth):
                shapes |= _resnet(f"{blocks}.{i}.resnets.{j}", width, before, "conv_shortcut")
                before = width
            if i != len(order) - 1:
                shapes |= _conv(f"{blocks}.{i}.{resampler}.0.conv", width, width)
        middle = widths[-1]
        for j in range(2):
            shapes |= _resnet(f"{at}.mid_block.resnets.{j}", middle, middle, "conv_shortcut")
        if config["mid_block_add_attention"]:
            inner = f"{at}.mid_block.attentions.0"
            shapes |= norm(f"{inner}.group_norm", middle)
            for name in ("to_q", "to_k", "to_v", "to_out.0"):
                shapes |= {f"{inner}.{name}.weight": (middle, middle), f"{inner}.{name}.bias": (middle,)}
        shapes |= norm(f"{at}.conv_norm_out", order[-1])
        shapes |= _conv(f"{at}.conv_out", 2 * z if encodes else config["out_channels"], order[-1])
    return specs(shapes | _quant(config, z), dtype)


def _quant(config: Mapping[str, Any], z: int) -> Shapes:
    shapes = _conv("quant_conv", 2 * z, 2 * z, 1) if config["use_quant_conv"] else {}
    return shapes | (_conv("post_quant_conv", z, z, 1) if config["use_post_quant_conv"] else {})


_E = "{e:encoder|decoder}."
_LAYERS = "{l:norm1|conv1|norm2|conv2}.{p:weight|bias}"
_REVERSED = "the original counts up blocks from the finest level, diffusers from the coarsest"
_SQUEEZED = "the original's attention is made of 1x1 convolutions, diffusers' of linear layers"


def _attention(source: str, target: str) -> tuple[Rule, Rule]:
    """A projection's weight, squeezed, and its bias."""
    here, there = _E + f"mid.attn_1.{source}.", "{e}." + f"mid_block.attentions.0.{target}."
    return (
        Rule(here + "weight", there + "weight", (Squeeze((2, 3)),), _SQUEEZED, "attention"),
        Rule(here + "bias", there + "bias", when="attention"),
    )


AUTOENCODER = Recipe(
    name="autoencoder-kl",
    source_layout="original",
    target_layout="diffusers",
    rules=(
        Rule(_E + "{l:conv_in|conv_out}.{p:weight|bias}", "{e}.{l}.{p}"),
        Rule(_E + "norm_out.{p:weight|bias}", "{e}.conv_norm_out.{p}"),
        Rule("encoder.down.{i:int}.block.{j:int}." + _LAYERS, "encoder.down_blocks.{i}.resnets.{j}.{l}.{p}"),
        Rule(
            "encoder.down.{i:int}.block.{j:int}.nin_shortcut.{p:weight|bias}",
            "encoder.down_blocks.{i}.resnets.{j}.conv_shortcut.{p}", when="shortcut",
        ),
        Rule(
            "encoder.down.{i:int}.downsample.conv.{p:weight|bias}",
            "encoder.down_blocks.{i}.downsamplers.0.conv.{p}", when="resampled",
        ),
        Rule(
            "decoder.up.{i:int}.block.{j:int}." + _LAYERS, "decoder.up_blocks.{n-1-i}.resnets.{j}.{l}.{p}",
            why=_REVERSED,
        ),
        Rule(
            "decoder.up.{i:int}.block.{j:int}.nin_shortcut.{p:weight|bias}",
            "decoder.up_blocks.{n-1-i}.resnets.{j}.conv_shortcut.{p}", why=_REVERSED, when="shortcut",
        ),
        Rule(
            "decoder.up.{i:int}.upsample.conv.{p:weight|bias}",
            "decoder.up_blocks.{n-1-i}.upsamplers.0.conv.{p}", why=_REVERSED, when="resampled",
        ),
        Rule(_E + "mid.block_{j:int}." + _LAYERS, "{e}.mid_block.resnets.{j-1}.{l}.{p}"),
        Rule(_E + "mid.attn_1.norm.{p:weight|bias}", "{e}.mid_block.attentions.0.group_norm.{p}", when="attention"),
        *_attention("q", "to_q"),
        *_attention("k", "to_k"),
        *_attention("v", "to_v"),
        *_attention("proj_out", "to_out.0"),
        Rule("quant_conv.{p:weight|bias}", "quant_conv.{p}", when="quant"),
        Rule("post_quant_conv.{p:weight|bias}", "post_quant_conv.{p}", when="post_quant"),
        *(Rule(text, (), (Drop(f"{what}: the autoencoder runs without it"),), when=flag)
          for flag, (text, what) in _LOSS.items()),
    ),
    parameters=parameters,
    source_headers=original_headers,
    target_headers=diffusers_headers,
    infer_config=infer_config,
)  # fmt: skip
