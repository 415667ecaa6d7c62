"""Activation memory of HunyuanVideo's transformer. Eager, no gradients, fused attention.

B batch · L tokens of the video · T text tokens · S = L + T · d width · h width of a head
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conversions.common.denoising import FLOAT, patches, rotary
from porter.core.memory import Workload


def forward(config: Mapping[str, Any], work: Workload) -> int:
    """Bytes at the peak of one forward, in a single block, whose tokens are video and text together.

    The larger of two moments, each with the video that the block was given (B·L·d), its joined copies for the
    residual and for the forward before it, and the normalised copy (3·B·S·d):

    1. rotary positions of the query's video part: the feed-forward's activation waits (4·B·S·d) beside query, key
       and value (3·B·S·d), and `apply_rotary_emb` computes in float32;
    2. the output's gate: attention's result, the feed-forward's activation and both joined (1 + 4 + 5, times B·S·d),
       projected and gated (2·B·S·d).
    """
    video, text = patches(work, config["patch_size"], config["patch_size_t"]), work.text_tokens
    both = video + text
    head = config["attention_head_dim"]
    width = config["num_attention_heads"] * head
    mlp = config["mlp_ratio"]
    turned = work.element * (both * (6 + mlp) + video) + video * rotary(work.element)
    gated = work.element * (both * (6 + 2 * mlp + 1) + video)
    given = text * config["text_embed_dim"] + patches(work, 1) * config["in_channels"]
    tables = 2 * video * head * FLOAT
    return int(int(work.batch * (width * max(turned, gated) + work.element * given)) + tables)


FORMULAS = {"HunyuanVideoTransformer3DModel": forward}
