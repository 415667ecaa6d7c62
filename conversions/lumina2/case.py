"""What parity must know about Lumina-Image 2.0 beyond the recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from conversions.common.candidates import diffusers_candidate
from parity.case import ComponentCase, FamilyCases, Named

HERE = Path(__file__).parent


def _forward(model: Any, given: Named) -> Tensor:
    """x (B, C, H, W), t (B), caption (B, T, E), mask (B, T) of the caption's tokens."""
    out: Tensor = model(
        hidden_states=given["x"], timestep=given["t"], encoder_hidden_states=given["caption"],
        encoder_attention_mask=given["mask"].bool(), return_dict=False,
    )[0]  # fmt: skip
    return out


DIFFUSERS = diffusers_candidate("Lumina2Transformer2DModel", {"forward": _forward})

CASES = FamilyCases(
    components=(
        ComponentCase(
            "transformer", "conversions.lumina2.recipe:TRANSFORMER", HERE / "reference" / "transformer.safetensors",
            (DIFFUSERS,),
        ),
    ),
    code=("conversions.lumina2", "conversions.common", "porter.core"),
)  # fmt: skip
