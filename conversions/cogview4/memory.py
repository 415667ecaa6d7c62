"""Activation memory of CogView4's transformer. Eager, no gradients, fused attention.

B batch · L image tokens · T text tokens · S = L + T · d width · h width of a head
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conversions.common.denoising import FLOAT, patches, rotary
from porter.core.memory import Workload


def forward(config: Mapping[str, Any], work: Workload) -> int:
    """Bytes at the peak of one forward; the larger of two moments of a block.

    Both have the image's block input and its scaled copy (2·B·L·d), and the text's (2·B·T·d):

    1. rotary positions of the query's image part: joined input, query, key and value (4·B·S·d), and the rotation in
       float32;
    2. the feed-forward's activation: both sides of it (8·B·L·d), attention's joint result (B·S·d), its image's part
       added (B·L·d), its text's part too (B·T·d).
    """
    image, text = patches(work, config["patch_size"]), work.text_tokens
    head = config["attention_head_dim"]
    width = config["num_attention_heads"] * head
    turned = work.element * (6 * image + 6 * text) + image * rotary(work.element)
    activated = work.element * (12 * image + 4 * text)
    given = text * config["text_embed_dim"]
    tables = 2 * image * head * FLOAT
    return int(work.batch * (width * max(turned, activated) + work.element * given) + tables)


FORMULAS = {"CogView4Transformer2DModel": forward}
