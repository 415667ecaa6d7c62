"""UNet2DConditionModel: the layout of latent diffusion's original UNetModel ↔ diffusers'.

Original, as Stable Diffusion 1 has it, and as XL has it (with 2's options):
https://github.com/CompVis/stable-diffusion/blob/21f890f9da3cfbeaba8e2ac3c425ee9e998d5229/ldm/modules/diffusionmodules/openaimodel.py
https://github.com/Stability-AI/generative-models/blob/0ad7de9a5cb53fd63d6d30a4f385485e72e08597/sgm/modules/diffusionmodules/openaimodel.py

    n levels of resolution, from the finest · l residual blocks of a level on the way down, l+1 on the way up
    k place of a block in the original's row: on the way down 1 + i·(l+1) + j, where j = l is the downsampler
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from conversions.common.unet.headers import attends, diffusers_headers, of_all, original_headers, per_level
from porter.core.checkpoint import Header
from porter.core.configs import ConfigFacts, suggested
from porter.core.errors import RecipeError
from porter.core.patterns import Pattern, count_blocks
from porter.core.recipe import Recipe, Rule, tensor_shape

CLASS = "UNet2DConditionModel"
_MIDDLE = "middle_block.1"  # its transformer; every released model has one

# What the original code computes always, in the class's words.
CONSTANT: Mapping[str, Any] = {
    "center_input_sample": False, "flip_sin_to_cos": True, "freq_shift": 0, "mid_block_type": "UNetMidBlock2DCrossAttn",
    "downsample_padding": 1, "mid_block_scale_factor": 1, "act_fn": "silu", "norm_num_groups": 32, "norm_eps": 1e-05,
    "reverse_transformer_layers_per_block": None, "encoder_hid_dim": None, "encoder_hid_dim_type": None,
    "num_attention_heads": None, "dual_cross_attention": False, "resnet_time_scale_shift": "default",
    "resnet_skip_time_act": False, "resnet_out_scale_factor": 1.0, "time_embedding_type": "positional",
    "time_embedding_dim": None, "time_embedding_act_fn": None, "timestep_post_act": None, "time_cond_proj_dim": None,
    "conv_in_kernel": 3, "conv_out_kernel": 3, "attention_type": "default", "class_embeddings_concat": False,
    "mid_block_only_cross_attention": None, "cross_attention_norm": None, "addition_embed_type_num_heads": 64,
}  # fmt: skip
_SHOWN = (
    "in_channels", "out_channels", "down_block_types", "up_block_types", "only_cross_attention", "block_out_channels",
    "layers_per_block", "cross_attention_dim", "transformer_layers_per_block", "attention_head_dim",
    "use_linear_projection", "class_embed_type", "addition_embed_type", "addition_time_embed_dim", "num_class_embeds",
    "projection_class_embeddings_input_dim",
)  # fmt: skip

# `attention_head_dim` is the number of heads, by an old mistake that diffusers keeps. No tensor shows it.
FACTS = ConfigFacts(
    CLASS,
    keys=(*_SHOWN, *CONSTANT, "sample_size", "dropout", "upcast_attention"),
    needed=("attention_head_dim",),
    defaults={
        "attention_head_dim": 8, "only_cross_attention": False, "class_embed_type": None, "addition_embed_type": None,
        "addition_time_embed_dim": None, "sample_size": None, "dropout": 0.0, "upcast_attention": False,
    },
    assumed={"sample_size": 64, "dropout": 0.0, "upcast_attention": False},
    aliases={"num_heads": "attention_head_dim"},
)  # fmt: skip

# Released models by width of the text, widths of the levels, and whether projections are linear layers: what no tensor
# of theirs shows. It is named where it is asked for, and never taken: another model may have other heads.
_TOLD = ("addition_embed_type", "addition_time_embed_dim", "class_embed_type")
_TIMES = {"addition_embed_type": "text_time", "addition_time_embed_dim": 256}
RELEASED: Mapping[tuple[int, tuple[int, ...], bool], Mapping[str, Any]] = {
    (768, (320, 640, 1280, 1280), False): {"attention_head_dim": 8, "sample_size": 64},
    (1024, (320, 640, 1280, 1280), True): {
        "attention_head_dim": (5, 10, 20, 20), "sample_size": 96, "class_embed_type": "projection",
    },
    (1024, (256, 512, 512, 1024), True): {
        "attention_head_dim": 8, "sample_size": 128, "only_cross_attention": (True, True, True, False),
    },
    (2048, (320, 640, 1280), True): {"attention_head_dim": (5, 10, 20), "sample_size": 128, **_TIMES},
    (1280, (384, 768, 1536, 1536), True): {"attention_head_dim": (6, 12, 24, 24), "sample_size": 128, **_TIMES},
}  # fmt: skip


def infer_config(header: Header, config: Mapping[str, Any]) -> dict[str, Any]:
    """The full config: what tensors show, what is given, what the original always computes.

    Raises:
        RecipeError: a key is unknown, missing, contradicts the tensors, or says what the original cannot compute.
    """
    for key, value in CONSTANT.items():
        if key in config and config[key] != value:
            raise RecipeError(
                f"{CLASS}: the original layout means {key}: {value}", expected=f"{key}: {value}",
                found=f"{key}: {config[key]}"[:200], hint="this file and this config do not belong together",
            )  # fmt: skip
    n, layers = _levels(header)
    blocks = [f"input_blocks.{1 + i * (layers + 1)}" for i in range(n)]
    attention = [f"{block}.1.norm.weight" in header for block in blocks]
    text = tensor_shape(header, "middle_block.1.transformer_blocks.0.attn2.to_k.weight", 2)[1]
    widths = [tensor_shape(header, f"{block}.0.out_layers.3.weight", 4)[0] for block in blocks]
    flat = f"{_MIDDLE}.proj_in.weight" in header and len(header[f"{_MIDDLE}.proj_in.weight"].shape) == 2
    released = RELEASED.get((text, tuple(widths), flat), {})
    known = {**(FACTS.defaults if "_class_name" in config else {}), **config}

    depths = [count_blocks(header, f"{block}.1.transformer_blocks") or None for block in blocks]
    depths[-1] = count_blocks(header, f"{_MIDDLE}.transformer_blocks")
    crossed = [_crossed(header, f"{block}.1", text) for block in blocks]
    untold = any(has and said is None for has, said in zip(attention, crossed, strict=True))
    kinds = ["CrossAttnDownBlock2D" if has else "DownBlock2D" for has in attention]
    seen: dict[str, Any] = {
        **CONSTANT,
        "in_channels": tensor_shape(header, "input_blocks.0.0.weight", 4)[1],
        "out_channels": tensor_shape(header, "out.2.weight", 4)[0],
        "down_block_types": kinds,
        "up_block_types": [kind.replace("Down", "Up") for kind in reversed(kinds)],
        "block_out_channels": widths,
        "layers_per_block": _agreed([layers] * n, config.get("layers_per_block")),
        "cross_attention_dim": _agreed([text] * n, config.get("cross_attention_dim")),
        "transformer_layers_per_block": _agreed(depths, config.get("transformer_layers_per_block"), 1),
        "use_linear_projection": flat,
        **_labels(header, known, released),
    }
    if not untold or "only_cross_attention" in known:
        said = _agreed(crossed, known.get("only_cross_attention"), False)
        # In diffusers True speaks of the middle too, a list does not.
        seen["only_cross_attention"] = [True] * n if said is True and not _crossed(header, _MIDDLE, text) else said
    needed = ("attention_head_dim", "addition_time_embed_dim", "only_cross_attention")
    facts = replace(
        FACTS, needed=tuple(key for key in needed if key not in seen),
        assumed={**FACTS.assumed, **{key: released[key] for key in ("sample_size",) if key in released}},
    )  # fmt: skip
    full = facts.complete(config, seen, released)
    _check_heads(full)
    return full


def _levels(header: Header) -> tuple[int, int]:
    """How many levels there are, and how many residual blocks each has: downsamplers stand between the levels."""
    at = Pattern("input_blocks.{k:int}.0.op.weight")
    downsamplers = sorted(int(found["k"]) for _, found in at.find(header, {}))
    n = len(downsamplers) + 1
    layers, rest = divmod(count_blocks(header, "input_blocks") - n, n)
    if layers < 1 or rest or downsamplers != [i * (layers + 1) for i in range(1, n)]:
        raise RecipeError(
            "the levels of input_blocks are not of one length", expected="as many residual blocks in each level",
            found=f"downsamplers at {downsamplers}", hint="check that this is the right file of the model",
        )  # fmt: skip
    return n, layers


def _crossed(header: Header, transformer: str, text: int) -> bool | None:
    """Whether a transformer's first attention looks at the text; None where no tensor says so."""
    keys = header.get(f"{transformer}.transformer_blocks.0.attn1.to_k.weight")
    if keys is None or len(keys.shape) != 2 or keys.shape[0] == text:
        return None
    return keys.shape[1] == text


