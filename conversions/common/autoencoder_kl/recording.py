"""What the recordings of the original autoencoders share: inputs, and the training code's imports."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

LEVELS = (1, 2, 2)  # of the tiny models: one level wider than the one before, one as wide


def ddconfig(latents: int) -> dict[str, Any]:
    """The original's `ddconfig`, tiny: three levels, one block each, attention in the middle."""
    return {
        "double_z": True, "z_channels": latents, "resolution": 32, "in_channels": 3, "out_ch": 3, "ch": 32,
        "ch_mult": list(LEVELS), "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0,
    }  # fmt: skip


def without_lightning() -> None:
    """The models are LightningModules for their training only: as plain modules they compute the same."""
    lightning = ModuleType("pytorch_lightning")
    lightning.__spec__ = ModuleSpec("pytorch_lightning", None)
    lightning.LightningModule = nn.Module  # type: ignore[attr-defined]
    sys.modules.setdefault("pytorch_lightning", lightning)


def image_and_latents(latents: int, draw: torch.Generator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(pixels of two pictures, higher than wide; latents of two others): attention sees 4 x 3 positions."""
    side = 2 ** (len(LEVELS) - 1)
    pixels = torch.rand(2, 3, 4 * side, 3 * side, generator=draw) * 2 - 1
    return {"x": pixels}, {"z": torch.randn(2, latents, 4, 3, generator=draw)}
