"""Less memory than the whole model takes: weights that are elsewhere while they are not used, and smaller weights."""

from __future__ import annotations

from runtime.memory.parking import device_of, using

__all__ = ["device_of", "using"]
