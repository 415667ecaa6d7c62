"""What parity must know about Z-Image beyond the recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from conversions.common.candidates import diffusers_candidate
from parity.case import ComponentCase, FamilyCases, Named

HERE = Path(__file__).parent


def _forward(model: Any, given: Named) -> tuple[Tensor, ...]:
    """Lists of pictures (C, F, H, W) and of captions (T, E); t (B)."""
    pictures, captions = ([given[f"{name}{i}"] for i in range(2)] for name in ("x", "caption"))
    return tuple(model(pictures, given["t"], captions, return_dict=False)[0])


DIFFUSERS = diffusers_candidate("ZImageTransformer2DModel", {"forward": _forward})

CASES = FamilyCases(
    components=(
        ComponentCase(
            "transformer", "conversions.z_image.recipe:TRANSFORMER", HERE / "reference" / "transformer.safetensors",
            (DIFFUSERS,),
        ),
    ),
    code=("conversions.z_image", "conversions.common", "porter.core"),
)  # fmt: skip
