"""The tensors of one checkpoint file, in whatever format it is; the weights themselves are never read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from porter.core.checkpoint import TensorInfo, read_header
from porter.core.errors import MissingError

_ZIP, _PICKLE = b"PK", b"\x80"


def read_any(path: Path) -> tuple[dict[str, TensorInfo], dict[str, Any]]:
    """Tensors and notes of a safetensors, GGUF or legacy torch file, told apart by their first bytes.

    Raises:
        MissingError: no such file, or it cannot be read.
        CheckpointError: it breaks its format.
    """
    try:
        with path.open("rb") as file:
            start, size = file.read(9), path.stat().st_size
    except OSError as error:
        raise MissingError(f"cannot read {path}", found=error.strerror, hint="check the path and its rights") from None
    if start.startswith(b"GGUF"):
        from porter.core.gguf import read_gguf

        with path.open("rb") as file:

            def read(begin: int, end: int) -> bytes:
                file.seek(begin)
                return file.read(end - begin)

            return read_gguf(read, path, size)
    # A safetensors file's length field can look like either; its ninth byte is always the brace of its JSON.
    if start[8:9] != b"{" and start.startswith((_ZIP, _PICKLE)):
        from porter.core.pickles import read_pickled

        return read_pickled(path)
    return read_header(path)
