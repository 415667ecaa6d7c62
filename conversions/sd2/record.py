"""The original text encoder of Stable Diffusion 2.x, at tiny size; see `conversions.record_reference`.

Its autoencoder is Stable Diffusion 1.x's.
"""

from __future__ import annotations

from conversions.common.clip.recording import recorded

ORIGINALS = (recorded("text_encoder", whole=False),)
