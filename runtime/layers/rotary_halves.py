"""Rotary position embedding whose pairs are a head's two halves (split-half).

L: tokens, N: heads, E: head width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def apply_rotary_halves(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate each pair (x[i], x[i + E/2]) by its angle, in float32. x: (B, L, N, E), table: (L, E / 2) twice."""
    cos, sin = (part[:, None, :] for part in table)  # (L, 1, E / 2)
    first, second = x.float().chunk(2, dim=-1)  # (B, L, N, E / 2) each
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
