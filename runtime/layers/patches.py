"""Latents as tokens of 2 x 2 positions, and back.  B: images, C: channels, h, w: latent positions, S = h * w / 4."""

from __future__ import annotations

from torch import Tensor


def pack(latents: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, S, 4 C): channels outermost in a token, then the patch's row, then its column."""
    patches = latents.unfold(2, 2, 2).unfold(3, 2, 2)  # (B, C, h / 2, w / 2, 2, 2)
    return patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)


def unpack(tokens: Tensor, shape: tuple[int, ...]) -> Tensor:
    """(B, S, 4 C) -> `shape`, which is (B, C, h, w)."""
    count, channels, height, width = shape
    patches = tokens.reshape(count, height // 2, width // 2, channels, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(count, channels, height, width)
