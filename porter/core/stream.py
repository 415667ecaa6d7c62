"""The bytes of a plan's tensors, read from their files in windows, and written to one file.

Copies go through a few buffers, whatever the model's size. Only a transposition needs its source whole.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from porter.core.checkpoint import BITS, TensorInfo
from porter.core.errors import CheckpointError, RecipeError
from porter.core.hashing import Buffer, Lanes, Pool, SourceHashes
from porter.core.views import Run
from porter.core.writeback import Writeback

WINDOW = 4 << 20  # bytes that are moved at a time
BUFFERS = 6
AHEAD = 32 << 20  # bytes behind the window that the system is asked to have ready
_SMALL = 256 << 10  # runs below this many bytes on average are put together before they are written
_FORMATS: dict[int, Literal["B", "H", "I", "Q"]] = {
    8: "B",
    16: "H",
    32: "I",
    64: "Q",
}  # of a memoryview whose elements have so many bits

Progress = Callable[[int], None]


class Sources:
    """Source files, opened once each, read by position."""

    def __init__(self, lanes: Lanes, hashes: SourceHashes | None = None) -> None:
        self.pool, self.lanes, self.hashes = Pool(BUFFERS, WINDOW), lanes, hashes
        self.open: dict[Path, int] = {}
        self.expected: dict[int, tuple[int, int]] = {}  # descriptor → what the system was last asked to have ready
        self.read_to: dict[int, int] = {}  # descriptor → how far it has been read and may be forgotten

    def __enter__(self) -> Sources:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self.open.values():
            os.close(descriptor)

    def windows(self, tensors: Sequence[TensorInfo], runs: Sequence[Run]) -> Iterator[tuple[memoryview, Buffer]]:
        """The bytes of runs of one dtype, in order; each window belongs to its buffer, which the taker releases."""
        bits = BITS[tensors[runs[0].source].dtype]
        for run in runs:
            if run.begin * bits % 8 or run.end * bits % 8 or (bits < 8 and not run.plain):
                name = tensors[run.source].name
                raise RecipeError(f"{name} is cut inside a byte", expected="whole bytes", found=f"{bits} bits each")
        if not all(run.plain for run in runs):
            yield from self._gathered(tensors, runs, bits)
        elif len(runs) > 1 and sum(run.length for run in runs) * bits // 8 < len(runs) * _SMALL:
            yield from self._assembled(tensors, runs, bits)
        else:
            for run in runs:
                tensor = tensors[run.source]
                position, end = (tensor.begin + index * bits // 8 for index in (run.begin, run.begin + run.length))
                while position < end:
                    self._expect(tensor, position, end)
                    buffer = self.pool.take()
                    window = memoryview(buffer.data)[: min(WINDOW, end - position)]
                    self._read(tensor, window, position, buffer)
                    position += len(window)
                    yield window, buffer

    def whole(self, tensor: TensorInfo) -> bytearray:
        """All bytes of one tensor, in memory."""
        data = bytearray(tensor.nbytes)
        view = memoryview(data)
        for start in range(0, len(data), WINDOW):
            self._read(tensor, view[start : start + WINDOW], tensor.begin + start, None)
        return data

    def _assembled(
        self, tensors: Sequence[TensorInfo], runs: Sequence[Run], bits: int
    ) -> Iterator[tuple[memoryview, Buffer]]:
        """Many short runs: cut out of large reads, put together in windows."""
        size = bits // 8
        ahead = bytearray(WINDOW)
        held, start, stop = -1, 0, 0  # which source, and which of its bytes, `ahead` holds
        buffer, filled = self.pool.take(), 0
        for run in runs:
            tensor, begin, end = tensors[run.source], run.begin * size, (run.begin + run.length) * size
            while begin < end:
                if held != run.source or not start <= begin < stop:
                    held, start, stop = run.source, begin, min(begin + WINDOW, tensor.nbytes)
                    self._read(tensor, memoryview(ahead)[: stop - start], tensor.begin + start, None)
                count = min(end, stop, begin + WINDOW - filled) - begin
                buffer.data[filled : filled + count] = memoryview(ahead)[begin - start : begin - start + count]
                begin, filled = begin + count, filled + count
                if filled == WINDOW:
                    yield memoryview(buffer.data)[:filled], buffer
                    buffer, filled = self.pool.take(), 0
        if filled:
            yield memoryview(buffer.data)[:filled], buffer
        else:
            buffer.release()

    def _gathered(
        self, tensors: Sequence[TensorInfo], runs: Sequence[Run], bits: int
    ) -> Iterator[tuple[memoryview, Buffer]]:
        """Elements with a stride: taken from their whole tensors."""
        size, code = bits // 8, _FORMATS[bits]
        whole = {source: memoryview(self.whole(tensors[source])).cast(code) for source in {run.source for run in runs}}
        room = WINDOW // size
        buffer, filled = self.pool.take(), 0
        for run in runs:
            taken = 0
            while taken < run.length:
                count = min(run.length - taken, room - filled)
                part = run.part(taken, count)
                out = memoryview(buffer.data)[: room * size].cast(code)
                out[filled : filled + count] = whole[run.source][part.begin : part.end : part.step]
                taken, filled = taken + count, filled + count
                if filled == room:
                    yield memoryview(buffer.data)[: filled * size], buffer
                    buffer, filled = self.pool.take(), 0
        if filled:
            yield memoryview(buffer.data)[: filled * size], buffer
        else:
            buffer.release()

    def _expect(self, tensor: TensorInfo, position: int, end: int) -> None:
        """Tell the system what will be read soon: its own guess is too short for a disk that takes many requests."""
        if end - position < WINDOW or not hasattr(os, "posix_fadvise"):
            return
        descriptor = self._descriptor(tensor)
        start, stop = self.expected.get(descriptor, (0, 0))
        begin = stop if start <= position <= stop else position
        if position + WINDOW + AHEAD - begin >= WINDOW:
            os.posix_fadvise(descriptor, begin, position + WINDOW + AHEAD - begin, os.POSIX_FADV_WILLNEED)
            self.expected[descriptor] = (position, position + WINDOW + AHEAD)

    def _descriptor(self, tensor: TensorInfo) -> int:
        assert tensor.file is not None
        if tensor.file not in self.open:
            try:
                self.open[tensor.file] = os.open(tensor.file, os.O_RDONLY | getattr(os, "O_BINARY", 0))
            except OSError as error:
                raise CheckpointError(
                    f"cannot read {tensor.file}", expected="the file whose header was read", found=error.strerror,
                    hint="run again when nothing changes the file",
                ) from error  # fmt: skip
        return self.open[tensor.file]

    def _read(self, tensor: TensorInfo, window: memoryview, position: int, buffer: Buffer | None) -> None:
        descriptor = self._descriptor(tensor)
        filled = 0
        while filled < len(window):
            try:
                count = os.preadv(descriptor, [window[filled:]], position + filled)
            except OSError as error:
                raise CheckpointError(f"cannot read {tensor.name} in {tensor.file}", found=error.strerror) from error
            if count == 0:
                raise CheckpointError(
                    f"{tensor.file} became shorter while it was read",
                    expected=f"{tensor.name} up to byte {tensor.end}", found=f"the end at byte {position + filled}",
                    hint="run again when nothing changes the file",
                )  # fmt: skip
            filled += count
        end = position + len(window)
        if self.hashes is not None and tensor.file is not None:
            # Memory that is not a buffer of the pool is written to again: its hash gets a copy.
            data = window if buffer is not None else memoryview(bytes(window))
            self.hashes.feed(self.lanes, tensor.file, position, data, buffer)
            reached = self.hashes.frontier(tensor.file)
            end = min(end, reached) if reached is not None else end
        self.read_to[descriptor] = end


class Writer:
    """Writes and hashes one file from start to end."""

    def __init__(self, descriptor: int, lanes: Lanes, progress: Progress | None, *, drops_cache: bool) -> None:
        self.descriptor, self.lanes, self.progress = descriptor, lanes, progress
        self.position = 0
        self.file_hash = hashlib.sha256()
        self.writeback = Writeback(descriptor) if drops_cache else None

    def write(self, window: Any, tensor_hash: Any, buffer: Buffer | None = None) -> None:
        """Write bytes at the end of the file; they must stay as they are until `buffer` is free again."""
        self.lanes.feed(1, self.file_hash.update, window, buffer)
        if tensor_hash is not None:
            self.lanes.feed(2, tensor_hash.update, window, buffer)
        written = 0
        while written < len(window):
            written += os.pwrite(self.descriptor, window[written:], self.position + written)
        self.position += len(window)
        if self.progress:
            self.progress(len(window))

    def follow(self, sources: Sources) -> None:
        """Let the system write out, and forget, what lies behind."""
        if self.writeback:
            self.writeback.follow(self.position, sources.read_to)
