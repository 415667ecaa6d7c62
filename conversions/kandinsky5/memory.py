"""Activation memory of Kandinsky 5's transformer. Eager, no gradients, fused attention.

B batch · L tokens of the video · T text tokens · d width · f width of the feed-forward · h width of a head
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conversions.common.denoising import FLOAT, patches
from porter.core.memory import Workload


def forward(config: Mapping[str, Any], work: Workload) -> int:
    """Bytes at the peak of one forward; the larger of two moments of a block.

    1. rotary positions, a product with 2 x 2 matrices in float32: the query's copy, the products and their sums
       (4·B·L·d), beside the block's input, its scaled copy, query, key and value (5·B·L·d in the model's dtype);
    2. the feed-forward's activation: both sides of it (2·B·L·f), the block's input, the sum with attention and
       the scaled input (3·B·L·d).

    The matrices live throughout (L·h/2·4, in float32).
    """
    patch = config["patch_size"]
    tokens = patches(work, patch[1], patch[0])
    width = config["model_dim"]
    turned = width * (5 * work.element + 4 * FLOAT)
    activated = work.element * (2 * config["ff_dim"] + 3 * width)
    latents = patches(work, 1) * (2 * config["in_visual_dim"] + 1 if config["visual_cond"] else config["in_visual_dim"])
    given = latents + work.text_tokens * config["in_text_dim"]
    tables = tokens * sum(config["axes_dims"]) * 2 * FLOAT
    return int(work.batch * (tokens * max(turned, activated) + given * work.element) + tables)


def kept(config: Mapping[str, Any], work: Workload) -> int:
    """Parameters that stay in float32: the embedding of time, and what blocks make of it (6, 9 and 2 widths)."""
    width, time = config["model_dim"], config["time_dim"]
    parts = 6 * config["num_text_blocks"] + 9 * config["num_visual_blocks"] + 2
    return int(parts * width * (time + 1) + time * (width + time + 2))


KEPT = {"Kandinsky5Transformer3DModel": kept}
FORMULAS = {"Kandinsky5Transformer3DModel": forward}
