"""Activation memory of CogVideoX's transformer. Eager, no gradients, fused attention.

B batch · L tokens of the video · T text tokens · S = L + T · d width
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conversions.common.denoising import FLOAT, patches, rotary
from porter.core.memory import Workload


def forward(config: Mapping[str, Any], work: Workload) -> int:
    """Bytes at the peak of one forward; the larger of two moments of a block.

    1. rotary positions of the query's video part, where the model has them: text and video joined, before and after
       normalisation, query, key and value (5·B·S·d), the block's video (B·L·d), and the rotation in float32;
    2. the feed-forward's activation: both sides of it (8·B·S·d), its joined input, attention's joined result and
       normalised copies (3·B·S·d), the video's sum with attention (B·L·d).
    """
    video = patches(work, config["patch_size"], config.get("patch_size_t") or 1)
    both = video + work.text_tokens
    head = config["attention_head_dim"]
    width = config["num_attention_heads"] * head
    turns = config.get("use_rotary_positional_embeddings", False)
    turned = work.element * (5 * both + video) + video * rotary(work.element) if turns else 0
    activated = work.element * (11 * both + video)
    given = work.text_tokens * config["text_embed_dim"] + patches(work, 1) * config["in_channels"]
    tables = 2 * video * head * FLOAT if turns else 0
    return int(work.batch * (width * max(turned, activated) + work.element * given) + tables)


FORMULAS = {"CogVideoXTransformer3DModel": forward}
