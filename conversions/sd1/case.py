"""What parity must know about this family beyond its recipes."""

from __future__ import annotations

from pathlib import Path

from conversions.common.unet.case import unet
from parity.case import FamilyCases

HERE = Path(__file__).parent
UNETS = (unet(HERE / "reference" / "unet.safetensors"),)

CASES = FamilyCases(components=(*UNETS,), code=("conversions.sd1", "conversions.common", "porter.core"))
