"""The original PixArt-alpha transformers against diffusers' class, at small width.

    porter parity --case conversions/pixart/original.py:transformer --reference-repo <checkout> --shims

`transformer` is the model of one size, `transformer_1024` the one that is told sizes and shapes of pictures. diffusers'
script cannot be imported without its arguments, so what it does stands here again. What was measured is not in this
file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from parity.case import Case, Draw, Named, Side

REPOSITORY, COMMIT = "PixArt-alpha/PixArt-alpha", "cac2fd3b4544cf7620d8fbbf8b19d97ffcb85892"

CONFIG = {
    "input_size": 8, "hidden_size": 24, "depth": 2, "num_heads": 3, "caption_channels": 20, "model_max_length": 7,
}  # fmt: skip
MISSING = ("mmcv", "torchvision")  # imported for training
NAMES = {
    "x_embedder.proj": "pos_embed.proj", "y_embedder.y_proj.fc": "caption_projection.linear_",
    "t_block.1": "adaln_single.linear",
    "t_embedder.mlp.0": "adaln_single.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "adaln_single.emb.timestep_embedder.linear_2",
    "csize_embedder.mlp.0": "adaln_single.emb.resolution_embedder.linear_1",
    "csize_embedder.mlp.2": "adaln_single.emb.resolution_embedder.linear_2",
    "ar_embedder.mlp.0": "adaln_single.emb.aspect_ratio_embedder.linear_1",
    "ar_embedder.mlp.2": "adaln_single.emb.aspect_ratio_embedder.linear_2",
    "final_layer.linear": "proj_out", "final_layer.scale": "scale", "cross_attn.q_linear": "attn2.to_q",
    "cross_attn.proj": "attn2.to_out.0", "attn.proj": "attn1.to_out.0", "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "blocks.": "transformer_blocks.",
}  # fmt: skip


def _original(config: Mapping[str, Any]) -> nn.Module:
    from diffusion.model.nets.PixArt import PixArt  # type: ignore[import-not-found]

    module: nn.Module = PixArt(**config)
    return module


def _original_1024(config: Mapping[str, Any]) -> nn.Module:
    from diffusion.model.nets.PixArtMS import PixArtMS  # type: ignore[import-not-found]

    module: nn.Module = PixArtMS(**config)
    return module


def _diffusers(config: Mapping[str, Any], sizes: bool = False) -> nn.Module:
    from diffusers import PixArtTransformer2DModel

    width, heads = config["hidden_size"], config["num_heads"]
    module: nn.Module = PixArtTransformer2DModel(
        sample_size=config["input_size"], num_layers=config["depth"], attention_head_dim=width // heads,
        num_attention_heads=heads, in_channels=4, out_channels=8, patch_size=2, cross_attention_dim=width,
        caption_channels=config["caption_channels"], interpolation_scale=1, use_additional_conditions=sizes,
    )  # fmt: skip
    return module


def _convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    made: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name in ("pos_embed", "y_embedder.y_embedding"):  # computed; of training
            continue
        renamed = name.replace("attn.qkv", "attn1.qkv").replace("cross_attn.kv_linear", "attn2.kv")
        for old, new in NAMES.items():
            renamed = renamed.replace(old, new)
        stem, _, kind = renamed.rpartition(".")
        block, _, letters = stem.rpartition(".")
        if letters in ("qkv", "kv"):
            for letter, rows in zip(letters, tensor.chunk(len(letters)), strict=True):
                made[f"{block}.to_{letter}.{kind}"] = rows
        else:
            made[renamed] = tensor
    return made


def _inputs(config: Mapping[str, Any], draw: Draw) -> dict[str, Tensor]:
    """Two pictures of 4 x 4 patches; captions of seven and four tokens."""
    return {
        "x": draw("x", 2, 4, 8, 8),
        "t": draw.uniform("t", 2, high=1000),
        "y": draw("y", 2, 1, 7, config["caption_channels"]),
        "mask": (torch.arange(7) < torch.tensor([[7], [4]])).long(),
    }


def _sized(config: Mapping[str, Any], draw: Draw) -> dict[str, Tensor]:
    return _inputs(config, draw) | {
        "size": torch.tensor([[1024.0, 960], [512, 640]]),
        "ratio": torch.tensor([[1.5], [0.75]]),
    }


def _recorded(model: Any, x: Named) -> Any:
    told = {"img_hw": x["size"], "aspect_ratio": x["ratio"]} if "size" in x else None
    return model(x["x"], x["t"], x["y"], mask=x["mask"], data_info=told)


def _answer(model: Any, x: Named) -> Any:
    return model(
        x["x"], encoder_hidden_states=x["y"][:, 0], timestep=x["t"], encoder_attention_mask=x["mask"],
        added_cond_kwargs={"resolution": x.get("size"), "aspect_ratio": x.get("ratio")}, return_dict=False,
    )[0]  # fmt: skip


transformer = Case(
    Side(_original, _recorded, stubs=MISSING), Side(_diffusers, _answer), _inputs, _convert, CONFIG, keep="pos_embed",
    name="transformer",
)  # fmt: skip
transformer_1024 = Case(
    Side(_original_1024, _recorded, stubs=MISSING), Side(lambda config: _diffusers(config, sizes=True), _answer),
    _sized, _convert, CONFIG, keep="pos_embed", name="transformer_1024",
)  # fmt: skip
