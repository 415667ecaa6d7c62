"""How much an optimisation may change the numbers: a level that a picture's metadata names.

exact: the arithmetic of the reference, in its order. lossless: the same numbers up to rounding (one matrix product for
several projections, fused kernels). lossy: approximations that were asked for (caching, quantised weights).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

Quality = Literal["exact", "lossless", "lossy"]
LEVELS: tuple[Quality, ...] = ("exact", "lossless", "lossy")
_current: Quality = "lossless"  # a plain global: torch.compile guards on it, and cannot read a context variable


def quality() -> Quality:
    """The level that holds here."""
    return _current


@contextmanager
def at_quality(level: Quality) -> Iterator[None]:
    """Run the body at `level`."""
    global _current
    before, _current = _current, level
    try:
        yield
    finally:
        _current = before
