"""Activation memory of Sana's transformer. Eager, no gradients, linear attention.

B batch · L image tokens, one for each latent position · T text tokens · d width · c channels of the gated convolution
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conversions.common.denoising import patches
from porter.core.memory import Workload


def forward(config: Mapping[str, Any], work: Workload) -> int:
    """Bytes at the peak of one forward: the activation of the gated convolution that stands for a feed-forward.

    Both sides of the activation (2·B·L·c, c twice the inner width); the block's input, the sum with attention,
    cross-attention's result and the normalised picture (4·B·L·d); the projected text (B·T·d).
    """
    tokens = patches(work, config["patch_size"])
    width = config["num_attention_heads"] * config["attention_head_dim"]
    channels = 2 * int(config["mlp_ratio"] * width)
    text = work.text_tokens * (config["caption_channels"] + width)
    return int(work.batch * work.element * (tokens * (2 * channels + 4 * width) + text))


FORMULAS = {"SanaTransformer2DModel": forward}
