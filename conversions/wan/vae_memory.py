"""Activation memory of Wan's autoencoder, which decodes one latent frame at a time, with caches.

    T latent frames · t frames of a level in one step (1 for the first latent frame) · S positions of a level
    C, P channels of the level and of the one before, coarse to fine

Eager, no gradients, neither slicing nor tiling, as it is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from porter.core.memory import Workload

FLOAT32 = 4  # bytes; norms and enlargements compute in float32
CACHED = 2  # frames that a causal convolution keeps for the next step


def decode(config: Mapping[str, Any], work: Workload, *, still: bool = False) -> int:
    """Bytes at the peak of `decode(latents)`.

    The caches of the causal convolutions live throughout: two frames of each one's input once three latent frames are
    decoded, fewer before (with a single latent frame one, of the convolutions already passed). So do the frames that
    are decoded already. On top of that, the largest of these moments over all levels:

    1. a residual block's norm in float32: the level's input, the block's input and its shortcut or first convolution,
       and two float32 copies;
    2. a residual block's causal convolution: its input, the copy kept for the next step, the input behind the cached
       frames, and the padded copy of that; with a single latent frame only the padded copy (3 frames) and the result;
    3. the upsampler: its input, the enlarged copy in float32 and that in the activations' type.

    In a long video the last moment may be larger: all frames twice, when the last step's are appended.

    Args:
        still: as Qwen-Image 2.1 has it: levels with shortcuts, and flat convolutions, which pad one frame, not three.
    """
    residual = still or bool(config.get("is_residual"))
    blocks, many = config["num_res_blocks"] + 1, work.latent_frames > 1
    passed, ahead = (CACHED, min(CACHED, work.latent_frames - 1)) if many else (1, 0)  # frames in the caches
    temporal = [*reversed(config["temperal_downsample"]), False]
    dims, last = _dims(config), len(config["dim_mult"]) - 1
    patch = config.get("patch_size") or 1
    rows, columns, frames = work.height // patch >> last, work.width // patch >> last, 1
    latents = 2 * config["z_dim"] * work.latent_frames * rows * columns  # and their copy after post_quant_conv

    levels, caches = [], [(config["z_dim"] + 4 * dims[0]) * rows * columns]  # of conv_in and the middle; then per level
    for level, width in enumerate(dims[1:]):
        before = dims[level] if residual or level == 0 else dims[level] // 2
        place = _Place(frames, rows, columns, many, work.element, 1 if still else 1 + CACHED)
        levels.append((place, before, width))
        grows = temporal[level] and many
        caches.append((before + (2 * blocks - 1 + grows) * width) * rows * columns)
        if level != last:
            frames, rows, columns = frames * (1 + grows), 2 * rows, 2 * columns
    caches.append(dims[-1] * rows * columns)  # of conv_out
    video = config.get("out_channels", 3) * rows * columns * ((work.latent_frames - 1) * frames + 1)

    peak = 0
    for level, (place, before, width) in enumerate(levels):
        entered = 2 * before if residual else before  # with the clone for the level's own shortcut
        first = place.block(entered, 0, before, width) + (0 if many else before * place.positions * work.element)
        later = max(
            place.block(entered, width, width, width),
            place.upsampler(entered, width, width if residual else width // 2) if level != last else 0,
        )
        kept = [passed * sum(caches[:n]) + ahead * sum(caches[n:]) for n in (level + 1, level + 2)]
        peak = max(peak, kept[0] * work.element + first, kept[1] * work.element + later)
    appended = (passed * sum(caches) + 2 * video) * work.element
    return int(work.batch * (latents * work.element + max(peak + (video * work.element if many else 0), appended)))


def _dims(config: Mapping[str, Any]) -> list[int]:
    base = config.get("decoder_base_dim") or config["base_dim"]
    multiples = list(reversed(config["dim_mult"]))
    return [base * multiple for multiple in (multiples[0], *multiples)]


class _Place:
    """The moments of one level, in bytes."""

    def __init__(self, frames: int, rows: int, columns: int, many: bool, element: int, single: int) -> None:
        self.frames, self.many, self.element, self.single = frames, many, element, single
        self.positions, self.padded = rows * columns, (rows + 2) * (columns + 2)

    def block(self, entered: int, inside: int, before: int, width: int) -> int:
        """A residual block from `before` to `width` channels; `entered` and `inside` channels wait in the callers."""
        waiting = (entered + inside + (width if before != width else 0)) * self.frames * self.positions * self.element
        norms = max(self._norm(before, 0), self._norm(width, 1))
        return waiting + max(norms, self._convolution(before, width), self._convolution(width, width))

    def _norm(self, width: int, inputs: int) -> int:
        """The input (where no caller holds it) and two copies of float32, or three of the activations' type."""
        own = max(2 * FLOAT32, 3 * self.element)
        return width * self.frames * self.positions * (inputs * self.element + own)

    def _convolution(self, before: int, width: int) -> int:
        if not self.many:
            return ((before + width) * self.positions + self.single * before * self.padded) * self.element
        behind = self.frames + CACHED
        joined = before * ((self.frames + CACHED + behind) * self.positions + behind * self.padded)
        result = before * behind * (self.positions + self.padded) + width * self.frames * self.positions
        return max(joined, result) * self.element

    def upsampler(self, entered: int, width: int, out: int) -> int:
        """The input in a new order and as float32, then enlarged in float32 and cast; then the convolution of that."""
        places = self.frames * self.positions
        cast = 4 * self.element if self.element < FLOAT32 else 0
        enlarge = width * places * (self.element + 4 * FLOAT32 + cast)
        convolve = (5 * width + 4 * out) * places * self.element
        return (entered + width) * places * self.element + max(enlarge, convolve)


FORMULAS = {"AutoencoderKLWan": decode}
