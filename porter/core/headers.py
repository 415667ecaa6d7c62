"""The tensors of one checkpoint file, in whatever format it is; the weights themselves are never read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from porter.core.checkpoint import TensorInfo, header_length, parse_header, read_header
from porter.core.errors import CheckpointError, MissingError
from porter.core.files import open_regular
from porter.core.gguf import Read, read_gguf

_ZIP, _PICKLE = b"PK", b"\x80"


def read_any(path: Path) -> tuple[dict[str, TensorInfo], dict[str, Any]]:
    """Tensors and notes of a safetensors, GGUF or legacy torch file, told apart by their first bytes.

    Raises:
        MissingError: no such file, or it cannot be read.
        CheckpointError: it breaks its format.
        BadInputError: it is a device or a pipe.
    """
    try:
        with open_regular(path) as file:
            start, size = file.read(9), os.fstat(file.fileno()).st_size
            if start.startswith(b"GGUF"):

                def read(begin: int, end: int) -> bytes:
                    file.seek(begin)
                    return file.read(end - begin)

                return read_gguf(read, path, size)
    except IsADirectoryError:
        raise CheckpointError(f"{path} is a folder, not a weights file", hint="name one file in it") from None
    except OSError as error:
        raise MissingError(f"cannot read {path}", found=error.strerror, hint="check the path and its rights") from None
    _no_gguf(start, path)
    if _is_torch(start):
        from porter.core.pickles import read_pickled

        return read_pickled(path)
    return read_header(path)


def read_ranged(read: Read, path: Path, size: int, first: int) -> tuple[dict[str, TensorInfo], dict[str, Any]]:
    """The same for a file that is far away, from as few ranges as will do.

    Args:
        read: gives bytes [begin, end) of the file.
        path: stands in the result and in the messages.
        size: of the whole file, in bytes.
        first: bytes to ask for at once; a header that fits into them takes one request.
    """
    start = read(0, min(first, size)) if size else b""

    def onwards(begin: int, end: int) -> bytes:
        known = start[begin:end]
        return known if len(known) == end - begin else known + read(begin + len(known), end)

    if start.startswith(b"GGUF"):
        return read_gguf(onwards, path, size)
    _no_gguf(start, path)
    if _is_torch(start):
        from porter.core.pickles import read_pickled_from
        from porter.core.ranges import RangeFile

        return read_pickled_from(RangeFile(onwards, size, start), path, size)
    length = header_length(start[:8], path, size)
    return parse_header(onwards(8, 8 + length), path, size)


def _no_gguf(start: bytes, path: Path) -> None:
    """Refuses a file that is called GGUF, and is neither that nor another format that is known by its beginning.

    Raises:
        CheckpointError: always, for such a file.
    """
    if path.suffix == ".gguf" and start[8:9] != b"{" and not _is_torch(start):
        raise CheckpointError(
            f"{path} is no GGUF file", expected="the letters GGUF at its beginning", found=repr(start[:4]),
            hint="download it again",
        )  # fmt: skip


def _is_torch(start: bytes) -> bool:
    # A safetensors file's length field can look like either; its ninth byte is always the brace of its JSON.
    return start[8:9] != b"{" and start.startswith((_ZIP, _PICKLE))
