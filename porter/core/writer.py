"""Writing one long file from start to end, hashed on the way, past the page cache where the system lets us.

Fresh memory for the page cache, not the disk, is what slows long copies down: `cp` spends most of its time there.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
from collections.abc import Callable
from functools import partial
from typing import Any

from porter.core.lanes import FILE_HASH, OTHER_WRITE, TENSOR_HASH, WRITE, Buffer, Lanes, Pool

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

LARGE = 256 << 20  # bytes from which on a file is written past the page cache, and its sources are dropped from it
_ALIGNED = 4096  # what memory, places and lengths of direct writes are multiples of

Progress = Callable[[int], None]


class Writer:
    """Writes and hashes one file from start to end, in whole buffers of a pool.

    A file of `LARGE` bytes or more gets its room on the disk first, and two writes are under way at once.
    """

    def __init__(self, descriptor: int, size: int, pool: Pool, lanes: Lanes, progress: Progress | None = None) -> None:
        self.descriptor, self.pool, self.lanes, self.progress = descriptor, pool, lanes, progress
        self.position = 0  # how many bytes have come in
        self.file_hash = hashlib.sha256()
        if size >= LARGE:
            _reserve(descriptor, size)
        self._direct = size >= LARGE and _set_direct(descriptor, True)
        self._turns = itertools.cycle((WRITE, OTHER_WRITE))
        self._buffer: Buffer | None = None
        self._filled = 0

    def room(self, limit: int) -> tuple[memoryview, Buffer]:
        """Memory behind what has come in, at most `limit` bytes of it: what is read there need not be copied.

        It counts when it is given to `write`, before the next call; the taker releases the buffer.
        """
        if self._buffer is None:
            self._buffer, self._filled = self.pool.take(), 0
        self._buffer.hold()
        return self._buffer.data[self._filled : self._filled + limit], self._buffer

    def write(self, window: Any, tensor_hash: Any, buffer: Buffer | None = None) -> None:
        """Bytes for the end of the file: those of `room`, with their buffer, or any others."""
        if buffer is not None and buffer is self._buffer:
            self._take(window, tensor_hash)
            return
        begin = 0
        while begin < len(window):
            view, held = self.room(len(window) - begin)
            view[:] = window[begin : begin + len(view)]
            begin += len(view)
            self._take(view, tensor_hash)
            held.release()

    def finish(self) -> None:
        """Write what is left; `lanes.finish` then waits for it."""
        if self._buffer is not None:
            self._flush(self._buffer)

    def _take(self, view: memoryview, tensor_hash: Any) -> None:
        assert self._buffer is not None
        self.lanes.feed(FILE_HASH, self.file_hash.update, view, self._buffer)
        if tensor_hash is not None:
            self.lanes.feed(TENSOR_HASH, tensor_hash.update, view, self._buffer)
        self._filled += len(view)
        self.position += len(view)
        if self._filled == len(self._buffer.data):
            self._flush(self._buffer)
        if self.progress:
            self.progress(len(view))

    def _flush(self, buffer: Buffer) -> None:
        put = partial(self._put, self.position - self._filled)
        self._buffer = None
        self.lanes.feed(next(self._turns), put, buffer.data[: self._filled], buffer)
        buffer.release()

    def _put(self, position: int, view: memoryview) -> None:
        whole = len(view) - len(view) % _ALIGNED if self._direct else len(view)
        self._pwrite(view[:whole], position)
        if whole < len(view):  # the end of the file
            _set_direct(self.descriptor, False)
            self._pwrite(view[whole:], position + whole)

    def _pwrite(self, view: memoryview, position: int) -> None:
        written = 0
        while written < len(view):
            direct = self._direct  # as it was before: the other lane may turn it off during the call
            try:
                written += os.pwrite(self.descriptor, view[written:], position + written)
            except OSError as error:
                if not direct or error.errno != errno.EINVAL:
                    raise
                _set_direct(self.descriptor, False)  # the file system takes the flag, and other places or lengths
                self._direct = False


def _reserve(descriptor: int, size: int) -> None:
    """Give an empty file its blocks at once, where the file system can; `os.posix_fallocate` would write them itself.

    Raises:
        OSError: the disk is full.
    """
    import ctypes  # small files do without

    fallocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate64", None) if os.name == "posix" else None
    if fallocate is None:
        return
    fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    if fallocate(descriptor, 0, 0, size) and (number := ctypes.get_errno()) in (
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EFBIG,
    ):
        raise OSError(number, os.strerror(number))


def _set_direct(descriptor: int, on: bool) -> bool:
    """Turn writing past the page cache on or off -> whether that could be done."""
    if fcntl is None or not hasattr(os, "O_DIRECT"):
        return False
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT if on else flags & ~os.O_DIRECT)
    except OSError:
        return False
    return True
