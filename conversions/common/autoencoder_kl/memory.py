"""Activation memory of the image autoencoder's decoder. Eager, no gradients; no slicing or tiling, as it is loaded.

S positions of a level (height · width there) · C, P channels of the level and of the one before, coarse to fine
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from porter.core.memory import Workload


def decode(config: Mapping[str, Any], work: Workload) -> int:
    """Bytes at the peak of `decode(latents)`.

    The peak is the largest of three moments, over all levels; at the released widths (128, 256, 512, 512) it is the
    first of the finest level:

    1. the first residual block has its input, the normalised and the activated copy: 3·P·S;
    2. a later residual block has the level's input, its own input, its second convolution, the sum and the scaled sum:
       (P + 4·C)·S;
    3. the upsampler has the level's input, its own input, the enlarged copy and the convolution of that: (P + 9·C)·S.

    The latents, and their copy after `post_quant_conv`, live throughout.
    """
    widths = list(reversed(config.get("decoder_block_out_channels") or config["block_out_channels"]))
    finest = len(widths) - 1
    latents = config["latent_channels"] * (2 if config.get("use_post_quant_conv", True) else 1)
    positions = (work.height >> finest) * (work.width >> finest)
    held, peak, before = latents * positions, 0, widths[0]
    for level, width in enumerate(widths):
        shortcut = width if before != width else 0
        moments = [3 * before, before + shortcut + 3 * width, before + 4 * width]
        if level != finest:
            moments.append(before + 9 * width)
        peak = max(peak, *(moment * positions for moment in moments))
        before, positions = width, positions * 4
    return int(work.batch * work.element * (held + peak))


FORMULAS = {"AutoencoderKL": decode, "AutoencoderKLFlux2": decode}
