"""What parity must know about DiT beyond the recipe.

diffusers' class spaces the frequencies of the time's sinusoids over 127 steps, the original over 128: as it is, it does
not compute what the original computes. The candidate here has the original's frequencies, and is otherwise diffusers'.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from conversions.common.candidates import diffusers_candidate, load
from parity.case import ComponentCase, FamilyCases, Named

HERE = Path(__file__).parent
CLASS = "DiTTransformer2DModel"


def _forward(model: Any, given: Named) -> Tensor:
    """x (B, C, H, W), t (B), y (B)."""
    out: Tensor = model(given["x"], timestep=given["t"], class_labels=given["y"].long(), return_dict=False)[0]
    return out


def _load(folder: Path) -> nn.Module:
    """The class with the original's frequencies."""
    module = load("diffusers", CLASS, folder)
    for path, child in module.named_modules():
        if path.endswith(".time_proj"):
            child.downscale_freq_shift = 0.0
    return module


AS_IT_IS = diffusers_candidate(CLASS, {"forward": _forward})
DIFFUSERS = replace(AS_IT_IS, name="diffusers, with the original's frequencies of the time", load=_load)

CASES = FamilyCases(
    components=(
        ComponentCase(
            "transformer", "conversions.dit.recipe:TRANSFORMER", HERE / "reference" / "transformer.safetensors",
            (DIFFUSERS,),
        ),
    ),
    code=("conversions.dit", "conversions.common", "porter.core"),
)  # fmt: skip
