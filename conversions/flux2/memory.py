"""Activation memory of FLUX.2's transformer. Eager, no gradients, fused attention.

B batch · S text and image tokens together · d width · f width of the gated feed-forward
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conversions.common.denoising import patches
from porter.core.memory import Workload


def forward(config: Mapping[str, Any], work: Workload) -> int:
    """Bytes at the peak of one forward: a single block joins attention and feed-forward for its output projection.

    One matrix makes query, key, value and both halves of the feed-forward (3·d + 2·f), and its result lives until the
    block ends. Beside it: the activated half (f), attention's result (d), both joined (d + f), rotated query and key
    (2·d), the normalised input and the block's input (2·d); times B·S. Rotary positions, in float32,
    come before the feed-forward is activated, and stay below.
    """
    tokens = patches(work) + work.text_tokens
    width = config["num_attention_heads"] * config["attention_head_dim"]
    inner = int(width * config["mlp_ratio"])
    given = work.text_tokens * (config["joint_attention_dim"] + width) + patches(work) * config["in_channels"]
    return int(work.batch * work.element * (tokens * (9 * width + 4 * inner) + given))


FORMULAS = {"Flux2Transformer2DModel": forward}
