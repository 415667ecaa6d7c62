"""All tensors of Wan's autoencoders, in the original's layout and in diffusers'."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from conversions.common.shapes import Shapes, conv
from porter.core.checkpoint import ANY, TensorInfo, specs


@dataclass(frozen=True)
class Names:
    """What a layout calls its modules.

    Attributes:
        residual: first norm, first convolution, second norm, second convolution and shortcut of a residual block.
        outer: first convolution, last norm and last convolution of the encoder and the decoder.
        middle: first residual block, attention and second residual block.
        quant: the convolutions behind the encoder and before the decoder.
        down, up: (level, place in it) -> residual block of the encoder and of the decoder.
        downsampler, upsampler: level -> the layer behind its residual blocks.
    """

    residual: tuple[str, str, str, str, str]
    outer: tuple[str, str, str]
    middle: tuple[str, str, str]
    quant: tuple[str, str]
    down: Callable[[int, int], str]
    up: Callable[[int, int], str]
    downsampler: Callable[[int], str]
    upsampler: Callable[[int], str]


def _original(depth: int, nested: bool) -> Names:
    def down(i: int, j: int) -> str:
        return f"encoder.downsamples.{i}.downsamples.{j}" if nested else f"encoder.downsamples.{i * (depth + 1) + j}"

    def up(i: int, j: int) -> str:
        return f"decoder.upsamples.{i}.upsamples.{j}" if nested else f"decoder.upsamples.{i * (depth + 2) + j}"

    return Names(
        residual=("residual.0", "residual.2", "residual.3", "residual.6", "shortcut"),
        outer=("conv1", "head.0", "head.2"), middle=("middle.0", "middle.1", "middle.2"), quant=("conv1", "conv2"),
        down=down, up=up, downsampler=lambda i: down(i, depth), upsampler=lambda i: up(i, depth + 1),
    )  # fmt: skip


def _diffusers(depth: int, nested: bool) -> Names:
    def down(i: int, j: int) -> str:
        return f"encoder.down_blocks.{i}.resnets.{j}" if nested else f"encoder.down_blocks.{i * (depth + 1) + j}"

    return Names(
        residual=("norm1", "conv1", "norm2", "conv2", "conv_shortcut"),
        outer=("conv_in", "norm_out", "conv_out"),
        middle=("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"),
        quant=("quant_conv", "post_quant_conv"),
        down=down, up=lambda i, j: f"decoder.up_blocks.{i}.resnets.{j}",
        downsampler=lambda i: f"encoder.down_blocks.{i}.downsampler" if nested else down(i, depth),
        upsampler=lambda i: f"decoder.up_blocks.{i}." + ("upsampler" if nested else "upsamplers.0"),
    )  # fmt: skip


def _gamma(name: str, channels: int, dims: int = 3) -> Shapes:
    """A norm's factor, which `dims` dims of size 1 follow."""
    return {f"{name}.gamma": (channels, *(1,) * dims)}


def _cube(name: str, rows: int, columns: int) -> Shapes:
    return conv(name, rows, columns, 3, 3, 3)


def _resnet(at: str, names: Names, rows: int, columns: int) -> Shapes:
    norm1, conv1, norm2, conv2, shortcut = (f"{at}.{name}" for name in names.residual)
    shapes = _gamma(norm1, columns) | _cube(conv1, rows, columns) | _gamma(norm2, rows) | _cube(conv2, rows, rows)
    return shapes | (conv(shortcut, rows, columns, 1, 1, 1) if rows != columns else {})


def _sampler(at: str, width: int, rows: int, time: int) -> Shapes:
    """The layer that changes the size, to `rows` channels; `time` rows of its convolution over frames, or none."""
    shapes = conv(f"{at}.resample.1", rows, width, 3, 3)
    return shapes | (conv(f"{at}.time_conv", time, width, 3, 1, 1) if time else {})


def _coder(at: str, names: Names, inner: int, columns: int, rows: int, ends: tuple[int, int]) -> Shapes:
    """What stands around the levels: `columns` channels come in, `rows` go out, `inner` wide in the middle."""
    first, attention, second = (f"{at}.{name}" for name in names.middle)
    into, norm, out = (f"{at}.{name}" for name in names.outer)
    shapes = _cube(into, ends[0], columns) | _gamma(norm, ends[1]) | _cube(out, rows, ends[1])
    shapes |= _resnet(first, names, inner, inner) | _resnet(second, names, inner, inner)
    shapes |= _gamma(f"{attention}.norm", inner, 2) | conv(f"{attention}.to_qkv", 3 * inner, inner, 1, 1)
    return shapes | conv(f"{attention}.proj", inner, inner, 1, 1)


def _headers(names: Names, config: Mapping[str, Any], dtype: str) -> dict[str, TensorInfo]:
    depth, z, nested = config["num_res_blocks"], config["z_dim"], config["is_residual"]
    base, mult, temporal = config["base_dim"], list(config["dim_mult"]), list(config["temperal_downsample"])
    down, last = [base * factor for factor in mult], len(mult) - 1
    up = [(config.get("decoder_base_dim") or base) * factor for factor in reversed(mult)]
    shapes = _coder("encoder", names, down[-1], config["in_channels"], 2 * z, (base, down[-1]))
    before = base
    for i, width in enumerate(down):
        for j in range(depth):
            shapes |= _resnet(names.down(i, j), names, width, before)
            before = width
        if i != last:
            shapes |= _sampler(names.downsampler(i), width, width, width if temporal[i] else 0)
    shapes |= conv(names.quant[0], 2 * z, 2 * z, 1, 1, 1) | conv(names.quant[1], z, z, 1, 1, 1)
    shapes |= _coder("decoder", names, up[0], z, config["out_channels"], (up[0], up[-1]))
    before = up[0]
    for i, width in enumerate(up):
        for j in range(depth + 1):
            shapes |= _resnet(names.up(i, j), names, width, before)
            before = width
        if i != last:
            before = width if nested else width // 2
            shapes |= _sampler(names.upsampler(i), width, before, 2 * width if temporal[::-1][i] else 0)
    return specs(shapes, dtype)


def original_headers(config: Mapping[str, Any], dtype: str = ANY) -> dict[str, TensorInfo]:
    """All tensors of the original layout for an AutoencoderKLWan config."""
    return _headers(_original(config["num_res_blocks"], config["is_residual"]), config, dtype)


def diffusers_headers(config: Mapping[str, Any], dtype: str = ANY) -> dict[str, TensorInfo]:
    """All tensors of AutoencoderKLWan for its config."""
    return _headers(_diffusers(config["num_res_blocks"], config["is_residual"]), config, dtype)
