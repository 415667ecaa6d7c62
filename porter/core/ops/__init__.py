"""What a rule may do to tensors: every op knows its shapes, its inverse, and what it costs in precision.

index.py     ops that only say where elements go: they compose into one gather and need no torch
compute.py   ops that make new numbers: casts, folds, dequantisation, constants
"""

from porter.core.ops.base import Exactness, Op
from porter.core.ops.compute import TORCH_NAMES, Cast, Compute, Constant, Dequantise, Multiply, Offset, castable, widens
from porter.core.ops.index import (
    Concat,
    Copy,
    Drop,
    PermuteBlocks,
    Regroup,
    Reshape,
    Same,
    Split,
    Squeeze,
    Stack,
    Transpose,
    Unsqueeze,
    Unstack,
)  # fmt: skip

__all__ = [
    "TORCH_NAMES", "Cast", "Compute", "Concat", "Constant", "Copy", "Dequantise", "Drop", "Exactness", "Multiply",
    "Offset", "Op", "PermuteBlocks", "Regroup", "Reshape", "Same", "Split", "Squeeze", "Stack", "Transpose",
    "Unsqueeze", "Unstack", "castable", "widens",
]  # fmt: skip
