"""Weights drawn from a seed, the same on every machine: what reference traces are recorded on.

Every tensor has numbers of its own, made from its name and the seed by a bit generator whose raw output never changes;
nothing is left at zero or one, and activations keep their size from layer to layer. So a trace needs no weights beside
it: names, shapes, the seed and the file's sha256 stand in it.
"""

from __future__ import annotations

import math
import zlib

import numpy as np

Shape = tuple[int, ...]


def draw(name: str, shape: Shape, seed: int) -> np.ndarray:
    """One float32 tensor: uniform numbers; weights scaled by their fan-in, vectors around one, biases around zero."""
    count = math.prod(shape)
    raw = np.random.PCG64([seed, zlib.crc32(name.encode())]).random_raw(max(count, 1))
    unit = (raw[:count] >> np.uint64(40)).astype(np.float64) / 2**23 - 1  # 24 bits → [-1, 1), exact in float32
    last = name.rpartition(".")[2]
    if last.endswith("bias"):
        values = 0.1 * unit
    elif len(shape) <= 1:
        values = 1 + 0.25 * unit
    else:
        values = unit * math.sqrt(3 / max(math.prod(shape[1:]), 1))
    return values.astype(np.float32).reshape(shape)
