"""The original DiT, at tiny size; see `conversions.record_reference`.

The original takes three layers from timm, which need not be installed: `PatchEmbed`, `Attention` and `Mlp` below have
timm's names, shapes and numbers, without its options that DiT leaves alone. The original takes square pictures only.

A released file holds the table of places as the class computes it. The drawn file has other numbers there, which the
original is given back its own for: so a port that took the table from the file would differ.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from conversions.record_reference import Original, Passes

REPOSITORY, COMMIT = "facebookresearch/DiT", "ed81ce2229091fd4ecc9a223645f95cf379d582b"
NOTE = "timm's PatchEmbed, Attention and Mlp are replaced by equivalents; pos_embed is the class's own, not the file's"


class PatchEmbed(nn.Module):
    """Square patches of a picture (B, C, H, W) as tokens (B, N, E), row by row."""

    def __init__(self, img_size: int, patch_size: int, in_chans: int, embed_dim: int, bias: bool = True) -> None:
        super().__init__()
        self.patch_size = (patch_size, patch_size)
        self.num_patches = (img_size // patch_size) ** 2
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.proj(x).flatten(2).transpose(1, 2)  # (B, E, H, W) -> (B, N, E)
        return tokens


class Attention(nn.Module):
    """Attention over tokens (B, N, E) with q, k and v from one matrix, in this order, each head after head."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        weights = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1)  # (B, heads, N, N)
        joined: Tensor = self.proj((weights @ v).transpose(1, 2).flatten(2))
        return joined


class Mlp(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, in_features: int, hidden_features: int, act_layer: Callable[[], nn.Module], drop: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden_features, in_features)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.act(self.fc1(x)))
        return out


def original_models() -> ModuleType:
    """The original's `models.py`, with these layers in timm's place while it is imported."""
    stand_in = ModuleType("timm.models.vision_transformer")
    for layer in (PatchEmbed, Attention, Mlp):
        setattr(stand_in, layer.__name__, layer)
    names = ("timm", "timm.models", stand_in.__name__)
    before = {name: sys.modules.get(name) for name in names}
    sys.modules |= {name: ModuleType(name) for name in names[:2]} | {stand_in.__name__: stand_in}
    try:
        return importlib.import_module("models")
    finally:
        for name, module in before.items():
            del sys.modules[name]
            sys.modules.update({name: module} if module else {})


def _build() -> nn.Module:
    module: nn.Module = original_models().DiT(
        input_size=6, patch_size=2, in_channels=3, hidden_size=24, depth=3, num_heads=3, num_classes=10
    )
    return module


def _passes(module: Any, draw: torch.Generator) -> Passes:
    """Two pictures of 3 x 3 patches, two times, a class and no class."""
    places = sys.modules[type(module).__module__].get_2d_sincos_pos_embed(24, 3)
    module.pos_embed.data.copy_(torch.from_numpy(places).float()[None])
    inputs = {
        "x": torch.randn(2, 3, 6, 6, generator=draw),
        "t": torch.tensor([937.0, 21.0]),
        "y": torch.tensor([4, 10]),
    }
    return {"forward": (lambda m, given: m(given["x"], given["t"], given["y"].long()), inputs)}


ORIGINALS = (
    Original(
        "transformer", "transformer", REPOSITORY, COMMIT, ("models.py",), _build, _passes,
        config={"num_attention_heads": 3}, note=NOTE,
    ),
)  # fmt: skip
