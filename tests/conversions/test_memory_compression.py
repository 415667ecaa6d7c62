"""Compression of autoencoders by their configs against the real classes: what `decode` makes, on the meta device."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import conversions
from porter.core.compression import compression
from porter.core.described import full_config

FRAMES, SIDE = 3, 4  # of the latents


def catalogue() -> Iterator[Any]:
    """Every autoencoder of the catalogue's diffusers layouts, as its `build` says; and configs that leave it open."""
    root = Path(next(iter(conversions.__path__)))
    for file in sorted([*root.glob("*/layouts.json"), *root.glob("common/*/layouts.json")]):
        for row in json.loads(file.read_text(encoding="utf-8"))["layouts"]:
            if row["layout"] == "diffusers" and row["component"] == "vae":
                name = f"{file.parent.name} {row['class']} {row.get('model') or ''}"
                yield pytest.param(row["build"], id=name.strip())
    open_one = "from diffusers import AutoencoderKLLTX2Video\nAutoencoderKLLTX2Video()"
    yield pytest.param(open_one, id="ltx2 AutoencoderKLLTX2Video without ratios")
    magvit = (
        "from diffusers import AutoencoderKLMagvit\nAutoencoderKLMagvit(down_block_types=('SpatialDownBlock3D', "
        "'SpatialTemporalDownBlock3D', 'SpatialTemporalDownBlock3D', 'SpatialTemporalDownBlock3D'), "
        "up_block_types=('SpatialUpBlock3D', 'SpatialTemporalUpBlock3D', 'SpatialTemporalUpBlock3D', "
        "'SpatialTemporalUpBlock3D'))"
    )
    yield pytest.param(magvit, id="easyanimate AutoencoderKLMagvit")


def built(text: str) -> Any:
    """The module that a `build` makes: statements, then one expression."""
    tree = ast.parse(text)
    last = tree.body.pop()
    assert isinstance(last, ast.Expr)
    scope: dict[str, Any] = {}
    exec(compile(tree, "build", "exec"), scope)
    return eval(compile(ast.Expression(last.value), "build", "eval"), scope)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("build", list(catalogue()))
def test_a_config_tells_what_decoding_makes(build: str) -> None:
    with torch.device("meta"), torch.no_grad():
        model = built(build).eval()
        own = {key: value for key, value in model.config.items() if not key.startswith("_")}
        config = full_config("diffusers", type(model).__name__, own)
        channels = config.get("latent_channels") or config["z_dim"]
        flat = type(model).__name__ in ("AutoencoderKL", "AutoencoderKLFlux2", "AutoencoderDC")
        more = {"temb": torch.empty(1)} if config.get("timestep_conditioning") else {}
        frames = 1 if type(model).__name__ == "AutoencoderKLQwenImage21" else FRAMES  # pictures alone
        shape = (1, channels, SIDE, SIDE) if flat else (1, channels, frames, SIDE, SIDE)
        picture = model.decode(torch.empty(shape), **more, return_dict=False)[0].shape
    spatial, temporal = compression(config)
    assert picture[-1] == picture[-2] == SIDE * (spatial or 0)
    assert flat or picture[2] == (frames - 1) * temporal + 1
