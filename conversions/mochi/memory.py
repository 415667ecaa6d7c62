"""Activation memory of Mochi's transformer. Eager, no gradients, fused attention.

B batch · L tokens of the video · T text tokens · d width · f width of the gated feed-forward · a heads
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conversions.common.denoising import FLOAT, patches
from porter.core.memory import Workload


def forward(config: Mapping[str, Any], work: Workload) -> int:
    """Bytes at the peak of one forward: the video's gated feed-forward.

    Both halves of its projection, the activated half and the product (4·B·L·f, f two thirds of 4·d); the block's
    input, the sum with attention, attention's projection and the normalised input (4·B·L·d); attention's joint
    result, of which the text's part is still to come (B·(L + T)·d). Cosines and sines of every head live throughout,
    in float32 (2·L·d/2).
    """
    video, text = patches(work, config["patch_size"]), work.text_tokens
    width = config["num_attention_heads"] * config["attention_head_dim"]
    inner = 4 * width * 2 // 3
    given = text * (config["text_embed_dim"] + 2 * config["pooled_projection_dim"])
    numbers = video * (4 * inner + 4 * width) + (video + text) * width + given
    return int(work.batch * work.element * numbers + video * width * FLOAT)


FORMULAS = {"MochiTransformer3DModel": forward}
