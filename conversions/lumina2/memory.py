"""Activation memory of Lumina 2's transformer. Eager, no gradients, fused attention.

B batch · L image tokens · T text tokens · S = L + T · d width · f width of the gated feed-forward · h width of a head
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conversions.common.denoising import FLOAT, patches
from porter.core.memory import Workload

COMPLEX = 16  # bytes of a complex number of two float64


def forward(config: Mapping[str, Any], work: Workload) -> int:
    """Bytes at the peak of one forward: the gated feed-forward of a main block, whose activation is in float32.

    A projection, its float32 copy and the activated one (B·S·f in the model's dtype, 2·B·S·f in float32), which in a
    float32 model is as much as the activated and the other projection with their product; the joined sequence, its
    sum with attention, attention's result, and normalised and scaled copies (6·B·S·d). Rotary positions are complex
    numbers in double precision, for each sequence (B·(S + L)·h/2).
    """
    image, text = patches(work, config["patch_size"]), work.text_tokens
    width, multiple = config["hidden_size"], config["multiple_of"]
    inner = int((config.get("ffn_dim_multiplier") or 1) * 4 * width)
    inner = -(-inner // multiple) * multiple
    numbers = work.element * (inner + 6 * width) + 2 * FLOAT * inner
    tables = (2 * image + text) * sum(config["axes_dim_rope"]) // 2 * COMPLEX
    given = text * (config["cap_feat_dim"] + width)
    return int(work.batch * ((image + text) * numbers + given * work.element + tables))


FORMULAS = {"Lumina2Transformer2DModel": forward}
