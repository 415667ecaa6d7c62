"""Activation memory of Hunyuan-DiT. Eager, no gradients, fused attention.

B batch · L image tokens · d width · f width of the feed-forward
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conversions.common.denoising import patches
from porter.core.memory import Workload


def forward(config: Mapping[str, Any], work: Workload) -> int:
    """Bytes at the peak of one forward: the feed-forward of the first block after the middle.

    The first half's results wait for their skips (layers/2 · B·L·d). Both sides of the activation (2·B·L·f); the
    block's input, with its skip joined and normalised (3·B·L·d), projected, with both attentions added, and the
    feed-forward's normalised input (4·B·L·d).
    """
    tokens = patches(work, config["patch_size"])
    width = config["num_attention_heads"] * config["attention_head_dim"]
    inner = int(width * config["mlp_ratio"])
    numbers = tokens * (2 * inner + (config["num_layers"] // 2 + 6) * width)
    given = work.text_tokens * (config["cross_attention_dim_t5"] + config["cross_attention_dim"])
    return int(work.batch * work.element * (numbers + given))


FORMULAS = {"HunyuanDiT2DModel": forward}
