"""What can be refused before torch is imported: places that cannot be written, names of nothing, odd options."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import struct
import sys
import threading
from pathlib import Path
from shlex import quote

from porter.core.errors import MissingError, ResourceError, UsageError

SHIMMED = (  # what parity/shims.py has, which imports torch
    "flash_attn", "flash_attn_interface", "xformers", "apex", "timm", "transformer_engine", "kernels",
)  # fmt: skip
_HEADER = 1 << 27  # bytes of a safetensors header that are read


def shim_names(text: str | None) -> tuple[str, ...] | None:
    """The names in `--shims=NAMES`; empty for the usual ones, None where there is no `--shims`.

    Raises:
        UsageError: one is of nothing that can be stood in for.
    """
    if not text:
        return None if text is None else ()
    names = tuple(name.strip() for name in text.split(","))
    known = (*SHIMMED, "cuda")
    for name in names:
        head, equals, version = name.partition("==")
        if head not in known or (equals and not re.fullmatch(r"\d+(\.\d+)*", version)):
            raise UsageError(
                f"--shims has no stand-in for {name!r}", expected=f"of {', '.join(known)}, by commas; or none",
                found=f"--shims={text}", hint="--shims, or --shims=flash_attn,cuda",
            )  # fmt: skip
    return names


def checkout(folder: Path | None) -> None:
    """Refuse a `--reference-repo` that is no folder; raises MissingError."""
    if folder is not None and not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise MissingError(
            f"no such checkout: {folder} {what}", hint="--reference-repo names a folder with the original code"
        )


def interpreter(name: str | None) -> str:
    """The interpreter that is meant, as a path or from PATH; raises MissingError."""
    if name is None:
        return sys.executable
    found = shutil.which(name)
    if found is None:
        path = Path(name)
        what = "is a folder" if path.is_dir() else "cannot be executed" if path.is_file() else "does not exist"
        raise MissingError(
            f"no interpreter {name}: it {what}", expected="a Python with torch, safetensors and numpy",
            hint="--reference-python <environment>/bin/python",
        )  # fmt: skip
    return os.path.abspath(found)  # noqa: PTH100 (resolving would leave the virtual environment)


def time_limit(limit: float) -> None:
    """Refuse what is no number of seconds; raises UsageError."""
    if not 0 < limit < threading.TIMEOUT_MAX:
        raise UsageError("the time limit is a number of seconds above zero", found=str(limit), hint="--limit 1800")


def gate(value: float | None) -> None:
    """Refuse a fence that everything or nothing passes; raises UsageError."""
    if value is not None and not 0 < value < math.inf:
        raise UsageError("--gate must be positive and finite", found=str(value), hint="leave --gate out for 1e-3")


def file_to_read(path: Path | None, option: str) -> None:
    """Refuse a file that is not there; raises MissingError."""
    if path is not None and not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise MissingError(f"{option}: {path} {what}", expected="a file", hint=f"{option} names a file to read")


def report_folder(folder: Path | None) -> None:
    """Refuse a folder that a report cannot be written to; what does not exist yet is made later.

    Raises:
        UsageError: it is a file.
        ResourceError: it, or the folder that it would be made in, cannot be written.
    """
    if folder is None:
        return
    place = folder.absolute()
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        kind = "is a file" if place.is_file() else "leads nowhere" if place.is_symlink() else "is no folder"
        raise UsageError(f"-o {folder} cannot be made: {place} {kind}", expected="a folder", hint="-o <folder>")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ResourceError(f"-o {folder}: {place} cannot be written", hint="name another folder: -o <folder>")


def junit_file(path: Path | None) -> None:
    """Refuse a place for a JUnit file.

    Raises:
        UsageError: it is a folder, or a file that is no JUnit file and would be lost.
        MissingError: there is no such folder.
        ResourceError: the folder cannot be written.
    """
    if path is not None:
        _new_file(path, "--junit", "parity.xml")
        if path.is_file() and b"<testsuite" in _beginning(path, 4096):
            return
        _nothing_lost(path, "--junit", "an earlier JUnit file")


def trace_file(path: Path) -> None:
    """Refuse a place for a trace; raises as `junit_file`."""
    _new_file(path, "-o", "trace.safetensors")
    if path.is_file() and _is_trace(path):
        return
    _nothing_lost(path, "-o", "an earlier trace")


def _new_file(path: Path, option: str, example: str) -> None:
    if path.is_dir() or not path.name:
        raise UsageError(f"{option} {path} is a folder", expected="a file", hint=f"{option} {path / example}")
    if not path.parent.is_dir():
        raise MissingError(f"there is no folder {path.parent} for {option}", hint=f"mkdir -p {quote(str(path.parent))}")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise ResourceError(f"{option} {path}: {path.parent} cannot be written", hint=f"another {option} FILE")


def _nothing_lost(path: Path, option: str, earlier: str) -> None:
    if os.path.lexists(path):
        raise UsageError(
            f"{path} is there already, and would be lost", expected=f"a new name, or {earlier}",
            found="something else", hint=f"choose another {option} FILE, or remove it yourself",
        )  # fmt: skip


def _beginning(path: Path, count: int) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(count)
    except OSError:
        return b""


def _is_trace(path: Path) -> bool:
    """Whether a file's safetensors header is that of a trace; an unreadable one is none."""
    head = _beginning(path, 8)
    size = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
    try:
        header = json.loads(_beginning(path, 8 + min(size, _HEADER))[8:])
        return '"schema":"porter.trace/' in header["__metadata__"]["trace"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return False
