"""What float16 can hold."""

from __future__ import annotations

import torch
from torch import Tensor


def clip_half(x: Tensor) -> Tensor:
    """Clip to float16's largest number, in float16 only."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x
