"""Activation memory of LTX-Video's transformer. Eager, no gradients, fused attention.

B batch · L tokens of the video, one for each latent position · d width
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conversions.common.denoising import FLOAT, patches
from porter.core.memory import Workload


def forward(config: Mapping[str, Any], work: Workload) -> int:
    """Bytes at the peak of one forward: the feed-forward's activation.

    Both sides of it (8·B·L·d); the block's input, the sum with attention, cross-attention's result and the scaled
    input (4·B·L·d). The tables of rotary positions, as wide as the model, in float32, one for each sequence, live
    throughout (2·B·L·d). Rotary positions of the query come to the same in 16 bits, and to less in float32.
    """
    tokens = patches(work, config["patch_size"], config["patch_size_t"])
    width = config["num_attention_heads"] * config["attention_head_dim"]
    given = tokens * config["in_channels"] + work.text_tokens * (config["caption_channels"] + width)
    return int(work.batch * (tokens * width * (12 * work.element + 2 * FLOAT) + given * work.element))


FORMULAS = {"LTXVideoTransformer3DModel": forward}