def _agreed(levels: Sequence[Any], given: Any, fill: Any = None) -> Any:
    """A value of each level: as it is given, if no tensor contradicts; else as the tensors say, or `fill`."""
    if given is not None:
        said = per_level(given, len(levels))
        if len(said) == len(levels) and all(v in (None, s) for v, s in zip(levels, said, strict=True)):
            return given
    told = [value for value in levels if value is not None] or [fill]
    return told[0] if told.count(told[0]) == len(told) else [fill if value is None else value for value in levels]


def _labels(header: Header, known: Mapping[str, Any], released: Mapping[str, Any]) -> dict[str, Any]:
    """What is added to the time embedding: nothing, a table of classes, or a projection, of which there are two."""
    table = "label_emb.weight" in header
    seen = {
        "num_class_embeds": tensor_shape(header, "label_emb.weight", 2)[0] if table else None,
        "projection_class_embeddings_input_dim": None, "class_embed_type": None, "addition_embed_type": None,
        "addition_time_embed_dim": None,
    }  # fmt: skip
    if "label_emb.0.0.weight" not in header:
        return seen
    seen["projection_class_embeddings_input_dim"] = tensor_shape(header, "label_emb.0.0.weight", 2)[1]
    if known.get("addition_embed_type") == "text_time":
        return {key: seen[key] for key in seen if not key.startswith("addition_")}
    if known.get("class_embed_type") == "projection":
        return {key: seen[key] for key in seen if key != "class_embed_type"}
    raise RecipeError(
        f"{CLASS}: the tensors do not say what label_emb embeds",
        expected="addition_embed_type: text_time and addition_time_embed_dim, or class_embed_type: projection",
        found="no such key",
        hint="porter convert … --config FILE, with one of the two in it" + suggested(_TOLD, released),
    )  # fmt: skip


