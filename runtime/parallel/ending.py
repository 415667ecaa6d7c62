"""A job of several processes ends as one: one message, one exit code.

torchrun ends all processes when one fails, and shows each one's exit code; but every process would print what it saw,
and those that waited for a dead one would only say that a connection broke. The first process that fails claims the
word in the job's store; the others end silently with its exit code.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch.distributed as dist

from porter.core.errors import PorterError, ResourceError

_KEY = "first failure"
# What gloo and the store say of a peer that is gone or silent; NCCL's errors have a class of their own.
_LOST = ("gloo/transport", "onnection closed by peer", "onnection reset", "roken pipe", "imed out")


@contextmanager
def one_voice(store: Any, rank: int) -> Iterator[None]:
    """Run the body in every process of a job. Rank 0 speaks for all; an error is heard once, wherever it happens.

    Raises:
        ResourceError: another process is gone, or did not answer in time.
        SystemExit: another process failed first; its exit code.
    """
    word = _Word(store.clone(), rank)  # of its own, so that no claim waits for a call that the body makes
    with word.watching():
        try:
            with _silent(rank != 0):
                yield
        except BaseException as error:
            if isinstance(error, SystemExit) and not error.code:
                raise
            shown = _translated(error)
            first, code = word.claim(exit_code(shown))
            if not first:
                raise SystemExit(code) from error
            if shown is error:
                raise
            raise shown from error


def exit_code(error: BaseException) -> int:
    """What the process of an error ends with."""
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    return int(getattr(error, "exit_code", PorterError.exit_code))  # click's errors have one too


class _Word:
    """The right to say why the job ended: one process has it, and there one thread."""

    def __init__(self, store: Any, rank: int) -> None:
        self.store, self.rank = store, rank
        self.lock, self.claimed = threading.Lock(), False

    def claim(self, code: int) -> tuple[bool, int]:
        """Whether this process failed first, and the exit code of the one that did. The process is about to end: from
        here on torchrun's SIGTERM must not come between the claim and the message."""
        with self.lock:
            self.claimed = True
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            return self._first(code)

    def terminated(self) -> None:
        """End this process at once on SIGTERM; the main thread may wait in a kernel for good."""
        with self.lock:
            if self.claimed:  # the main thread is on its way out
                return
            lost = _lost("SIGTERM, which torchrun sends to the processes that are left")
            first, code = self._first(lost.exit_code)
            if first and sys.__stderr__ is not None:
                print("error: " + "\n".join(lost.lines()), file=sys.__stderr__, flush=True)
            os._exit(code)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Call `terminated` in a thread when SIGTERM comes; a handler would wait until the main thread is in Python."""
        if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
            yield
            return
        reading, writing = os.pipe()
        os.set_blocking(writing, False)

        def watch() -> None:
            while number := os.read(reading, 1):
                if number[0] == signal.SIGTERM:
                    self.terminated()
            os.close(reading)

        before = signal.signal(signal.SIGTERM, lambda number, frame: None)
        descriptor = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        threading.Thread(target=watch, daemon=True, name="SIGTERM").start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(descriptor)
            os.close(writing)
            if not self.claimed:
                signal.signal(signal.SIGTERM, before)

    def _first(self, code: int) -> tuple[bool, int]:
        try:
            said = self.store.compare_set(_KEY, "", f"{self.rank} {code}").decode()
        except RuntimeError:  # the launcher is gone, and the store with it
            return self.rank == 0, code
        rank, first_code = said.split()
        return int(rank) == self.rank, int(first_code)


def _translated(error: BaseException) -> BaseException:
    """An error of the connection in our words."""
    broken = isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _LOST)
    )
    return _lost(str(error).splitlines()[0].partition(". ")[0]) if broken else error


def _lost(found: str) -> ResourceError:
    return ResourceError(
        "another process of this job died or does not answer",
        expected="all processes that torchrun started, until the end", found=found,
        hint="see torchrun's report below: signal 9 often means that the machine's memory ran out",
    )  # fmt: skip


@contextmanager
def _silent(silent: bool) -> Iterator[None]:
    """Drop what the body prints: rank 0 prints the same."""
    if not silent:
        yield
        return
    with (
        Path(os.devnull).open("w", encoding="utf-8", errors="replace") as nowhere,
        redirect_stdout(nowhere),
        redirect_stderr(nowhere),
    ):
        yield
