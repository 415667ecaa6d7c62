"""How much an optimisation may change the numbers: a level that a picture's metadata names.

exact: the arithmetic of the reference, in its order. lossless: the same numbers up to rounding (one matrix product for
several projections, fused kernels). lossy: approximations that were asked for (caching, quantised weights).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

Quality = Literal["exact", "lossless", "lossy"]
LEVELS: tuple[Quality, ...] = ("exact", "lossless", "lossy")
_current: ContextVar[Quality] = ContextVar("quality", default="lossless")


def quality() -> Quality:
    """The level that holds here."""
    return _current.get()


@contextmanager
def at_quality(level: Quality) -> Iterator[None]:
    """Run the body at `level`."""
    before = _current.set(level)
    try:
        yield
    finally:
        _current.reset(before)
