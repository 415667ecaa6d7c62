"""What parity must know about Stable Diffusion XL beyond the recipes."""

from __future__ import annotations

from pathlib import Path

from conversions.common.autoencoder_kl.case import autoencoder_case
from parity.case import FamilyCases

REFERENCE = Path(__file__).parent / "reference"

CASES = FamilyCases(
    components=(autoencoder_case(REFERENCE / "vae.safetensors"),),
    code=("conversions.sdxl", "conversions.common", "porter.core"),
)
