"""How a block's weights come while the one before it runs: from a thread, or on CUDA on a stream of their own."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Protocol

import torch
from torch import Tensor


class _Home(Protocol):
    @property
    def names(self) -> Sequence[str]: ...
    def fetch(self, names: Sequence[str]) -> dict[str, Tensor]: ...


class PinnedHome:
    """Weights in page-locked memory, from which CUDA copies while it computes."""

    def __init__(self, home: _Home) -> None:
        # One by one: there is no second copy of the model.
        self._tensors = {name: home.fetch([name])[name].pin_memory() for name in home.names}

    @property
    def names(self) -> Sequence[str]:
        return tuple(self._tensors)

    def fetch(self, names: Sequence[str]) -> dict[str, Tensor]:
        return {name: self._tensors[name] for name in names}


class ThreadFetcher:
    """Reads the next group in a thread. One group is on its way at most."""

    _pool: ThreadPoolExecutor | None = None

    def __init__(self, home: _Home, device: torch.device, groups: Sequence[Sequence[str]]) -> None:
        self.home, self.device, self.groups = home, device, groups
        self._coming: tuple[int, Future[dict[str, Tensor]]] | None = None

    def now(self, number: int) -> dict[str, Tensor]:
        """A group's tensors on the device."""
        return {name: tensor.to(self.device) for name, tensor in self.home.fetch(self.groups[number]).items()}

    def start(self, number: int) -> None:
        """Begin to fetch a group, in the place of any other that was begun."""
        self.drop()
        if ThreadFetcher._pool is None:
            ThreadFetcher._pool = ThreadPoolExecutor(1, "porter-weights")
        self._coming = number, ThreadFetcher._pool.submit(self.now, number)

    def take(self, number: int) -> dict[str, Tensor]:
        """A group's tensors, which were begun to be fetched, or are now."""
        if self._coming is None or self._coming[0] != number:
            self.drop()
            return self.now(number)
        (_, future), self._coming = self._coming, None
        return future.result()

    def drop(self) -> None:
        """Forget the group that is on its way."""
        if self._coming is not None:
            if not self._coming[1].cancel():
                wait([self._coming[1]])
            self._coming = None

    def left(self) -> None:
        """A group's tensors were given up."""


class StreamFetcher:
    """Copies the next group from pinned memory on a second stream of a CUDA device, while the current one computes.

    The program runs ahead of the device. A copy is begun once the block before it was launched, and the block before
    that one is through: no more than two groups take memory.
    """

    def __init__(self, home: _Home, device: torch.device, groups: Sequence[Sequence[str]]) -> None:
        self.home, self.device, self.groups = home, device, groups
        self._stream = torch.cuda.Stream(device)
        self._wanted: int | None = None
        self._coming: tuple[int, dict[str, Tensor], torch.cuda.Event] | None = None
        self._done: torch.cuda.Event | None = None  # when the device is through with the group that was given up last

    def now(self, number: int) -> dict[str, Tensor]:
        """A group's tensors, copied on the current stream."""
        found = self.home.fetch(self.groups[number])
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in found.items()}

    def start(self, number: int) -> None:
        """Copy a group, in the place of any other that was begun: now, or once the running block was launched."""
        self._coming, self._wanted = None, number
        if self._done is None:
            self._copy()

    def _copy(self) -> None:
        if self._wanted is None:
            return
        with torch.cuda.stream(self._stream):
            tensors = self.now(self._wanted)
            event = torch.cuda.Event()
            event.record(self._stream)
        self._coming, self._wanted = (self._wanted, tensors, event), None

    def take(self, number: int) -> dict[str, Tensor]:
        """A group's tensors; the current stream waits for them, the program does not."""
        coming, self._coming, self._wanted = self._coming, None, None
        if coming is None or coming[0] != number:
            return self.now(number)
        current = torch.cuda.current_stream(self.device)
        current.wait_event(coming[2])
        for tensor in coming[1].values():
            tensor.record_stream(current)
        return coming[1]

    def drop(self) -> None:
        """Forget the group that is on its way."""
        # Its memory belongs to the second stream, which is through with the copy before it uses it again.
        self._coming, self._wanted, self._done = None, None, None

    def left(self) -> None:
        """A group's tensors were given up; what reads them is launched."""
        before, self._done = self._done, torch.cuda.Event()
        self._done.record(torch.cuda.current_stream(self.device))
        if before is not None:
            before.synchronize()
        self._copy()
