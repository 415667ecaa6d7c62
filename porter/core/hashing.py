"""sha256 of source files, taken from what is read of them anyway."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from porter.core.errors import BadInputError
from porter.core.files import reading
from porter.core.lanes import SOURCE_HASH, Buffer, Lanes

_GAP = 4 << 20  # bytes read at a time where a source is hashed without being copied


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
        lanes.feed(SOURCE_HASH, digest.update, window, buffer)
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
        with reading(path):
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
        with reading(path):
            file = path.open("rb", buffering=0)
        with file:
            file.seek(begin)
            while begin < end:
                with reading(path):
                    data = file.read(min(_GAP, end - begin))
                if not data:
                    raise BadInputError(
                        f"{path} became shorter while it was read", expected=f"{end} bytes", found=f"{begin}",
                        hint="run again when nothing changes the file",
                    )  # fmt: skip
                lanes.feed(SOURCE_HASH, digest.update, data)
                begin += len(data)
                if progress:
                    progress(len(data))
