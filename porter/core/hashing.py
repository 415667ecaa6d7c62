"""sha256 beside the copying: each hash is fed in order, in threads of its own, from buffers that are used again.

`hashlib` lets go of the interpreter while it hashes, so that hashing costs no time where there is a core to spare. The
result does not depend on the number of threads.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any

from porter.core.errors import BadInputError

DEFAULT_WORKERS = min(4, os.cpu_count() or 1)
_GAP = 4 << 20  # bytes read at a time where a source is hashed without being copied


class Buffer:
    """Memory that several hashes and a write share; it goes back to its pool when the last lets go."""

    def __init__(self, pool: Pool, size: int) -> None:
        self.data = bytearray(size)
        self._pool, self._users, self._lock = pool, 0, threading.Lock()

    def hold(self) -> None:
        """One more user."""
        with self._lock:
            self._users += 1

    def release(self) -> None:
        """One user less."""
        with self._lock:
            self._users -= 1
            free = self._users == 0
        if free:
            self._pool.free.put(self)


class Pool:
    """A fixed number of buffers, made when they are first needed."""

    def __init__(self, count: int, size: int) -> None:
        self.free: SimpleQueue[Buffer] = SimpleQueue()
        self._left, self._size = count, size

    def take(self) -> Buffer:
        """A buffer that nobody uses; waits for one."""
        if self._left and self.free.empty():
            self._left -= 1
            buffer = Buffer(self, self._size)
        else:
            buffer = self.free.get()
        buffer.hold()
        return buffer


class Lanes:
    """Threads that feed hashes. What enters one lane is done in its order; `workers` includes the copying thread."""

    def __init__(self, workers: int, lanes: int = 3) -> None:
        count = min(max(workers - 1, 0), lanes)
        self._queues: list[SimpleQueue[tuple[Callable[[Any], None], Any, Buffer | None] | None]] = [
            SimpleQueue() for _ in range(count)
        ]
        self._threads = [threading.Thread(target=self._serve, args=(queue,), daemon=True) for queue in self._queues]
        self._failed: list[BaseException] = []
        for thread in self._threads:
            thread.start()

    def feed(self, lane: int, update: Callable[[Any], None], data: Any, buffer: Buffer | None = None) -> None:
        """Call `update(data)` in a lane; `buffer` holds the data and is kept until then."""
        if not self._queues:
            update(data)
            return
        if buffer is not None:
            buffer.hold()
        self._queues[lane % len(self._queues)].put((update, data, buffer))

    def _serve(self, queue: SimpleQueue[Any]) -> None:
        while (item := queue.get()) is not None:
            update, data, buffer = item
            try:
                if not self._failed:
                    update(data)
            except BaseException as error:
                self._failed.append(error)
            finally:
                del data
                if buffer is not None:
                    buffer.release()

    def finish(self) -> None:
        """Wait until all is fed; raises what a lane raised."""
        for queue in self._queues:
            queue.put(None)
        for thread in self._threads:
            thread.join()
        self._queues = []
        if self._failed:
            raise self._failed[0]

    def __enter__(self) -> Lanes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()
        else:  # what failed matters more than what the lanes say
            for queue in self._queues:
                queue.put(None)
            for thread in self._threads:
                thread.join()


class SourceHashes:
    """sha256 of whole source files, taken from what is read of them anyway.

    Windows arrive in the order in which targets need them. One that stands where the hash has arrived is fed as it is;
    before one further on, the gap is read; one further back has been hashed already. `finish` reads what is left.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._files: dict[Path, tuple[Any, list[int]]] = {path: (hashlib.sha256(), [0]) for path in paths}

    def feed(self, lanes: Lanes, path: Path, position: int, window: memoryview, buffer: Buffer | None) -> None:
        """Bytes of a file that have just been read at `position`."""
        found = self._files.get(path)
        if found is None:
            return
        digest, at = found
        if position > at[0]:
            self._read(path, digest, at[0], position, lanes)
        elif position < at[0]:
            skip = at[0] - position
            if skip >= len(window):
                return
            window = window[skip:]
        lanes.feed(0, digest.update, window, buffer)
        at[0] = max(at[0], position) + len(window)

    def frontier(self, path: Path) -> int | None:
        """How far a file has been hashed; None where it is not."""
        found = self._files.get(path)
        return found[1][0] if found else None

    def finish(self, path: Path, progress: Callable[[int], None] | None = None) -> str:
        """The file's sha256, after reading what nobody read.

        Raises:
            BadInputError: the file became shorter.
        """
        digest, at = self._files[path]
        size = path.stat().st_size
        if at[0] > size:
            raise BadInputError(f"{path} became shorter while it was read", expected=f"{at[0]} bytes", found=f"{size}")
        with Lanes(1) as lanes:
            self._read(path, digest, at[0], size, lanes, progress)
        at[0] = size
        return str(digest.hexdigest())

    def _read(
        self, path: Path, digest: Any, begin: int, end: int, lanes: Lanes, progress: Callable[[int], None] | None = None
    ) -> None:
        with path.open("rb", buffering=0) as file:
            file.seek(begin)
            while begin < end:
                data = file.read(min(_GAP, end - begin))
                if not data:
                    raise BadInputError(
                        f"{path} became shorter while it was read", expected=f"{end} bytes", found=f"{begin}",
                        hint="run again when nothing changes the file",
                    )  # fmt: skip
                lanes.feed(0, digest.update, data)
                begin += len(data)
                if progress:
                    progress(len(data))
