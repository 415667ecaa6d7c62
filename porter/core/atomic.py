"""Writing without leaving half of anything: locks, room on the disk, and a file that appears whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shlex
import shutil
import stat
from pathlib import Path
from types import TracebackType
from typing import Any

from porter.core.errors import ResourceError, UsageError
from porter.core.files import open_regular

_PLAN = re.compile(rb'"schema"\s*:\s*"porter\.plan/')
_KINDS = (
    (stat.S_ISLNK, "a symbolic link"), (stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"), (stat.S_ISSOCK, "a socket"),
)  # fmt: skip

try:
    import fcntl
except ImportError:  # not on Windows: there two runs on one output are not kept apart
    fcntl = None  # type: ignore[assignment]


class BusyError(ResourceError):
    """Another process writes the same output."""


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
            check_room(self.output.parent, self.size)
        except OSError as error:
            self._clean()
            raise unwritable(self.output, error) from error
        except BaseException:
            self._clean()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._clean()
        if isinstance(error, OSError):
            raise unwritable(self.output, error) from error

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
                lock(descriptor, self.output)
                # Between open and lock the previous owner may have published or removed this very file.
                if self.path.exists() and os.path.samestat(os.fstat(descriptor), self.path.stat()):
                    os.ftruncate(descriptor, 0)
                    self.descriptor = descriptor
                    return
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)

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


def lock(descriptor: int, output: Path) -> None:
    """Take an open file for this process until it is closed; where files cannot be locked, nothing.

    Raises:
        BusyError: another process has it, because it writes `output`.
    """
    if fcntl is not None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BusyError(f"another process is writing {output}", hint="wait for it, or choose another -o") from error
        except OSError:
            return


def check_room(folder: Path, needed: int) -> None:
    """Refuse before the first byte what cannot fit.

    Raises:
        ResourceError: less than `needed` bytes are free in `folder`.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ResourceError(
            f"not enough space in {folder}",
            expected=f"{needed / 1e9:.2f} GB free",
            found=f"{free / 1e9:.2f} GB",
            hint="free space, or choose another folder with -o",
        )


def unwritable(output: Path, error: OSError) -> ResourceError:
    """The error for a failed write."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return ResourceError(f"the disk is full: {output} was not written", hint="free space, then run the same again")
    return ResourceError(
        f"cannot write {output}", found=error.strerror or str(error), hint="choose another place with -o"
    )


def replace_bytes(path: Path, data: bytes) -> None:
    """Write a small file so that `path` holds either its old content or all of the new; OSError where it cannot be.

    The temporary name carries the process, so that two writers of one path do not share it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        temporary.unlink(missing_ok=True)
        with temporary.open("xb") as file:  # never through a link that someone put there
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_json(path: Path, document: Any) -> None:
    """Writes JSON so that `path` holds either its old content or all of the new.

    A plan goes where the user said, so it replaces nothing but an earlier plan.

    Raises:
        UsageError: `path` names no file, or something else than a plan is there.
        ResourceError: it cannot be written.
    """
    if not path.name:
        raise UsageError(f"{str(path)!r} names no file", expected="a file name", hint="-o FILE")
    plan = isinstance(document, dict) and str(document.get("schema")).startswith("porter.plan/")
    try:
        if plan:
            _only_a_plan(path)
        replace_bytes(path, (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode())
    except FileNotFoundError as error:
        folder = path.parent
        raise ResourceError(
            f"cannot write {path}: there is no folder {folder}", expected="a folder that exists",
            found=error.strerror, hint=f"mkdir -p {shlex.quote(str(folder))}, then run the same again",
        ) from error  # fmt: skip
    except OSError as error:
        raise unwritable(path, error) from error
    except ValueError as error:  # a NUL in the name
        raise UsageError(f"{str(path)!r} names no file", found=str(error), hint="-o FILE") from error


def _only_a_plan(path: Path) -> None:
    """Refuses to replace whatever is at `path`, unless it is a plan that was saved earlier.

    Raises:
        UsageError: it is something else.
    """
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    there = next((words for is_such, words in _KINDS if is_such(mode)), "no file")
    if stat.S_ISREG(mode):
        with open_regular(path) as file:
            if _PLAN.search(file.read(4096)):
                return
        there = "a file that is no plan"
    raise UsageError(
        f"{path} is there already, and would be lost", expected="a new name, or a plan that was saved earlier",
        found=there, hint="choose another -o, or remove it yourself",
    )  # fmt: skip
