"""What parity must know about Stable Diffusion 1.x beyond the recipes."""

from __future__ import annotations

from pathlib import Path

from conversions.common.autoencoder_kl.case import autoencoder_case
from conversions.common.unet.case import unet
from parity.case import FamilyCases

REFERENCE = Path(__file__).parent / "reference"

CASES = FamilyCases(
    components=(unet(REFERENCE / "unet.safetensors"), autoencoder_case(REFERENCE / "vae.safetensors")),
    code=("conversions.sd1", "conversions.common", "porter.core"),
)
