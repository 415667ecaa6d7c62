"""Activation memory of LTX-Video's transformer. Eager, no gradients, fused attention.

B batch · L tokens of the video, one for each latent position · d width
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conversions.common.denoising import FLOAT, patches, rotary
from porter.core.memory import Workload


def forward(config: Mapping[str, Any], work: Workload) -> int:
    """Bytes at the peak of one forward; the larger of two moments of a block.

    The tables of rotary positions are as wide as the model, in float32, one for each sequence (2·B·L·d):

    1. rotary positions of the query: the block's input, its scaled copy, query, key and value (5·B·L·d), and
       the rotation in float32;
    2. the feed-forward's activation: both sides of it (8·B·L·d), the block's input, the sum with attention,
       cross-attention's result and the scaled input (4·B·L·d).
    """
    tokens = patches(work, config["patch_size"], config["patch_size_t"])
    width = config["num_attention_heads"] * config["attention_head_dim"]
    turned = 5 * work.element + rotary(work.element)
    activated = 12 * work.element
    numbers = max(turned, activated) + 2 * FLOAT
    given = tokens * config["in_channels"] + work.text_tokens * (config["caption_channels"] + width)
    return int(work.batch * (tokens * width * numbers + given * work.element))


FORMULAS = {"LTXVideoTransformer3DModel": forward}
