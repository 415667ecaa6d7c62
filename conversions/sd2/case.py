"""What parity must know about Stable Diffusion 2.x beyond the recipes."""

from __future__ import annotations

from pathlib import Path

from conversions.common.clip.case import encoder_case
from conversions.common.unet.case import unet
from parity.case import FamilyCases

REFERENCE = Path(__file__).parent / "reference"

CASES = FamilyCases(
    components=(
        encoder_case("text_encoder", "PENULTIMATE", "CLIPTextModel", REFERENCE / "text_encoder.safetensors"),
        *(unet(REFERENCE / f"{name}.safetensors") for name in ("unet", "unet-unclip", "unet-upscaler")),
    ),
    code=("conversions.sd2", "conversions.common", "porter.core"),
)
