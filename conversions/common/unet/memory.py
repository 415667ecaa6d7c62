"""Activation memory of UNet2DConditionModel. Eager, no gradients, PyTorch's fused attention.

S positions of a level (height · width there) · C channels of the level · P channels of the block before
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from typing import Any

from porter.core.memory import Workload


def denoise(config: Mapping[str, Any], work: Workload) -> int:
    """Bytes at the peak of one forward on `work.batch` latents (twice the images under classifier-free guidance).

    The peak is on the way up. There live the skip connections that no finished block has used, and the largest of:

    1. the first transformer's gated feed-forward: the level's input (P·S), the residual block's output, the projected
       and the normalised input, attention's output and the sum (5·C·S), and 16·C·S in the gate: both halves at once
       (8·C·S), the activated half and the product;
    2. a residual block: the level's input, and the concatenation with a skip connection three times: as it is,
       normalised, activated;
    3. the upsampler: the level's input and its own, the enlarged copy and its convolution.
    """
    widths = list(config["block_out_channels"])
    layers = config["layers_per_block"]
    depth = [layers] * len(widths) if isinstance(layers, int) else list(layers)
    finest = work.latent_height * work.latent_width
    positions = [finest >> 2 * level for level in range(len(widths))]
    skips = [widths[0] * positions[0]]  # in the order in which the way down leaves them
    for level, width in enumerate(widths):
        skips += [width * positions[level]] * depth[level]
        skips += [width * positions[level + 1]] if level + 1 < len(widths) else []
    left = [0, *accumulate(skips)]  # sizes of the first 0, 1, 2 … skips

    peak, before, waiting = 0, widths[-1], len(skips)
    for level, kind in zip(reversed(range(len(widths))), config["up_block_types"], strict=True):
        width, size = widths[level], positions[level]
        concatenated = before * size + skips[waiting - 1]
        moments = [before * size + 3 * concatenated]
        if "CrossAttn" in kind:
            moments.append((before + 21 * width) * size)
        if level:
            moments.append((before + 9 * width) * size)
        peak = max(peak, left[waiting] + max(moments))
        waiting, before = waiting - depth[level] - 1, width
    inputs = config["in_channels"] * finest + work.text_tokens * (config.get("cross_attention_dim") or 0)
    return int(work.batch * work.element * (inputs + peak))


FORMULAS = {"UNet2DConditionModel": denoise}
