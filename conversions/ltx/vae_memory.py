"""Activation memory of LTX-Video's and LTX-2's autoencoders. Eager, no gradients, no slicing or tiling.

t frames of a level · S positions of a level · C, P channels of the level and of the one before
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from porter.core.memory import Workload

FLOAT32 = 4  # bytes; root-mean-square norms compute in float32


def decode(config: Mapping[str, Any], work: Workload, *, upcasts: bool = True) -> int:
    """Bytes at the peak of `decode(latents)`: in a level's first residual block, at the released widths the finest's.

    Alive then: the level's input, the block's (the upsampler's result, which has one frame more than it shows) and

    1. in a half precision, in the second norm: the first convolution, its values as float32 and their squares
       (`upcasts`; LTX-2's norm keeps the activations' type);
    2. otherwise, in the first convolution: the activated copy, that with repeated frames at the ends, and the result;
       where the edges are reflected, a padded copy too.

    A level's upsampler has its input, the repeated copy and the convolution, then that in a new order and, where the
    config says `upsample_residual`, the repeated residual and the sum.
    """
    widths = list(reversed(config["decoder_block_out_channels"]))
    scaling = list(reversed(config["decoder_spatio_temporal_scaling"]))
    levels = len(widths)
    factors = list(reversed(config.get("upsample_factor") or [1] * levels))
    residuals = list(reversed(config.get("upsample_residual") or [False] * levels))
    steps = sum(scaling[:levels])
    edge = config["patch_size"] << steps
    frames, positions = work.latent_frames, (work.height // edge) * (work.width // edge)
    latents = config["latent_channels"] * frames * positions
    repeated = 2  # frames added to each convolution's input
    reflects = config.get("decoder_spatial_padding_mode", "zeros") != "zeros"
    if set(config.get("upsample_type") or ()) - {"spatiotemporal"}:
        raise ValueError("an upsampler of space or time alone")

    peak, before, passed = 0, widths[0], 0
    for level, width in enumerate(widths):
        wide, width = width, width // factors[level]
        places, entered = frames * positions, before * frames * positions
        shown = width * places  # the residual blocks' input
        if scaling[level]:
            full = width * 8 * places  # before the first frame is cut off
            inputs = entered + (wide if wide != before else 0) * places
            gathered = inputs + wide * (frames + 2 * repeated) * positions + full
            ordered = inputs + (4 if residuals[level] else 2) * full
            peak = max(peak, gathered * work.element, ordered * work.element)
            frames, positions, passed = 2 * frames - 1, 4 * positions, passed + 1
            places, shown = frames * positions, width * frames * positions if residuals[level] else full
        rows, columns = work.height // edge << passed, work.width // edge << passed
        border = width * (frames + repeated) * (rows + 2) * (columns + 2) if reflects else 0
        norm = (entered + shown + width * places) * work.element + 2 * FLOAT32 * width * places
        convolution = entered + shown + width * (3 * frames + 2 * repeated) * positions + border
        peak = max(peak, norm if upcasts and work.element < FLOAT32 else 0, convolution * work.element)
        before = width
    return int(work.batch * (latents * work.element + peak))


FORMULAS = {"AutoencoderKLLTXVideo": decode, "AutoencoderKLLTX2Video": partial(decode, upcasts=False)}
