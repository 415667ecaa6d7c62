"""What parity must know about Stable Diffusion XL beyond the recipes."""

from __future__ import annotations

from pathlib import Path

from conversions.common.autoencoder_kl.case import autoencoder_case
from conversions.common.clip.case import encoder_case
from conversions.common.unet.case import unet
from parity.case import FamilyCases

REFERENCE = Path(__file__).parent / "reference"

CASES = FamilyCases(
    components=(
        encoder_case(
            "text_encoder_2", "WITH_PROJECTION", "CLIPTextModelWithProjection",
            REFERENCE / "text_encoder_2.safetensors",
        ),
        autoencoder_case(REFERENCE / "vae.safetensors"),
        *(unet(REFERENCE / f"{name}.safetensors") for name in ("unet-base", "unet-refiner")),
    ),
    code=("conversions.sdxl", "conversions.common", "porter.core"),
)  # fmt: skip
