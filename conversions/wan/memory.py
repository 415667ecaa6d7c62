"""Activation memory of Wan's transformer. Eager, no gradients, fused attention.

B batch · L tokens of the video · d width · f width of the feed-forward · h width of a head
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conversions.common.denoising import FLOAT, patches
from porter.core.memory import Workload


def forward(config: Mapping[str, Any], work: Workload) -> int:
    """Bytes at the peak of one forward, at the end of a block; the larger of two moments.

    Both have the block's input, the sum with attention, the normalised input of the feed-forward and
    cross-attention's result (4·B·L·d):

    1. the feed-forward's activation: both sides of it (2·B·L·f);
    2. the gated sum, in float32: the feed-forward's result (B·L·d), and in float32 the sum so far, the result and
       their product (3·B·L·d). In a float32 model the copies cost nothing, and the first moment is the larger.
    """
    patch = config["patch_size"]
    tokens = patches(work, patch[1], patch[0])
    head = config["attention_head_dim"]
    width = config["num_attention_heads"] * head
    copies = 2 if work.element < FLOAT else 0
    activated = work.element * (2 * config["ffn_dim"] + 4 * width)
    gated = width * (5 * work.element + (1 + copies) * FLOAT)
    text = work.text_tokens * (config["text_dim"] + width)
    latents = config["in_channels"] * work.latent_frames * work.latent_height * work.latent_width
    tables = 2 * tokens * head * FLOAT
    return int(work.batch * (tokens * max(activated, gated) + work.element * (text + latents)) + tables)


FORMULAS = {"WanTransformer3DModel": forward}
