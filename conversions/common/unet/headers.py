"""The tensors of UNet2DConditionModel in both layouts, for its config.

The original keeps the way down and the way up in one row of blocks each: `input_blocks` and `output_blocks`. Both
layouts come from one walk through the levels, because they have the same layers in the same order.

    n levels of resolution, from the finest · l residual blocks of a level on the way down, l+1 on the way up
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from conversions.common.shapes import Shapes, conv, linear, norm
from porter.core.checkpoint import ANY, TensorInfo, specs

Config = Mapping[str, Any]
TIME_RATIO = 4  # width of the time embedding: times the first level's, fixed in the original code
FF_RATIO = 4  # width of a feed-forward: times the level's, fixed in both

ORIGINAL_LAYERS = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "shortcut": "skip_connection",
}  # fmt: skip
DIFFUSERS_LAYERS = {
    "norm1": "norm1", "conv1": "conv1", "time": "time_emb_proj", "norm2": "norm2", "conv2": "conv2",
    "shortcut": "conv_shortcut",
}  # fmt: skip


class Place(NamedTuple):
    """One module of the walk, with its name in both layouts; `rows` channels are made of `columns`."""

    kind: str  # resnet | transformer | resample
    original: str
    diffusers: str
    rows: int
    columns: int
    depth: int = 0  # blocks of a transformer
    crossed: bool = False  # a transformer whose first attention looks at the text too


def per_level(value: Any, levels: int) -> list[Any]:
    """A value for each level: one value stands for all of them."""
    return list(value) if isinstance(value, list | tuple) else [value] * levels


def of_all(value: Any) -> Any:
    """The value that all levels share: it may be said once, or for each."""
    return value[0] if isinstance(value, list | tuple) else value


def attends(config: Config) -> list[bool]:
    """Which levels have transformers."""
    return ["CrossAttn" in kind for kind in config["down_block_types"]]


def walk(config: Config) -> Iterator[Place]:
    """Every module between the first convolution and the last norm."""
    widths, layers = list(config["block_out_channels"]), of_all(config["layers_per_block"])
    n, attention = len(widths), attends(config)
    depths = per_level(config["transformer_layers_per_block"], n)
    crossed = per_level(config["only_cross_attention"], n)
    before, k, skips = widths[0], 0, [widths[0]]
    for i, width in enumerate(widths):
        for j in range(layers):
            k += 1
            here, there = f"input_blocks.{k}", f"down_blocks.{i}"
            yield Place("resnet", f"{here}.0", f"{there}.resnets.{j}", width, before)
            if attention[i]:
                yield Place("transformer", f"{here}.1", f"{there}.attentions.{j}", width, width, depths[i], crossed[i])
            before = width
            skips.append(width)
        if i < n - 1:
            k += 1
            yield Place("resample", f"input_blocks.{k}.0.op", f"down_blocks.{i}.downsamplers.0.conv", width, width)
            skips.append(width)
    yield Place("resnet", "middle_block.0", "mid_block.resnets.0", before, before)
    middle = config["only_cross_attention"] is True  # diffusers reads a list as saying nothing of the middle
    yield Place("transformer", "middle_block.1", "mid_block.attentions.0", before, before, depths[-1], middle)
    yield Place("resnet", "middle_block.2", "mid_block.resnets.1", before, before)
    k = 0
    for b, i in enumerate(reversed(range(n))):
        width = widths[i]
        for j in range(layers + 1):
            here, there = f"output_blocks.{k}", f"up_blocks.{b}"
            yield Place("resnet", f"{here}.0", f"{there}.resnets.{j}", width, before + skips.pop())
            if attention[i]:
                yield Place("transformer", f"{here}.1", f"{there}.attentions.{j}", width, width, depths[i], crossed[i])
            before = width
            k += 1
        if i:
            at = f"output_blocks.{k - 1}.{1 + attention[i]}.conv"  # after the transformer, if there is one
            yield Place("resample", at, f"up_blocks.{b}.upsamplers.0.conv", width, width)


def original_headers(config: Config, dtype: str = ANY) -> dict[str, TensorInfo]:
    """All tensors of the original layout."""
    first, width = config["block_out_channels"][0], _time_width(config)
    shapes = linear("time_embed.0", width, first) | linear("time_embed.2", width, width)
    if config["num_class_embeds"] is not None:
        shapes |= {"label_emb.weight": (config["num_class_embeds"], width)}
    if config["projection_class_embeddings_input_dim"] is not None:
        shapes |= linear("label_emb.0.0", width, config["projection_class_embeddings_input_dim"])
        shapes |= linear("label_emb.0.2", width, width)
    shapes |= conv("input_blocks.0.0", first, config["in_channels"], 3, 3)
    for place in walk(config):
        shapes |= _module(place, place.original, ORIGINAL_LAYERS, config)
    return specs(shapes | norm("out.0", first) | conv("out.2", config["out_channels"], first, 3, 3), dtype)


def diffusers_headers(config: Config, dtype: str = ANY) -> dict[str, TensorInfo]:
    """All tensors of UNet2DConditionModel."""
    first, width = config["block_out_channels"][0], _time_width(config)
    shapes = conv("conv_in", first, config["in_channels"], 3, 3)
    shapes |= linear("time_embedding.linear_1", width, first) | linear("time_embedding.linear_2", width, width)
    if config["num_class_embeds"] is not None:
        shapes |= {"class_embedding.weight": (config["num_class_embeds"], width)}
    for name, there in (
        ("class_embedding", config["class_embed_type"] == "projection"),
        ("add_embedding", config["addition_embed_type"] == "text_time"),
    ):
        if there:
            shapes |= linear(f"{name}.linear_1", width, config["projection_class_embeddings_input_dim"])
            shapes |= linear(f"{name}.linear_2", width, width)
    for place in walk(config):
        shapes |= _module(place, place.diffusers, DIFFUSERS_LAYERS, config)
    return specs(shapes | norm("conv_norm_out", first) | conv("conv_out", config["out_channels"], first, 3, 3), dtype)


def _time_width(config: Config) -> int:
    return int(TIME_RATIO * config["block_out_channels"][0])


def _module(place: Place, at: str, layers: Mapping[str, str], config: Config) -> Shapes:
    """The tensors of one module, under the name `at`."""
    if place.kind == "resample":
        return conv(at, place.rows, place.columns, 3, 3)
    if place.kind == "transformer":
        return _transformer(place, at, config)
    name = {key: f"{at}.{layer}" for key, layer in layers.items()}
    shapes = norm(name["norm1"], place.columns) | conv(name["conv1"], place.rows, place.columns, 3, 3)
    shapes |= linear(name["time"], place.rows, _time_width(config))
    shapes |= norm(name["norm2"], place.rows) | conv(name["conv2"], place.rows, place.rows, 3, 3)
    return shapes | (conv(name["shortcut"], place.rows, place.columns, 1, 1) if place.rows != place.columns else {})


def _transformer(place: Place, at: str, config: Config) -> Shapes:
    """A transformer over positions; its names are the same in both layouts."""
    width, text = place.rows, of_all(config["cross_attention_dim"])
    kernel = () if config["use_linear_projection"] else (1, 1)
    shapes = norm(f"{at}.norm", width) | conv(f"{at}.proj_in", width, width, *kernel)
    for t in range(place.depth):
        block = f"{at}.transformer_blocks.{t}"
        for attention, source in (("attn1", text if place.crossed else width), ("attn2", text)):
            shapes |= linear(f"{block}.{attention}.to_q", width, width, bias=False)
            for name in ("to_k", "to_v"):
                shapes |= linear(f"{block}.{attention}.{name}", width, source, bias=False)
            shapes |= linear(f"{block}.{attention}.to_out.0", width, width)
        shapes |= linear(f"{block}.ff.net.0.proj", 2 * FF_RATIO * width, width)  # the gate beside the values
        shapes |= linear(f"{block}.ff.net.2", width, FF_RATIO * width)
        for name in ("norm1", "norm2", "norm3"):
            shapes |= norm(f"{block}.{name}", width)
    return shapes | conv(f"{at}.proj_out", width, width, *kernel)
