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
    """One float32 tensor: uniform numbers, spread as `spread` says."""
    count = math.prod(shape)
    raw = np.random.PCG64([seed, zlib.crc32(name.encode())]).random_raw(max(count, 1))
    unit = (raw[:count] >> np.uint64(40)).astype(np.float64) / 2**23 - 1  # 24 bits → [-1, 1), exact in float32
    middle, size = spread(name, shape)
    return (middle + size * unit).astype(np.float32).reshape(shape)


def spread(name: str, shape: Shape) -> tuple[float, float]:
    """Middle and half width of a tensor's numbers: weights by their fan-in, vectors around 1, biases around 0."""
    if name.rpartition(".")[2].endswith("bias"):
        return 0.0, 0.1
    if len(shape) <= 1:
        return 1.0, 0.25
    return 0.0, math.sqrt(3 / max(math.prod(shape[1:]), 1))
