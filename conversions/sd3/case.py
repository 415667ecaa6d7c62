"""What parity must know about Stable Diffusion 3 beyond the recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from conversions.common.autoencoder_kl.case import autoencoder_case
from conversions.common.candidates import diffusers_candidate, heads_and_tokens
from parity.case import ComponentCase, FamilyCases, Named

HERE = Path(__file__).parent


def _forward(model: Any, given: Named) -> Tensor:
    """x (B, C, H, W), t (B), y (B, pooled), context (B, T, joint)."""
    out: Tensor = model(
        hidden_states=given["x"], timestep=given["t"], pooled_projections=given["y"],
        encoder_hidden_states=given["context"], return_dict=False,
    )[0]  # fmt: skip
    return out


DIFFUSERS = diffusers_candidate("SD3Transformer2DModel", {"forward": _forward}, heads_and_tokens(r"\.ln_[qk]"))

CASES = FamilyCases(
    components=(
        *(
            ComponentCase(
                "transformer", "conversions.sd3.recipe:TRANSFORMER",
                HERE / "reference" / f"transformer-{variant}.safetensors", (DIFFUSERS,),
            )
            for variant in ("medium", "3.5-medium", "3.5-large")
        ),
        autoencoder_case(HERE / "reference" / "vae.safetensors"),
    ),
    code=("conversions.sd3", "conversions.common", "porter.core"),
)  # fmt: skip
