"""Activation memory of HunyuanVideo 1.5's autoencoder. Eager, no gradients, no slicing or tiling, as it is loaded.

t frames of a level · S positions of a level · C, P channels of the level and of the one before
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from porter.core.memory import Workload

FLOAT32 = 4  # bytes; norms compute in float32


def decode(config: Mapping[str, Any], work: Workload) -> int:
    """Bytes at the peak of `decode(latents)`, all frames at once.

    The largest of three moments, the first two in a residual block of the finest level, at the released widths:

    1. its second norm: the level's input, the block's input and the first convolution, with two float32 copies, or in
       float32 the normalised, scaled and shifted values;
    2. its first convolution: the same inputs, the activated copy, that behind two repeated frames with repeated edges,
       and the result; larger than the norm for a single frame;
    3. the middle's attention: its causal mask over all positions of all frames, and queries, keys, values, the result,
       the input and its normalised copy. It grows with the square of area and length; not checked at full size.
    """
    widths = list(reversed(config["block_out_channels"]))
    steps = int(config["spatial_compression_ratio"]).bit_length() - 1
    doublings = int(config["temporal_compression_ratio"]).bit_length() - 1
    frames, rows, columns = work.latent_frames, work.height >> steps, work.width >> steps
    latents = config["latent_channels"] * frames * rows * columns
    tokens = frames * rows * columns
    peak = tokens * tokens // work.batch * work.element + 6 * widths[0] * tokens * work.element
    for level, width in enumerate(widths):
        places, padded = frames * rows * columns, (frames + 2) * (rows + 2) * (columns + 2)
        norm = width * places * (3 * work.element + max(2 * FLOAT32, 3 * work.element))
        convolution = width * (4 * places + padded) * work.element
        peak = max(peak, norm, convolution)
        if level < steps:
            rows, columns = 2 * rows, 2 * columns
        if level < doublings:
            frames = 2 * frames - 1
    return int(work.batch * (latents * work.element + peak))


FORMULAS = {"AutoencoderKLHunyuanVideo15": decode}
