"""The original transformer of Z-Image's repository, at tiny size; see `conversions.record_reference`.

On a CPU the original's attention is torch's own, which it chooses itself.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from conversions.record_reference import Original, Passes

REPOSITORY, COMMIT = "Tongyi-MAI/Z-Image", "c7ec13578cc27b01d547e1b3c62bc8b95bc6cb6e"
FILES = ("src/zimage/transformer.py", "src/config/model.py", "src/utils/attention.py")
CONFIG = {"norm_eps": 1e-5, "rope_theta": 256.0, "t_scale": 1000.0, "axes_dims": [4, 6, 6], "axes_lens": [96, 32, 32]}


def _build() -> nn.Module:
    module: nn.Module = importlib.import_module("zimage.transformer").ZImageTransformer2DModel(
        in_channels=3, dim=48, n_layers=2, n_refiner_layers=2, n_heads=3, n_kv_heads=3, cap_feat_dim=20, **CONFIG
    )
    return module


def _call(model: Any, given: dict[str, Tensor]) -> tuple[Tensor, ...]:
    pictures, captions = ([given[f"{name}{i}"] for i in range(2)] for name in ("x", "caption"))
    return tuple(model(pictures, given["t"], captions)[0])


def _passes(module: Any, draw: torch.Generator) -> Passes:
    """Two pictures (C, 1, H, W) of 12 and 35 patches, filled to 32 and 64, and captions of 35 and 50 tokens.

    Both captions are filled to 64: where one is filled up to the other's tokens, diffusers gives those rows an angle
    and the original none. They are masked, so no result depends on them, but their activations differ.
    """
    return {"forward": (_call, _inputs(((8, 6), (10, 14)), draw))}


def _batch(module: Any, draw: torch.Generator) -> Passes:
    """The same with two pictures of 20 patches, filled to 32: what a batch can hold."""
    return {"forward": (_call, _inputs(((8, 10), (8, 10)), draw))}


def _inputs(sizes: tuple[tuple[int, int], ...], draw: torch.Generator) -> dict[str, Tensor]:
    pictures = {f"x{i}": torch.randn(3, 1, *size, generator=draw) for i, size in enumerate(sizes)}
    captions = {f"caption{i}": torch.randn(length, 20, generator=draw) for i, length in enumerate((35, 50))}
    return pictures | captions | {"t": torch.tensor([0.0625, 0.79])}


ORIGINALS = tuple(
    Original(
        name, "transformer", REPOSITORY, COMMIT, FILES, _build, passes, config=CONFIG, paths=("src",),
        absent=("loguru",),
    )
    for name, passes in (("transformer", _passes), ("transformer-batch", _batch))
)  # fmt: skip
