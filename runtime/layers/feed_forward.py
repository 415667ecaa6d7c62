"""The transformer's feed-forward layer.  B: batch, L: tokens, D: width."""

from __future__ import annotations

from torch import Tensor, nn


class _GELUProjection(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, inner)
        self.act = nn.GELU(approximate="tanh")

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(self.proj(x))
        return y


class FeedForward(nn.Module):
    """Linear, GELU (tanh form), linear: (B, L, D) -> (B, L, D)."""

    def __init__(self, width: int, ratio: int = 4) -> None:
        super().__init__()
        # The identity keeps the second linear at `net.2`, its name on disk.
        self.net = nn.Sequential(_GELUProjection(width, ratio * width), nn.Identity(), nn.Linear(ratio * width, width))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x)
        return y
