"""How diffusers' UNet2DConditionModel is called with the inputs that the original UNets were recorded with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from conversions.common.candidates import diffusers_candidate
from parity.case import ComponentCase, Named


def _forward(model: Any, given: Named) -> Tensor:
    """x (B, C, H, W), timesteps (B), context (B, T, text); y (B, projection), classes (B), pooled and sizes (B, 6)."""
    more: dict[str, Any] = {}
    if "y" in given:
        more = {"class_labels": given["y"]}
    if "classes" in given:
        more = {"class_labels": given["classes"].long()}
    if "sizes" in given:
        more = {"added_cond_kwargs": {"text_embeds": given["pooled"], "time_ids": given["sizes"]}}
    out: Tensor = model(given["x"], given["timesteps"], given["context"], return_dict=False, **more)[0]
    return out


DIFFUSERS = diffusers_candidate("UNet2DConditionModel", {"forward": _forward})


def unet(trace: Path) -> ComponentCase:
    """The UNet against one of its traces."""
    return ComponentCase("unet", "conversions.common.unet.recipe:UNET", trace, (DIFFUSERS,))
