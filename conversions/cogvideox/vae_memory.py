"""Activation memory of CogVideoX's autoencoder, which decodes two latent frames at a time with caches.

    t frames of a level in one step · S positions of a level · C, P channels of the level and of the one before
    Z channels of the latents, which every norm sees enlarged to its own size

Eager, no gradients, neither slicing nor tiling, as it is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conversions.common.causal_convolution import CACHED, convolve
from porter.core.memory import Workload

STEP = 2  # latent frames decoded at a time; an odd one joins the first step


def decode(config: Mapping[str, Any], work: Workload) -> int:
    """Bytes at the peak of `decode(latents)`.

    Two sets of caches live in every step but the first: the last step's, whole, and the new one so far. A convolution
    keeps two frames of its input, and each norm keeps the enlarged latents twice (2·Z·t·S), for nothing. The decoded
    frames live too. On top of that, the largest of these moments over all levels:

    1. the first norm, on P channels, or the last one, on C: its input, what the callers hold, and five tensors more:
       scale, shift, normalised, scaled and shifted values;
    2. a causal convolution: the activated input, that behind the cached frames, the new cache and the result (see
       `convolve`);
    3. the upsampler: its input, the enlarged copy, that in another order, and the convolution.
    """
    steps = max(work.latent_frames // STEP, 1)
    peak, caches = _step(config, work, min(work.latent_frames, STEP + work.latent_frames % STEP), 0)
    for _ in range(min(steps - 1, 2)):  # from the third step on nothing changes but the decoded frames
        again, caches = _step(config, work, STEP, caches)
        peak = max(peak, again)
    return work.batch * work.element * peak


def _step(config: Mapping[str, Any], work: Workload, frames: int, old: int) -> tuple[int, int]:
    """Values alive at the peak of one step that finds `old` values in caches; and how many it leaves there."""
    widths = list(reversed(config["block_out_channels"]))
    blocks, zq, last = config["layers_per_block"] + 1, config["latent_channels"], len(widths) - 1
    grows = int(config["temporal_compression_ratio"]).bit_length() - 1
    positions = (work.height >> last) * (work.width >> last)
    video = config["out_channels"] * (work.height * work.width) * work.frames
    held = zq * positions * (work.latent_frames + frames) + (video if old else 0)

    new = (zq + 4 * widths[0]) * CACHED * positions + 8 * zq * frames * positions  # conv_in and the middle's two blocks
    peak, before = 0, widths[0]
    for level, width in enumerate(widths):
        places = frames * positions
        norm = 2 * zq * places  # caches of one norm
        entering = new + norm + zq * places + 6 * before * places
        convolving = new + norm + 2 * before * places + convolve(work.batch, before, width, frames, positions)
        peak = max(peak, entering, convolving)
        new += (before + (2 * blocks - 1) * width) * CACHED * positions + 2 * blocks * norm
        leaving = new - width * CACHED * positions + zq * places + (before + 7 * width) * places
        closing = new - width * CACHED * positions + (before + 2 * width) * places
        peak = max(peak, leaving, closing + convolve(work.batch, width, width, frames, positions))
        inputs = (before + width) * places
        if level != last:
            positions *= 4
            odd = frames % 2 and frames > 1 and level < grows
            if level < grows and frames > 1:
                frames = 2 * frames - frames % 2
            peak = max(peak, new + inputs + (3 if odd else 2) * width * frames * positions)
        before = width
    new += 2 * zq * frames * positions + before * CACHED * positions
    return held + old + peak, new


FORMULAS = {"AutoencoderKLCogVideoX": decode}
