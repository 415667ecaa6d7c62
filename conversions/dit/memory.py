"""Activation memory of DiT. Eager, no gradients, fused attention.

B batch · L image tokens · d width
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conversions.common.denoising import patches
from porter.core.memory import Workload


def forward(config: Mapping[str, Any], work: Workload) -> int:
    """Bytes at the peak of one forward: the feed-forward's activation.

    Both sides of it (8·B·L·d); the block's input, the sum with attention, attention's gated result and the scaled
    input (4·B·L·d).
    """
    tokens = patches(work, config["patch_size"])
    width = config["num_attention_heads"] * config["attention_head_dim"]
    return int(work.batch * work.element * 12 * tokens * width)


FORMULAS = {"DiTTransformer2DModel": forward}
