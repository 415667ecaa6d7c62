"""What parity must know about this family beyond its recipes."""

from __future__ import annotations

from pathlib import Path

from conversions.common.unet.case import unet
from parity.case import FamilyCases

HERE = Path(__file__).parent
UNETS = tuple(unet(HERE / "reference" / f"{name}.safetensors") for name in ("unet", "unet-unclip", "unet-upscaler"))

CASES = FamilyCases(components=(*UNETS,), code=("conversions.sd2", "conversions.common", "porter.core"))
