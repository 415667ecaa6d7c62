"""Activation memory of AuraFlow's transformer. Eager, no gradients, fused attention.

B batch · L image tokens · T text tokens and registers · S = L + T · d width · f width of the gated feed-forward
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conversions.common.denoising import patches
from porter.core.memory import Workload

REGISTERS = 8  # learnt tokens before the text


def forward(config: Mapping[str, Any], work: Workload) -> int:
    """Bytes at the peak of one forward: the gated feed-forward of a single block.

    The activated projection, the other one and their product (3·B·S·f, f two thirds of 4·d, rounded up to 256); the
    joined sequence, its sum with attention, attention's result and the scaled input (4·B·S·d); image and text apart,
    which the forward still names (B·S·d).
    """
    tokens = patches(work, config["patch_size"]) + work.text_tokens + REGISTERS
    width = config["num_attention_heads"] * config["attention_head_dim"]
    inner = -(-int(2 * 4 * width / 3) // 256) * 256
    given = work.text_tokens * config["joint_attention_dim"]
    return int(work.batch * work.element * (tokens * (3 * inner + 5 * width) + given))


FORMULAS = {"AuraFlowTransformer2DModel": forward}
