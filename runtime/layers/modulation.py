"""LayerNorm whose scale and shift come from a conditioning vector.  B: batch, L: tokens, D: width."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x: (B, L, D), shift and scale: (B, 1, D) -> (B, L, D)."""
    return x * (1 + scale) + shift


class AdaLayerNorm(nn.Module):
    """Normalises x and computes `parts` modulation vectors from the conditioning vector.

    The first two vectors are the norm's own shift and scale (scale and shift when `scale_first`); the others are
    returned for the caller's gates and later norms.
    """

    def __init__(self, width: int, parts: int, *, scale_first: bool = False, eps: float = 1e-6) -> None:
        super().__init__()
        self.parts, self.scale_first = parts, scale_first
        self.linear = nn.Linear(width, parts * width)
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=eps)

    def forward(self, x: Tensor, vec: Tensor) -> tuple[Tensor, ...]:
        """x: (B, L, D), vec: (B, D) -> modulated x (B, L, D), then parts - 2 vectors (B, 1, D)."""
        shift, scale, *rest = self.linear(F.silu(vec)).unsqueeze(1).chunk(self.parts, dim=-1)
        if self.scale_first:
            shift, scale = scale, shift
        return modulate(self.norm(x), shift, scale), *rest
