"""What parity needs to see diffusers' pipelines and native ones as the same stages.  B: pictures."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from parity.stages import Request


class OneAfterTheOther(nn.Module):
    """A denoiser that gets both halves of classifier-free guidance in one batch, and runs the prompt's half first.

    The native loop runs them so; diffusers puts the negative half before the other, in one call. Each half's numbers
    are the same up to rounding.
    """

    def __init__(self, denoiser: Any) -> None:
        super().__init__()
        self.denoiser, self.config, self.device = denoiser, denoiser.config, denoiser.device
        self.guided = False  # whether batches have two halves

    def forward(self, *, return_dict: bool, **given: Any) -> tuple[Tensor]:
        """Every tensor of `given` has 2 B rows where the run is guided, otherwise B."""
        if not self.guided:
            return (self.denoiser(**given, return_dict=return_dict)[0],)
        parts = [{k: v.chunk(2)[i] if isinstance(v, Tensor) else v for k, v in given.items()} for i in (1, 0)]
        positive, negative = (self.denoiser(**part, return_dict=return_dict)[0] for part in parts)
        return (torch.cat((negative, positive)),)


def size_of(request: Request, side: int, multiple: int) -> tuple[int, int]:
    """Height and width in pixels of what is asked for; `side` is the model's own."""
    height, width = (max(multiple, int(part * side) // multiple * multiple) for part in request.part)
    return height, width


def levels(pictures: list[Any]) -> Tensor:
    """PIL pictures -> uint8 (B, 3, H, W)."""
    return torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1) for p in pictures])


def saved_by_diffusers(image: Tensor) -> Tensor:
    """What diffusers would write of pictures (B, 3, H, W) in [0, 1] -> uint8."""
    from diffusers.image_processor import VaeImageProcessor

    return levels(VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(image)))
