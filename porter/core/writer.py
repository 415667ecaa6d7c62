"""Writing one long file from start to end, hashed on the way, past the page cache where the system lets us.

Fresh memory for the page cache, not the disk, is what slows long copies down: `cp` spends most of its time there.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable
from functools import partial
from typing import Any

from porter.core.lanes import FILE_HASH, TENSOR_HASH, WRITE, Buffer, Lanes, Pool

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

LARGE = 256 << 20  # bytes from which on a file is written past the page cache, and its sources are dropped from it
_ALIGNED = 4096  # what memory, places and lengths of direct writes are multiples of

Progress = Callable[[int], None]


class Writer:
    """Writes and hashes one file from start to end, in whole buffers of a pool."""

    def __init__(
        self, descriptor: int, pool: Pool, lanes: Lanes, progress: Progress | None = None, *, direct: bool = False
    ) -> None:
        self.descriptor, self.pool, self.lanes, self.progress = descriptor, pool, lanes, progress
        self.position = 0  # how many bytes have come in
        self.file_hash = hashlib.sha256()
        self._direct = direct and _set_direct(descriptor, True)
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
        self.lanes.feed(WRITE, put, buffer.data[: self._filled], buffer)
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
            try:
                written += os.pwrite(self.descriptor, view[written:], position + written)
            except OSError as error:
                if not self._direct or error.errno != errno.EINVAL:
                    raise
                self._direct = False  # the file system takes the flag, and other places or lengths
                _set_direct(self.descriptor, False)


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
