"""Threads beside the copying: memory that several of them share, and lanes in which work is done in its order.

Hashing and writing let go of the interpreter, so that they cost no time where there is a core to spare. What is written
does not depend on the number of threads.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable
from queue import SimpleQueue
from types import TracebackType
from typing import Any

DEFAULT_WORKERS = 6  # reading, writing twice and three hashes; on two cores too, since most of them wait for the disk
_LOOSE = 4  # pieces of data in no buffer that may wait at once: a pool bounds the others
WRITE, SOURCE_HASH, FILE_HASH, TENSOR_HASH, OTHER_WRITE = range(5)  # what each lane is for


class Buffer:
    """Page-aligned memory that hashes and a write share; it goes back to its pool when the last lets go."""

    def __init__(self, pool: Pool, size: int) -> None:
        self.data = memoryview(mmap.mmap(-1, size))
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
        self._left, self.size = count, size

    def take(self) -> Buffer:
        """A buffer that nobody uses; waits for one."""
        if self._left and self.free.empty():
            self._left -= 1
            buffer = Buffer(self, self.size)
        else:
            buffer = self.free.get()
        buffer.hold()
        return buffer

    def room(self, limit: int) -> tuple[memoryview, Buffer]:
        """At most `limit` bytes of a buffer to read into; the taker releases it."""
        buffer = self.take()
        return buffer.data[:limit], buffer


class Lanes:
    """Threads that take calls. What enters one lane is done in its order; `workers` includes the copying thread."""

    def __init__(self, workers: int, lanes: int = 5) -> None:
        count = min(max(workers - 1, 0), lanes)
        self._queues: list[SimpleQueue[tuple[Callable[[Any], None], Any, Buffer | None] | None]] = [
            SimpleQueue() for _ in range(count)
        ]
        self._threads = [threading.Thread(target=self._serve, args=(queue,), daemon=True) for queue in self._queues]
        self._failed: list[BaseException] = []
        self._loose = threading.Semaphore(_LOOSE)
        for thread in self._threads:
            thread.start()

    def feed(self, lane: int, take: Callable[[Any], None], data: Any, buffer: Buffer | None = None) -> None:
        """Call `take(data)` in a lane; `buffer` holds the data and is kept until then. Raises what a lane raised.

        Data in no buffer waits here until a lane has taken enough of what came before.
        """
        if self._failed:
            raise self._failed[0]
        if not self._queues:
            take(data)
            return
        if buffer is not None:
            buffer.hold()
        else:
            self._loose.acquire()
        self._queues[lane % len(self._queues)].put((take, data, buffer))

    def _serve(self, queue: SimpleQueue[Any]) -> None:
        while (item := queue.get()) is not None:
            take, data, buffer = item
            try:
                if not self._failed:
                    take(data)
            except BaseException as error:
                self._failed.append(error)
            finally:
                del take, data
                if buffer is not None:
                    buffer.release()
                else:
                    self._loose.release()

    def finish(self) -> None:
        """Wait until all is done; raises what a lane raised."""
        self._stop()
        if self._failed:
            raise self._failed[0]

    def _stop(self) -> None:
        for queue in self._queues:
            queue.put(None)
        for thread in self._threads:
            thread.join()
        self._queues, self._threads = [], []

    def __enter__(self) -> Lanes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()
        else:  # what failed matters more than what the lanes say
            self._stop()