def _check_heads(full: Mapping[str, Any]) -> None:
    """The heads of each level must fill its width; the middle has those of the last."""
    widths, used = full["block_out_channels"], [*attends(full)[:-1], True]
    heads = per_level(full["attention_head_dim"], len(widths))
    fits = len(heads) == len(widths) and all(
        isinstance(count, int) and count > 0 and width % count == 0
        for width, count, has in zip(widths, heads, used, strict=True)
        if has
    )
    if not fits:
        raise RecipeError(
            f"{CLASS}: attention_head_dim (the number of heads) does not divide the widths",
            expected=f"for each of {widths}, or for all, a divisor", found=f"{full['attention_head_dim']}",
        )  # fmt: skip


def parameters(config: Mapping[str, Any]) -> dict[str, int]:
    """The numbers that the rules use; all but `l` are flags."""
    return {
        "l": of_all(config["layers_per_block"]),
        "resampled": int(len(config["block_out_channels"]) > 1),
        "attention": int(any(attends(config))),
        "table": int(config["num_class_embeds"] is not None),
        "projected": int(config["class_embed_type"] == "projection"),
        "added": int(config["addition_embed_type"] == "text_time"),
    }


_P = "{p:weight|bias}"
_DOWN, _DOWN_TO = "input_blocks.{k:int>0}.", "down_blocks.{(k-1)//(l+1)}."
_UP, _UP_TO = "output_blocks.{k:int}.", "up_blocks.{k//(l+1)}."
_ROW = "the original counts the blocks of all levels in one row, downsamplers too"
_LAYER = (
    "{x:in_layers.0=norm1|in_layers.2=conv1|emb_layers.1=time_emb_proj|out_layers.0=norm2|out_layers.3=conv2"
    "|skip_connection=conv_shortcut}." + _P
)


