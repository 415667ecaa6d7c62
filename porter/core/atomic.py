"""A file that appears under its name complete, or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from pathlib import Path
from types import TracebackType

from porter.core.errors import PorterError, ResourceError

try:
    import fcntl
except ImportError:  # not on Windows: there two runs on one output are not kept apart
    fcntl = None  # type: ignore[assignment]


class PartialFile:
    """The file under a temporary name in the same folder, locked against a second run; published by a rename.

    A killed run leaves the temporary file without its lock, and the next run takes it over.
    """

    def __init__(self, output: Path, size: int) -> None:
        self.output, self.size = output, size
        self.path = output.with_name(f".{output.name}.partial")
        self.descriptor = -1
        self.made: list[Path] = []  # folders that did not exist, outermost first
        self.published = False

    def __enter__(self) -> PartialFile:
        try:
            self._make_folders()
            self._open()
            self._check_room()
        except BaseException as error:
            self._clean()
            raise self._refusal(error) from error if isinstance(error, OSError) else None
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._clean()
        if isinstance(error, OSError):
            raise self._refusal(error) from error

    def publish(self) -> None:
        """Make the finished file durable, and give it its name."""
        os.fsync(self.descriptor)
        self.path.replace(self.output)
        self.published = True
        fsync_folder(self.output.parent)

    def _make_folders(self) -> None:
        folder, absent = self.output.parent, list[Path]()
        while not os.path.lexists(folder):
            absent.append(folder)
            folder = folder.parent
        for folder in reversed(absent):
            folder.mkdir(exist_ok=True)
            self.made.append(folder)

    def _open(self) -> None:
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
            try:
                _lock(descriptor)
                # Between open and lock the previous owner may have published or removed this very file.
                if self.path.exists() and os.path.samestat(os.fstat(descriptor), self.path.stat()):
                    os.ftruncate(descriptor, 0)
                    self.descriptor = descriptor
                    return
            except BlockingIOError:
                os.close(descriptor)
                raise ResourceError(
                    f"another run is writing {self.output}", expected="one run at a time",
                    found=f"a lock on {self.path}",
                    hint="wait for it, or choose another output",
                ) from None  # fmt: skip
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)

    def _check_room(self) -> None:
        free = shutil.disk_usage(self.output.parent).free
        if free < self.size:
            raise ResourceError(
                f"no room for {self.output}", expected=f"{self.size} bytes free", found=f"{free} bytes",
                hint="free some space, or choose another output",
            )  # fmt: skip

    def _refusal(self, error: BaseException) -> BaseException:
        if isinstance(error, PorterError) or not isinstance(error, OSError):
            return error
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        return ResourceError(
            f"{'no room for' if full else 'cannot write'} {self.output}", found=error.strerror or str(error),
            expected=f"a folder that can be written, with {self.size} bytes free",
            hint="free some space, or choose another output",
        )  # fmt: skip

    def _clean(self) -> None:
        """Leave nothing behind unless the file was published."""
        if self.descriptor >= 0:
            if not self.published:
                self.path.unlink(missing_ok=True)
            os.close(self.descriptor)
            self.descriptor = -1
        if not self.published:
            for folder in reversed(self.made):
                with contextlib.suppress(OSError):
                    folder.rmdir()


def fsync_folder(folder: Path) -> None:
    """Make a rename durable; where folders cannot be synced, the rename alone must do."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _lock(descriptor: int) -> None:
    """Take the file for this process; BlockingIOError if another has it. Where files cannot be locked, nothing."""
    if fcntl is not None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:
            return
