"""Keeping the page cache small behind a long copy: fresh cache memory, not the disk, is what slows such copies down.

Linux only; elsewhere nothing happens. It drops the source's pages too, so it is for files that are large.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

_WAIT_BEFORE, _WRITE, _WAIT_AFTER = 1, 2, 4  # flags of sync_file_range(2)


class Writeback:
    """Follows a file being written: starts writing the newest stretch, waits for the one before and drops it."""

    WORTH = 256 << 20  # bytes of output from which on it pays
    STRETCH = 32 << 20

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.started = self.dropped = 0
        self.read_dropped: dict[int, int] = {}
        self.sync = _sync_file_range()

    def follow(self, position: int, read_to: Mapping[int, int]) -> None:
        """The file has been written up to `position`, and each source descriptor read up to `read_to`."""
        if self.sync is None or position - self.started < self.STRETCH:
            return
        self.sync(self.descriptor, self.started, position - self.started, _WRITE)
        if self.started > self.dropped:
            length = self.started - self.dropped
            self.sync(self.descriptor, self.dropped, length, _WAIT_BEFORE | _WRITE | _WAIT_AFTER)
            os.posix_fadvise(self.descriptor, self.dropped, length, os.POSIX_FADV_DONTNEED)
            self.dropped = self.started
        self.started = position
        for source, end in read_to.items():
            begin = self.read_dropped.get(source, 0)
            if end > begin:
                os.posix_fadvise(source, begin, end - begin, os.POSIX_FADV_DONTNEED)
                self.read_dropped[source] = end


def _sync_file_range() -> Callable[..., Any] | None:
    """The C library's sync_file_range, or None where there is none."""
    if sys.platform != "linux" or not hasattr(os, "posix_fadvise"):
        return None
    import ctypes

    found = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if found is None:
        return None
    found.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    found.restype = ctypes.c_int
    return found  # type: ignore[no-any-return]
