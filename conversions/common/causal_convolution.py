"""What the causal convolutions of CogVideoX's and Mochi's autoencoders need in memory."""

from __future__ import annotations

CACHED = 2  # frames that a convolution takes from the step before, or repeats
LIMIT, HALF = 2 << 30, 2  # a convolution whose input has more bytes, at two a value, is cut along time


def convolve(batch: int, before: int, width: int, frames: int, positions: int, padding: int = 0) -> int:
    """Values that a causal convolution makes: its input behind the cached frames, the new cache, and the result.

    Where the input is too large it is cut along time: the parts overlap and are copies (all but the first), and the
    results are joined. `positions` are the result's, `padding` more are the input's.
    """
    spread = positions + padding
    behind = frames + CACHED
    values = before * (behind * spread + (0 if padding else CACHED * positions)) + width * frames * positions
    if batch * before * behind * spread * HALF <= LIMIT:
        return values
    parts = batch * before * behind * spread * HALF // LIMIT + 1
    length = -(-behind // parts)
    count = -(-behind // length)
    copies = before * (behind - length + CACHED * (count - 1)) * spread
    return values + copies + width * frames * positions
