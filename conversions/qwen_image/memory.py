"""Activation memory of Qwen-Image's transformer. Eager, no gradients, fused attention.

B batch · L image tokens · T text tokens · d width · h width of a head
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conversions.common.denoising import patches
from porter.core.memory import Workload

COMPLEX = 8  # bytes of a complex number of two float32


def forward(config: Mapping[str, Any], work: Workload) -> int:
    """Bytes at the peak of one forward: the image's feed-forward, when its activation is made.

    Both sides of the activation (8·L·d), and what the block's names still hold of the image: its input, two
    normalised copies and their modulated ones, attention's result and the sum with it (7·L·d); of the text the same
    without what its feed-forward will make (5·T·d). Rotary positions are complex numbers, made once (two of L·h/2).
    """
    image, text = patches(work), work.text_tokens
    head = config["attention_head_dim"]
    width = config["num_attention_heads"] * head
    given = text * config["joint_attention_dim"] + image * config["in_channels"]
    numbers = width * (15 * image + 5 * text) + given
    return int(work.batch * work.element * numbers + image * head * COMPLEX)


FORMULAS = {"QwenImageTransformer2DModel": forward}
