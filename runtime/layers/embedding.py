"""Embeddings of scalars and vectors.  B: batch, D: width."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def sinusoid(t: Tensor, width: int, max_period: float = 10000.0, *, scale: float = 1.0) -> Tensor:
    """Cosines, then sines, of `t` at `width / 2` frequencies from 1 down to nearly 1 / max_period.

    t: (B,) -> (B, width), float32 whatever the type of `t`. `scale` multiplies the angles, after `t` was rounded.
    """
    half = width // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device)
    frequencies = torch.exp(-math.log(max_period) * steps / half)  # (half,)
    angles = t[:, None].float() * frequencies * scale  # (B, half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class MLPEmbedder(nn.Module):
    """Two linear layers with an activation between them, SiLU if none is given: (…, in_width) -> (…, D)."""

    def __init__(self, in_width: int, width: int, act: nn.Module | None = None) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_width, width)
        self.act = act or nn.SiLU()
        self.linear_2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear_2(self.act(self.linear_1(x)))
        return y
