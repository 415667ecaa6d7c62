"""Writing a folder so that it appears whole or not at all, and so that a killed run is continued by the next.

Work happens in a hidden sibling `.<name>.partial-<key>`. `key` follows from everything that decides the result, so a
folder with the same key is the same job: its finished files are kept. Its manifest (`status: partial`) lists them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from porter.core.atomic import BusyError, check_room, fsync_folder, lock, unwritable, write_json
from porter.core.errors import PorterError
from porter.core.files import reading
from porter.core.port import MANIFEST, SCHEMA, file_record

_WINDOW = 8 << 20


class Staging:
    """The hidden folder of one job. Use `stage`, then `done`/`record`, then `publish`."""

    def __init__(self, output: Path, key: str) -> None:
        self.output, self.key = output, key
        self.folder = output.parent / f".{output.name}.partial-{key[:16]}"
        self.files: dict[str, dict[str, Any]] = {}
        self.sources: dict[str, dict[str, Any]] = {}
        self.resumed: list[str] = []

    def begin(self) -> None:
        """Creates the folder, or takes over what a killed run finished in it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            old = json.loads((self.folder / MANIFEST).read_bytes())
            finished, sources = dict(old["files"]), dict(old["sources"])
            usable = old["key"] == self.key and old["schema"] == SCHEMA and old["status"] == "partial"
        except (OSError, ValueError, KeyError, TypeError):
            finished, sources, usable = {}, {}, False
        for name, record in finished.items() if usable else ():
            with contextlib.suppress(OSError):
                if file_record(self.folder / name, record["sha256"]) == {k: record[k] for k in _KEPT}:
                    self.files[name] = record
        self.sources = sources if usable else {}
        self.resumed = list(self.files)
        for path in sorted(self.folder.rglob("*"), reverse=True):
            name = path.relative_to(self.folder).as_posix()
            if path.is_file() and name not in self.files and name not in (MANIFEST, _LOCK):
                path.unlink()

    def done(self, name: str) -> bool:
        """Whether file `name` was already finished, by this run or a killed one."""
        return name in self.files

    def path(self, name: str) -> Path:
        """Where file `name` is written; its folder exists."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def record(self, name: str, sha256: str, **more: Any) -> None:
        """Notes that file `name` is complete and durable."""
        self.files[name] = {**file_record(self.folder / name, sha256), **more}
        document = {"schema": SCHEMA, "status": "partial", "key": self.key, "files": self.files}
        write_json(self.folder / MANIFEST, {**document, "sources": self.sources})

    def copy(self, source: Path, name: str, label: str, progress: Callable[[int], None] | None = None) -> str:
        """Copies one file by streaming and records both sides, the source as `label`; returns its sha256."""
        digest, path = hashlib.sha256(), self.path(name)
        with reading(source):
            reader = source.open("rb", buffering=0)
        with reader, path.open("wb", buffering=0) as writer:
            while True:
                with reading(source):
                    chunk = reader.read(_WINDOW)
                if not chunk:
                    break
                digest.update(chunk)
                view = memoryview(chunk)
                while view:
                    view = view[writer.write(view) :]
                if progress:
                    progress(len(chunk))
            os.fsync(writer.fileno())
        self.sources[label] = file_record(source, digest.hexdigest())  # first: a killed run must not lose it
        self.record(name, digest.hexdigest())
        return digest.hexdigest()

    def publish(self, manifest: dict[str, Any], *, replace: bool) -> None:
        """Writes the final manifest and gives the folder its name.

        The lock is held, and its file stays, until the folder has its name: nobody takes over a folder on its way.

        Args:
            replace: move an existing `output` out of the way; without it, one that is no empty folder is an OSError.
        """
        write_json(self.folder / MANIFEST, manifest)
        for folder in [path for path in self.folder.rglob("*") if path.is_dir()]:
            fsync_folder(folder)
        fsync_folder(self.folder)
        replaced = self.output.parent / f".{self.output.name}.replaced"
        _remove(replaced)
        aside = replace and os.path.lexists(self.output)
        if aside:
            self.output.rename(replaced)
        try:
            self.folder.rename(self.output)
        except OSError:
            if aside:
                replaced.rename(self.output)
            raise
        with contextlib.suppress(OSError):
            (self.output / _LOCK).unlink()
        fsync_folder(self.output.parent)
        _remove(replaced)


_KEPT = ("size", "mtime_ns", "sha256")
_LOCK = ".lock"


@contextlib.contextmanager
def stage(output: Path, key: str, needed: int) -> Iterator[Staging]:
    """A staging folder for `output`, locked against a second run of the same job.

    An error removes the folder; Ctrl-C and kill -9 leave it for the next run. Leftovers of other jobs for the same
    output are removed, unless a process still works on them.

    Args:
        needed: bytes that will be written, checked against the free space before anything is.

    Raises:
        ResourceError: not writable, not enough space, or another process is writing the same port.
    """
    made = _make_parents(output.parent)
    staging = Staging(output, key)
    held: IO[str] | None = None
    try:
        held = _hold(staging.folder, output)
        staging.begin()
        _sweep(staging)
        check_room(output.parent, needed - sum(record["size"] for record in staging.files.values()))
        yield staging
    except Exception as error:
        if not isinstance(error, BusyError):
            shutil.rmtree(staging.folder, ignore_errors=True)
            for folder in reversed(made):
                with contextlib.suppress(OSError):
                    folder.rmdir()
        if isinstance(error, PorterError) or not isinstance(error, OSError):
            raise
        raise unwritable(output, error) from error
    finally:
        if held:
            held.close()


def _make_parents(folder: Path) -> list[Path]:
    """Creates `folder`; returns the folders that did not exist before, outermost first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()][::-1]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        for path in reversed(missing):
            with contextlib.suppress(OSError):
                path.rmdir()
        raise unwritable(folder, error) from error
    return missing


def _hold(folder: Path, output: Path) -> IO[str]:
    """Make and lock the staging folder until the returned file is closed; raises BusyError."""
    while True:
        folder.mkdir(exist_ok=True)
        try:
            held = (folder / _LOCK).open("w")
        except FileNotFoundError:  # published by its owner between the two lines
            continue
        try:
            lock(held.fileno(), output)
            # Its owner may have published the folder, or removed it, between opening and locking.
            if (folder / _LOCK).exists() and os.path.samestat(os.fstat(held.fileno()), (folder / _LOCK).stat()):
                return held
        except BaseException:
            held.close()
            raise
        held.close()


def _remove(path: Path) -> None:
    """Remove a folder, or a link to one, if it is there."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def _sweep(staging: Staging) -> None:
    """Removes hidden folders that earlier, different jobs left beside this output."""
    for other in staging.output.parent.glob(f".{staging.output.name}.partial-*"):
        if other == staging.folder or not other.is_dir():
            continue
        try:
            held = _hold(other, staging.output)
        except (BusyError, OSError):
            continue
        shutil.rmtree(other, ignore_errors=True)
        held.close()
