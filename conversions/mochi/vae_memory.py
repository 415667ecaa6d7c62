"""Activation memory of Mochi's autoencoder. Eager, no gradients; no slicing, tiling or framewise decoding, as loaded.

t frames of a level · S positions of a level · C channels of a level, coarse to fine
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conversions.common.causal_convolution import convolve
from porter.core.memory import Workload


def decode(config: Mapping[str, Any], work: Workload) -> int:
    """Bytes at the peak of `decode(latents)`, all frames at once.

    The peak is in a causal convolution of the last block, at full size: the block's input, the residual block's
    input, the activated copy (3·C·t·S), the padded copy, and the result. A long video's padded copy is cut along
    time: then the overlapping parts and their results live too, before they are joined (see
    `conversions.common.causal_convolution`).

    For more than one video the norm before it may need more: it puts the frames in another order (a copy), normalises
    them in chunks and joins these: 6·C·t·S with the two inputs and the first convolution.
    """
    widths = list(reversed(config["decoder_block_out_channels"]))
    times, spaces = list(reversed(config["temporal_expansions"])), list(reversed(config["spatial_expansions"]))
    edge = 1
    for space in spaces:
        edge *= space
    frames, rows, columns = work.latent_frames, work.height // edge, work.width // edge
    latents = config["latent_channels"] * frames * rows * columns
    peak = 0
    for level, width in enumerate(widths):
        positions = rows * columns
        padding = (rows + 2) * (columns + 2) - positions
        block = 3 * width * frames * positions + convolve(work.batch, width, width, frames, positions, padding)
        inputs = 2 * width * frames * positions
        norm = (5 if work.batch == 1 else 6) * width * frames * positions
        peak = max(peak, block, norm)
        if level < len(times):
            frames, rows, columns = frames * times[level], rows * spaces[level], columns * spaces[level]
            peak = max(peak, inputs + 2 * widths[level + 1] * frames * rows * columns)
    return int(work.batch * work.element * (latents + peak))


FORMULAS = {"AutoencoderKLMochi": decode}
