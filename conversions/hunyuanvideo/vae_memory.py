"""Activation memory of HunyuanVideo's autoencoder. Eager, no gradients, PyTorch's fused attention.

    t frames of a level in one tile · S positions of a level · C, P channels of the level and of the one before

As it is loaded, it decodes tiles of 16 + 1 frames one after another (`use_framewise_decoding`), each over the whole
picture; a pipeline that calls `enable_tiling()` needs less.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from porter.core.memory import Workload

FLOAT32, BOOL = 4, 1  # bytes
TILE, STRIDE = 16, 12  # frames; what the class sets


def decode(config: Mapping[str, Any], work: Workload) -> int:
    """Bytes at the peak of `decode(latents)`.

    The tiles decoded so far live throughout. On top of that, the largest of:

    1. a level's upsampler, at the released widths the third level's: the level's input and its own, the first frame and
       the others enlarged apart, then joined, then padded, then convolved;
    2. a level's first residual block: its input, the activated and the padded copy, and the convolution;
    3. the middle's attention: its causal mask over all positions of all frames, as float32 and, before, as a condition
       or, after, in the activations' type; this grows with the square of the picture's area.
    """
    ratio = config["temporal_compression_ratio"]
    steps, levels = _log2(config["spatial_compression_ratio"]), len(config["block_out_channels"])
    tiled = work.latent_frames > TILE // ratio
    frames = min(work.latent_frames, TILE // ratio + 1) if tiled else work.latent_frames
    rows, columns = work.height >> steps, work.width >> steps
    widths = list(reversed(config["block_out_channels"]))

    latents = config["latent_channels"] * rows * columns * (work.latent_frames + frames)
    tokens = frames * rows * columns
    masked = config.get("mid_block_add_attention", True)
    mask = tokens * tokens * (FLOAT32 + (work.element if work.element < FLOAT32 else BOOL)) if masked else 0
    middle = mask // work.batch + 2 * widths[0] * tokens * work.element  # one mask serves the batch
    peak, before = 0, widths[0]
    for level, width in enumerate(widths):
        places, padded = frames * rows * columns, (frames + 2) * (rows + 2) * (columns + 2)
        peak = max(peak, 2 * before * places + before * padded + width * places)
        peak = max(peak, (before + width) * places + width * (padded + places))
        inputs = (before + width) * places
        if level < steps:
            rows, columns = 2 * rows, 2 * columns
            if levels - 1 - _log2(ratio) <= level < levels - 1:
                frames = 2 * frames - 1
            joined = 2 * frames if frames > 1 else 1  # the first frame and the others, and both in one
            padded = (frames + 2) * (rows + 2) * (columns + 2)
            peak = max(peak, inputs + width * ((joined + frames) * rows * columns + padded))
        before = width
    video = (work.latent_frames - 1) * ratio + 1
    done = config["out_channels"] * rows * columns * (video * TILE // STRIDE if tiled else 0)
    return int(work.batch * ((latents + done) * work.element + max(peak * work.element, middle)))


def _log2(number: int) -> int:
    return number.bit_length() - 1


FORMULAS = {"AutoencoderKLHunyuanVideo": decode}