def _transformer(source: str, target: str, when: str | None = None) -> tuple[Rule, ...]:
    """A transformer's tensors, whose names are the same in both; its projections are stored as each model has them."""
    inner, block = "transformer_blocks.{t:int}.", "transformer_blocks.{t}."
    layers = "{x:norm1|norm2|norm3|attn1.to_out.0|attn2.to_out.0|ff.net.0.proj|ff.net.2}."
    return (
        Rule(source + "{x:norm|proj_in|proj_out}." + _P, target + "{x}.{p}", when=when),
        Rule(source + inner + layers + _P, target + block + "{x}.{p}", when=when),
        Rule(
            source + inner + "{a:attn1|attn2}.{x:to_q|to_k|to_v}.weight", target + block + "{a}.{x}.weight", when=when
        ),
    )


UNET = Recipe(
    name="unet-2d-condition",
    source_layout="original",
    target_layout="diffusers",
    rules=(
        Rule("time_embed.{j:0=1|2=2}." + _P, "time_embedding.linear_{j}.{p}"),
        Rule("label_emb.weight", "class_embedding.weight", when="table"),
        Rule("label_emb.0.{j:0=1|2=2}." + _P, "class_embedding.linear_{j}.{p}", when="projected"),
        Rule("label_emb.0.{j:0=1|2=2}." + _P, "add_embedding.linear_{j}.{p}", when="added"),
        Rule(f"input_blocks.0.0.{_P}", "conv_in.{p}"),
        Rule(f"{_DOWN}0.{_LAYER}", _DOWN_TO + "resnets.{(k-1)%(l+1)}.{x}.{p}", why=_ROW),
        *_transformer(f"{_DOWN}1.", _DOWN_TO + "attentions.{(k-1)%(l+1)}.", "attention"),
        Rule(f"{_DOWN}0.op.{_P}", _DOWN_TO + "downsamplers.0.conv.{p}", why=_ROW, when="resampled"),
        Rule("middle_block.{m:0=0|2=1}." + _LAYER, "mid_block.resnets.{m}.{x}.{p}"),
        *_transformer(f"{_MIDDLE}.", "mid_block.attentions.0."),
        Rule(f"{_UP}0.{_LAYER}", _UP_TO + "resnets.{k%(l+1)}.{x}.{p}", why=_ROW),
        *_transformer(f"{_UP}1.", _UP_TO + "attentions.{k%(l+1)}.", "attention"),
        # After the transformer where the level has one, else in its place.
        Rule(f"{_UP}{{u:1|2}}.conv.{_P}", _UP_TO + "upsamplers.0.conv.{p}", why=_ROW, when="resampled"),
        Rule("out.{j:0=conv_norm_out|2=conv_out}." + _P, "{j}.{p}"),
    ),
    parameters=parameters,
    source_headers=original_headers,
    target_headers=diffusers_headers,
    infer_config=infer_config,
)  # fmt: skip
