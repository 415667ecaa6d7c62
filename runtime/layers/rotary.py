"""Rotary position embedding over several axes, interleaved pairs.

L: tokens, A: axes, N: heads, E: head width; `sum(widths) == E`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def rotary_table(ids: Tensor, widths: Sequence[int], theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every token's angles, axis after axis, computed in float64 and rounded to float32 once.

    ids: (L, A) positions -> two tensors (L, E / 2).
    """
    angles = []
    for axis, width in enumerate(widths):
        exponent = torch.arange(0, width, 2, dtype=torch.float64, device=ids.device) / width  # (width / 2,)
        angles.append(ids[:, axis, None].double() * theta**-exponent)  # (L, width / 2)
    angle = torch.cat(angles, dim=-1)  # (L, E / 2)
    return angle.cos().float(), angle.sin().float()


def apply_rotary(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate each pair (x[2i], x[2i+1]) by its angle, in float32.

    x: (B, L, N, E), table: (L, E / 2) twice; where the batch's places differ, (B, L, E / 2) twice.
    """
    cos, sin = (part[..., None, :] for part in table)  # (…, L, 1, E / 2)
    even, odd = x.float().reshape(*x.shape[:-1], -1, 2).unbind(-1)  # (B, L, N, E / 2) each
    rotated = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
    return rotated.flatten(-2).to(x.dtype)
