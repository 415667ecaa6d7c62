"""A time limit for code that runs in this process: a model that hangs cannot be stopped, so the process ends.

Nothing has been written by then: reports follow the comparison, and appear complete or not at all.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import IO, NoReturn

from parity.recorder import place
from porter.core.errors import BadInputError

_LEAVE = os._exit


class Watch:
    """Ends the process after `limit` seconds of this thread, without those that were spent in `paused()`."""

    def __init__(self, limit: float, who: str) -> None:
        self.limit, self.who = limit, who
        self._deadline = time.monotonic() + limit
        self._done = threading.Condition()
        self._open: bool | None = True  # None while paused
        self._watched = threading.get_ident()
        threading.Thread(target=self._wait, daemon=True).start()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What has a limit of its own."""
        began = time.monotonic()
        self._set(None, 0.0)
        try:
            yield
        finally:
            self._set(True, time.monotonic() - began)

    def stop(self) -> None:
        self._set(False, 0.0)

    def _set(self, value: bool | None, later: float) -> None:
        with self._done:
            self._open = value
            self._deadline += later
            self._done.notify()

    def _wait(self) -> None:
        with self._done:
            while self._open is not False:
                left = self._deadline - time.monotonic()
                if self._open and left <= 0:
                    self._end()
                self._done.wait(None if self._open is None else left)

    def _end(self) -> None:
        """Say what hangs, and where; then leave, whatever the code holds on to."""
        frame = sys._current_frames().get(self._watched)
        at = place(traceback.extract_stack(frame)).removeprefix(", ") if frame else ""
        error = BadInputError(
            f"{self.who} did not finish within {self.limit:g} s", found=at or None,
            hint=f"--limit {2 * self.limit:g} gives it more time; a smaller `config` in the case needs less",
        )  # fmt: skip
        with suppress(Exception):
            print("error: " + "\n".join(error.lines()), file=sys.stderr, flush=True)
        _LEAVE(error.exit_code)


@contextmanager
def bounded(limit: float, who: str) -> Iterator[Watch]:
    """End the process with a BadInputError's message and exit code where the block takes longer than `limit` seconds.

    An exit of the block's own is an error too, also one that asks for no clean-up (`os._exit`). Its prints go to
    standard error, and the working folder is the same afterwards.

    Args:
        who: what is bounded, for the message.
    """
    watch = Watch(limit, who)
    folder = Path.cwd()
    os._exit = _refused  # type: ignore[assignment]
    try:
        with _own_output() as output, redirect_stdout(output):
            yield watch
    except SystemExit as error:  # which would end this program as if all were well
        raise BadInputError(f"{who} calls exit({error.code!r})", hint="leave the exit out") from error
    finally:
        os._exit = _LEAVE
        os.chdir(folder)
        watch.stop()


def _own_output() -> IO[str]:
    """Where prints of the block go: standard error, as standard output belongs to the result."""
    try:
        return os.fdopen(os.dup(2), "w", encoding="utf-8", errors="backslashreplace")
    except OSError:  # closed by the caller
        return Path(os.devnull).open("w", encoding="utf-8")


def _refused(code: int) -> NoReturn:
    raise SystemExit(code)
