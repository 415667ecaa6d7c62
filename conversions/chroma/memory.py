"""Activation memory of Chroma's transformer. Eager, no gradients, fused attention.

B batch · S text and image tokens together · d width
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conversions.common.denoising import patches
from conversions.flux1.memory import forward as without_mask
from porter.core.memory import Workload


def forward(config: Mapping[str, Any], work: Workload) -> int:
    """Bytes at the peak of one forward: FLUX.1's, but for two things.

    A mask for every pair of tokens, which the forward makes of the pipeline's mask of tokens, lives throughout
    (B·S·S). Single blocks are given text and image joined, and make no copy of them (less B·S·d).
    """
    tokens = patches(work) + work.text_tokens
    width = config["num_attention_heads"] * config["attention_head_dim"]
    return int(without_mask(config, work) + work.batch * work.element * tokens * (tokens - width))


FORMULAS = {"ChromaTransformer2DModel": forward}
