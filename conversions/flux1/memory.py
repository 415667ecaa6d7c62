"""Activation memory of FLUX.1's transformer. Eager, no gradients, fused attention.

B batch · L image tokens · T text tokens · S = T + L · d width · h width of a head · e bytes of an element
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conversions.common.denoising import FLOAT, patches, rotary
from porter.core.memory import Workload


def forward(config: Mapping[str, Any], work: Workload) -> int:
    """Bytes at the peak of one forward, in a single block, whose tokens are text and image together.

    The larger of two moments, each with the block's input, its joined copy and the normalised copy (3·B·S·d):

    1. rotary positions of the query: the feed-forward's activation waits (4·B·S·d) beside query, key and value
       (3·B·S·d), and `apply_rotary_emb` computes in float32;
    2. the output's gate: attention's result, the feed-forward's activation and both joined (1 + 4 + 5, times B·S·d),
       projected and gated (2·B·S·d).
    """
    tokens = patches(work) + work.text_tokens
    head = config["attention_head_dim"]
    width = config["num_attention_heads"] * head
    per_number = max(10 * work.element + rotary(work.element), 15 * work.element)
    tables = 2 * tokens * head * FLOAT
    given = work.text_tokens * config["joint_attention_dim"] + patches(work) * config["in_channels"]
    return int(work.batch * (tokens * width * per_number + given * work.element) + tables)


FORMULAS = {"FluxTransformer2DModel": forward}
