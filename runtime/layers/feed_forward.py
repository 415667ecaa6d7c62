"""The transformer's feed-forward layer.  B: batch, L: tokens, D: width."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn


class _GELUProjection(nn.Module):
    def __init__(self, width: int, inner: int, gelu: Literal["tanh", "none"]) -> None:
        super().__init__()
        self.proj = nn.Linear(width, inner)
        self.act = nn.GELU(approximate=gelu)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(self.proj(x))
        return y


class FeedForward(nn.Module):
    """Linear, GELU, linear: (B, L, D) -> (B, L, D), or as wide as `out`."""

    def __init__(
        self,
        width: int,
        ratio: int = 4,
        *,
        inner: int | None = None,
        out: int | None = None,
        gelu: Literal["tanh", "none"] = "tanh",
    ) -> None:
        """inner: width between the two, `ratio` times the width where it is not given; gelu: its approximation."""
        super().__init__()
        inner, out = inner or ratio * width, out or width
        # The identity keeps the second linear at `net.2`, its name on disk.
        self.net = nn.Sequential(_GELUProjection(width, inner, gelu), nn.Identity(), nn.Linear(inner, out))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x)
        return y
