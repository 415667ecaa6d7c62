"""FLUX.1-dev's transformer at its full size, for `python -m parity.scale`: 11.9 billion parameters, drawn from names.

    python -m parity.scale conversions/flux1/scale.py:DIFFUSERS_NATIVE
    PORTER_REFERENCES=<folder with a checkout `flux`> python -m parity.scale conversions/flux1/scale.py:ORIGINAL_NATIVE

B: images, S: image tokens, T: text tokens.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from conversions.flux1.case import DIFFUSERS, NATIVE, NATIVE_VERSUS_DIFFUSERS
from conversions.flux1.model import FluxTransformer
from conversions.flux1.recipe import MLP_RATIO, THETA, TRANSFORMER
from conversions.flux1.record import import_original
from parity.case import Case, Draw, Side
from porter.core.errors import MissingError

DEV: Mapping[str, Any] = {
    "patch_size": 1, "in_channels": 64, "out_channels": None, "num_layers": 19, "num_single_layers": 38,
    "attention_head_dim": 128, "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768,
    "guidance_embeds": True, "axes_dims_rope": [16, 56, 56],
}  # fmt: skip


def build_original(config: Mapping[str, Any]) -> nn.Module:
    """The original `Flux` for a diffusers config, from the checkout that PORTER_REFERENCES holds.

    Raises:
        MissingError: there is none.
    """
    references = os.environ.get("PORTER_REFERENCES")
    if not references:
        raise MissingError(
            "PORTER_REFERENCES names no folder with a checkout of the original FLUX code",
            hint="PORTER_REFERENCES=<folder that holds `flux`> python -m parity.scale …",
        )
    import_original(Path(references) / "flux")
    original = importlib.import_module("flux.model")
    params = original.FluxParams(
        in_channels=config["in_channels"],
        out_channels=config["out_channels"] or config["in_channels"],
        vec_in_dim=config["pooled_projection_dim"],
        context_in_dim=config["joint_attention_dim"],
        hidden_size=config["num_attention_heads"] * config["attention_head_dim"],
        mlp_ratio=MLP_RATIO,
        num_heads=config["num_attention_heads"],
        depth=config["num_layers"],
        depth_single_blocks=config["num_single_layers"],
        axes_dim=list(config["axes_dims_rope"]),
        theta=THETA,
        qkv_bias=True,
        guidance_embed=config["guidance_embeds"],
    )
    module: nn.Module = original.Flux(params)
    return module


def build_native(config: Mapping[str, Any]) -> nn.Module:
    """The native transformer."""
    return FluxTransformer.from_config(config)


def build_diffusers(config: Mapping[str, Any]) -> nn.Module:
    """diffusers' FluxTransformer2DModel."""
    from diffusers import FluxTransformer2DModel

    module: nn.Module = FluxTransformer2DModel(**{key: value for key, value in config.items() if key[0] != "_"})
    return module


def inputs(text: int, rows: int, columns: int) -> Callable[[Mapping[str, Any], Draw], dict[str, Tensor]]:
    """The original's inputs for one image of `rows` x `columns` patches and `text` tokens."""

    def made(config: Mapping[str, Any], draw: Draw) -> dict[str, Tensor]:
        ids = torch.zeros(rows, columns, 3)
        ids[..., 1], ids[..., 2] = torch.arange(float(rows))[:, None], torch.arange(float(columns))[None, :]
        given = {
            "img": draw("img", 1, rows * columns, config["in_channels"]),  # (B, S, C)
            "img_ids": ids.reshape(1, rows * columns, 3),
            "txt": draw("txt", 1, text, config["joint_attention_dim"]),  # (B, T, X)
            "txt_ids": torch.zeros(1, text, 3),
            "timesteps": draw.uniform("timesteps", 1),
            "y": draw("y", 1, config["pooled_projection_dim"]),
        }
        return given | ({"guidance": torch.tensor([3.5])} if config["guidance_embeds"] else {})

    return made


def case(
    reference: str, candidate: str, config: Mapping[str, Any] = DEV, tokens: tuple[int, int, int] = (512, 16, 16)
) -> Case:
    """Two of `original`, `native` and `diffusers` on the same weights. `tokens`: of text, rows, columns of patches."""
    sides = {
        "original": Side(build_original, name="flux.model:Flux"),
        "native": Side(build_native, NATIVE.passes["forward"], "native"),
        "diffusers": Side(build_diffusers, DIFFUSERS.passes["forward"], "diffusers"),
    }
    known = NATIVE if candidate == "native" else DIFFUSERS
    known = NATIVE_VERSUS_DIFFUSERS if reference == "diffusers" else known
    return Case(
        sides[reference], sides[candidate], inputs(*tokens), TRANSFORMER if reference == "original" else None, config,
        on_load=known.on_load, blocks=known.blocks, layout=known.layout, name="transformer",
    )  # fmt: skip


ORIGINAL_NATIVE = case("original", "native")
ORIGINAL_DIFFUSERS = case("original", "diffusers")
DIFFUSERS_NATIVE = case("diffusers", "native")
