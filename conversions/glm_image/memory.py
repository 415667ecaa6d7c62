"""Activation memory of GLM-Image's transformer. Eager, no gradients, fused attention.

B batch · L image tokens · d width
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conversions.cogview4.memory import forward as without_prior
from conversions.common.denoising import patches
from porter.core.memory import Workload


def forward(config: Mapping[str, Any], work: Workload) -> int:
    """Bytes at the peak of one forward: CogView4's, with the prior's tokens, embedded and projected (2·B·L·d)."""
    width = config["num_attention_heads"] * config["attention_head_dim"]
    prior = 2 * patches(work, config["patch_size"]) * width
    return int(without_prior(config, work) + work.batch * work.element * prior)


FORMULAS = {"GlmImageTransformer2DModel": forward}
