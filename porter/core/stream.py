"""The bytes of a plan's tensors, read from their files in windows.

Copies go through a few buffers, whatever the model's size. Only a transposition needs its source whole.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Literal

from porter.core.checkpoint import BITS, TensorInfo
from porter.core.errors import CheckpointError, RecipeError
from porter.core.hashing import SourceHashes
from porter.core.lanes import Buffer, Lanes, Pool
from porter.core.views import Run

WINDOW = 4 << 20  # bytes that are moved at a time
BUFFERS = 6
_BEHIND = 32 << 20  # bytes that the system is told at a time to forget
_SMALL = 256 << 10  # runs below this many bytes on average are put together before they are written
_AHEAD = 4096  # runs that are looked at before a read
_GAP = 64 << 10  # bytes between two short runs that are read with them, rather than read twice
_FORMATS: dict[int, Literal["B", "H", "I", "Q"]] = {
    8: "B",
    16: "H",
    32: "I",
    64: "Q",
}  # of a memoryview whose elements have so many bits

Room = Callable[[int], tuple[memoryview, Buffer]]  # at most so many bytes of a buffer, which the taker releases


class Sources:
    """Source files, opened once each, read by position."""

    def __init__(self, lanes: Lanes, hashes: SourceHashes | None = None, *, drops_cache: bool = False) -> None:
        self.pool, self.lanes, self.hashes, self.drops_cache = Pool(BUFFERS, WINDOW), lanes, hashes, drops_cache
        self.open: dict[Path, int] = {}
        self.dropped: dict[int, int] = {}  # descriptor → up to where the system was told to forget it

    def __enter__(self) -> Sources:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self.open.values():
            os.close(descriptor)

    def windows(
        self, tensors: Sequence[TensorInfo], runs: Sequence[Run], room: Room | None = None
    ) -> Iterator[tuple[memoryview, Buffer]]:
        """The bytes of runs of one dtype, in order; each window belongs to its buffer, which the taker releases.

        Args:
            room: where they are read to, as `Writer.room`; a buffer of the pool by default.
        """
        room = room or self.pool.room
        bits = BITS[tensors[runs[0].source].dtype]
        for run in runs:
            if run.begin * bits % 8 or run.end * bits % 8 or (bits < 8 and not run.plain):
                name = tensors[run.source].name
                raise RecipeError(f"{name} is cut inside a byte", expected="whole bytes", found=f"{bits} bits each")
        if not all(run.plain for run in runs):
            yield from self._gathered(tensors, runs, bits, room)
        elif len(runs) > 1 and sum(run.length for run in runs) * bits // 8 < len(runs) * _SMALL:
            yield from self._assembled(tensors, runs, bits, room)
        else:
            for run in runs:
                tensor = tensors[run.source]
                position, end = (tensor.begin + index * bits // 8 for index in (run.begin, run.begin + run.length))
                while position < end:
                    window, buffer = room(end - position)
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
        self, tensors: Sequence[TensorInfo], runs: Sequence[Run], bits: int, room: Room
    ) -> Iterator[tuple[memoryview, Buffer]]:
        """Many short runs: cut out of larger reads, one at a time of each source, put together in windows."""
        sources = {run.source for run in runs}
        limit = max(WINDOW // len(sources), _GAP)
        ahead = {source: memoryview(bytearray(min(limit, tensors[source].nbytes))) for source in sources}
        held = dict.fromkeys(sources, (0, 0))  # which bytes of its source each of them holds
        (window, buffer), filled = room(WINDOW), 0
        for number, run in enumerate(runs):
            tensor, (begin, end) = tensors[run.source], _bytes(run, bits)
            while begin < end:
                start, stop = held[run.source]
                if not start <= begin < stop:
                    start, stop = begin, min(_reach(runs, number, bits), begin + limit)
                    held[run.source] = start, stop
                    self._read(tensor, ahead[run.source][: stop - start], tensor.begin + start, None)
                count = min(end, stop, begin + len(window) - filled) - begin
                window[filled : filled + count] = ahead[run.source][begin - start : begin - start + count]
                begin, filled = begin + count, filled + count
                if filled == len(window):
                    yield window, buffer
                    (window, buffer), filled = room(WINDOW), 0
        if filled:
            yield window[:filled], buffer
        else:
            buffer.release()

    def _gathered(
        self, tensors: Sequence[TensorInfo], runs: Sequence[Run], bits: int, room: Room
    ) -> Iterator[tuple[memoryview, Buffer]]:
        """Elements with a stride: taken from their whole tensors."""
        size, code = bits // 8, _FORMATS[bits]
        whole = {source: memoryview(self.whole(tensors[source])).cast(code) for source in {run.source for run in runs}}
        (window, buffer), filled = room(WINDOW), 0
        for run in runs:
            taken = 0
            while taken < run.length:
                count = min(run.length - taken, (len(window) - filled) // size)
                part = run.part(taken, count)
                out = window[filled : filled + count * size].cast(code)
                out[:] = whole[run.source][part.begin : part.end : part.step]
                taken, filled = taken + count, filled + count * size
                if filled == len(window):
                    yield window, buffer
                    (window, buffer), filled = room(WINDOW), 0
        if filled:
            yield window[:filled], buffer
        else:
            buffer.release()

    def _descriptor(self, tensor: TensorInfo) -> int:
        assert tensor.file is not None
        if tensor.file not in self.open:
            try:
                descriptor = os.open(tensor.file, os.O_RDONLY | getattr(os, "O_BINARY", 0))
            except OSError as error:
                raise CheckpointError(
                    f"cannot read {tensor.file}", expected="the file whose header was read", found=error.strerror,
                    hint="run again when nothing changes the file",
                ) from error  # fmt: skip
            self.open[tensor.file] = descriptor
            if hasattr(os, "posix_fadvise"):  # reads further ahead
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        return self.open[tensor.file]

    def _read(self, tensor: TensorInfo, window: memoryview, position: int, buffer: Buffer | None) -> None:
        descriptor = self._descriptor(tensor)
        filled = 0
        while filled < len(window):
            try:
                count = os.preadv(descriptor, [window[filled:]], position + filled)
            except OSError as error:
                raise CheckpointError(
                    f"cannot read {tensor.name} in {tensor.file}", found=error.strerror,
                    hint="check the disk that it lies on, then run the same again",
                ) from error  # fmt: skip
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
        if self.drops_cache:
            self._drop(descriptor, end)

    def _drop(self, descriptor: int, end: int) -> None:
        """Tell the system to forget what has been read: its memory is used again, which is faster than fresh memory."""
        begin = self.dropped.get(descriptor, 0)
        if end - begin >= _BEHIND and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, begin, end - begin, os.POSIX_FADV_DONTNEED)
            self.dropped[descriptor] = end


def _bytes(run: Run, bits: int) -> tuple[int, int]:
    """Where a plain run begins and ends in its source, in bytes."""
    return run.begin * bits // 8, (run.begin + run.length) * bits // 8


def _reach(runs: Sequence[Run], number: int, bits: int) -> int:
    """Up to which byte of its source the run and those after it go forward, without a gap that is worth a new read."""
    source = runs[number].source
    begin, reached = _bytes(runs[number], bits)
    for run in islice(runs, number + 1, number + _AHEAD):
        if run.source == source:
            start, end = _bytes(run, bits)
            if not begin <= start <= reached + _GAP or reached - begin >= WINDOW:
                break
            reached = max(reached, end)
    return reached
