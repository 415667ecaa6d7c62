"""Activation memory of Stable Diffusion 3's transformer. Eager, no gradients, fused attention.

B batch · L image tokens · T text tokens · S = L + T · d width
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conversions.common.denoising import patches
from porter.core.memory import Workload

CLIP_TOKENS = 77  # stand before T5's, whose number the user chooses


def forward(config: Mapping[str, Any], work: Workload) -> int:
    """Bytes at the peak of one forward: the image's feed-forward, when its activation is made.

    Both sides of the activation (8·L·d); the block's input, the sum with attention, its normalised copy and the
    scaled one (4·L·d); attention's joint result, of which the text's part is still to come (S·d); with a second
    attention in the block, that one's result too (L·d). The text's input and normalised copy (2·T·d).
    """
    image, text = patches(work, config["patch_size"]), work.text_tokens + CLIP_TOKENS
    width = config["num_attention_heads"] * config["attention_head_dim"]
    dual = 1 if config.get("dual_attention_layers") else 0
    given = text * config["joint_attention_dim"]
    return int(work.batch * work.element * (width * (image * (13 + dual) + 3 * text) + given))


FORMULAS = {"SD3Transformer2DModel": forward}
