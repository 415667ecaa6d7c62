"""Activation memory of PixArt's transformer. Eager, no gradients, fused attention.

B batch · L image tokens · T text tokens · d width
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conversions.common.denoising import patches
from porter.core.memory import Workload


def forward(config: Mapping[str, Any], work: Workload) -> int:
    """Bytes at the peak of one forward: the feed-forward's activation.

    Both sides of it (8·B·L·d); the block's input, the sum with attention, cross-attention's result and the scaled
    input (4·B·L·d); the text as given and projected.
    """
    tokens = patches(work, config["patch_size"])
    width = config["num_attention_heads"] * config["attention_head_dim"]
    text = work.text_tokens * (config["caption_channels"] + width)
    return int(work.batch * work.element * (12 * tokens * width + text))


FORMULAS = {"PixArtTransformer2DModel": forward}
