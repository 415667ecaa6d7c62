"""Activation memory of the deep-compression autoencoder's decoder. Eager, no gradients; no slicing or tiling.

S positions of a level (height · width there) · C, P channels of the level and of the one before, coarse to fine
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from porter.core.memory import Workload

FLOAT32 = 4  # bytes; root-mean-square norms compute in float32


def decode(config: Mapping[str, Any], work: Workload) -> int:
    """Bytes at the peak of `decode(latents)`: inside a norm of the finest level's residual blocks.

    Alive then: the level's input (P·S/4), the block's input and its second convolution (2·C·S), and two more of C·S
    in the norm: in a half precision the values as float32 and their squares, in float32 the normalised values before
    and after the weight. Beside it stands the upsampler: its input (P·S/4) with either the enlarged copy (P·S) and
    its convolution (C·S), or four tensors of C·S around the shortcut's sum. The latents and their repeated copy live
    throughout.
    """
    widths = list(reversed(config["decoder_block_out_channels"]))
    finest, latents = len(widths) - 1, config["latent_channels"]
    positions = (work.height >> finest) * (work.width >> finest)
    shortcut = widths[0] if config.get("decoder_in_shortcut", True) else 0  # `x` of the decoder's forward
    held = (latents + shortcut) * positions * work.element
    peak, before = 0, 0
    for width in widths:
        entered = before * positions // 4 * work.element
        block = width * positions * (2 * work.element + 2 * FLOAT32)
        up = max(before + width, 3 * width) * positions * work.element if before else 0
        peak = max(peak, entered + block, entered + up)
        before, positions = width, positions * 4
    return int(work.batch * (held + peak))


FORMULAS = {"AutoencoderDC": decode}
