"""Legacy torch files (`.ckpt`, `.pt`, `.pth`, `.bin`): which tensors they hold, without torch and without running them.

A pickle is a program. Here `pickleops.Machine` runs it, which knows data and a dozen names: nothing that a file names
is ever imported or called, no storage is read, and time and memory are bounded.
"""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from porter.core.checkpoint import TensorInfo
from porter.core.errors import CheckpointError, MissingError
from porter.core.files import open_regular
from porter.core.pickleops import Cut, Machine, Refused, Storage, Tensor

MAX_PICKLE = 16 << 20  # torch.save takes 122 bytes for a tensor
MAX_DIRECTORY = MAX_PICKLE >> 1  # of a zip archive; 64 bytes for a tensor
MAX_TENSORS = 100_000
MAX_NAME = 500
_STEP = 1 << 18  # of an older file, which is one pickle after the other and then the storages
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
# Names that hold the tensors in common training frameworks; other names become part of the tensors' own.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "params_ema", "params", "generator")

_COPIES = ("ema", "model_ema", "ema_model", "ema_state_dict", "model_ema_state_dict")  # beside them: averaged copies


def read_pickled(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors of a legacy torch file, and notes: the names of code it would run (`code`), if any.

    Raises:
        MissingError: no such file.
        CheckpointError: it is no such file, it is damaged, or it does what a state dict does not.
    """
    try:
        with open_regular(path) as file:
            return read_pickled_from(file, path, os.fstat(file.fileno()).st_size)
    except (FileNotFoundError, IsADirectoryError):
        raise MissingError(f"no such file: {path}", hint="check the path") from None
    except OSError as error:
        raise MissingError(f"cannot read {path}", found=error.strerror, hint="check the path and its rights") from None


def read_pickled_from(file: Any, path: Path, size: int) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The same from an open file of `size` bytes that can seek; `path` stands in the result and in the messages."""
    others: set[str] = set()
    try:
        archive = zipfile.is_zipfile(Limited(file))
        file.seek(0)
        content, storages = zipped(file, others, size) if archive else legacy(file, others, size)
        found = flatten(content, size)
        _check_storages(storages, size)
    except (
        OSError,
        zipfile.BadZipFile,
        EOFError,
        struct.error,
        ValueError,
        pickle.UnpicklingError,
        Cut,
        AttributeError,
        TypeError,
        KeyError,
        IndexError,
        RecursionError,
        MemoryError,
        OverflowError,
        NotImplementedError,
    ) as error:
        raise CheckpointError(
            f"{path}: not a torch file that can be read safely", expected="a state dict saved by torch.save",
            found=f"{type(error).__name__}: {error}"[:200], hint="save it as safetensors with the code that made it",
        ) from None  # fmt: skip
    if not found:
        raise CheckpointError(
            f"{path}: no tensors in it", expected="a state dict", found=", ".join(sorted(others)[:3]) or "none",
            hint="name a checkpoint file",
        )  # fmt: skip
    tensors = {
        name: TensorInfo(name, tensor.dtype, tensor.shape, path, 0, tensor.nbytes) for name, tensor in found.items()
    }
    notes = {"pickled": "true"}
    if shared := _shared(found):
        notes["shared"] = shared
    return tensors, notes | ({"code": ", ".join(sorted(others)[:8])} if others else {})


class Limited:
    """A file of which no more than `limit` bytes are taken at once: `zipfile` reads what a directory claims."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.limit = file, MAX_DIRECTORY
        self.seek, self.tell = file.seek, file.tell

    def seekable(self) -> bool:
        return True

    def read(self, count: int = -1) -> bytes:
        if count > self.limit:
            raise Refused(f"an archive whose directory or data.pkl takes {count} bytes")
        data = self._file.read(count if count >= 0 else self.limit + 1)
        if len(data) > self.limit:
            raise Refused("an archive whose directory does not end")
        return data


def zipped(file: IO[bytes], others: set[str], size: int) -> tuple[Any, dict[str, Storage]]:
    limited = Limited(file)
    with zipfile.ZipFile(limited) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        names = [name for name in archive.namelist() if name.endswith("/data.pkl") or name == "data.pkl"]
        if len(names) != 1:
            raise Refused(f"{len(names)} data.pkl in the archive")
        info = entries[names[0]]
        if not 0 <= info.file_size <= MAX_PICKLE or info.compress_type != zipfile.ZIP_STORED:
            raise Refused(f"a data.pkl of {info.file_size} bytes, compressed or too large")
        limited.limit = MAX_PICKLE
        machine = Machine(others)
        content = machine.run(io.BytesIO(archive.read(info)))
    place = names[0].removesuffix("data.pkl") + "data/"
    for key, storage in machine.storages.items():
        entry = entries.get(place + key)
        here = entry.file_size if entry else 0
        if here < storage.nbytes or (entry and entry.header_offset + here > size):
            raise Refused(f"the storage {key[:40]!r} takes {storage.nbytes} bytes, and {here} are there")
    return content, machine.storages


def legacy(file: IO[bytes], others: set[str], size: int) -> tuple[Any, dict[str, Storage]]:
    """Before torch 1.6: magic number, protocol, system, then the object, each a pickle; storages follow."""
    text, position = b"", 0
    heads: list[Any] = []
    machine = Machine(others)
    while len(heads) < 4:
        try:
            heads.append(machine.run(io.BytesIO(text)))
        except Cut:
            # Perhaps it only does not end yet: the storages behind it are not read for its sake.
            more = file.read(min(max(_STEP, len(text)), MAX_PICKLE - len(text)))
            if not more:
                raise
            text += more
            continue
        position, storages = machine.position, machine.storages
        machine = Machine(others, position)
        if heads[0] != _LEGACY_MAGIC:
            raise Refused("neither a zip archive nor torch's older format")
    return heads[3], storages


def _check_storages(storages: Mapping[str, Storage], size: int) -> None:
    total = sum(storage.nbytes for storage in storages.values())
    if total > size:
        raise Refused(f"{len(storages)} storages of {total} bytes in a file of {size}")


def flatten(content: Any, size: int) -> dict[str, Tensor]:
    """Tensors of nested dicts by dotted names; the usual wrappers are opened, and a dict is visited once.

    Averaged copies that lie beside an opened wrapper get their names behind `ema.`.
    """
    copies: Any = None
    for _ in range(4):  # wrappers inside wrappers; a dict may hold itself
        opened = _first(content, _WRAPPERS)
        if opened is None:
            break
        beside = _first(content, _COPIES)
        content, copies = opened, copies if beside is None else beside
    found: dict[str, Tensor] = {}
    seen: set[int] = set()

    def walk(node: Any, name: str, depth: int) -> None:
        if isinstance(node, Tensor):
            if node.nbytes > size:
                raise Refused(f"the tensor {name!r} of {node.nbytes} bytes, in a file of {size}")
            if name in found:
                raise Refused(f"two tensors of the name {name!r}")
            found[name] = node
            if len(found) > MAX_TENSORS:
                raise Refused(f"more than {MAX_TENSORS} tensors")
        elif isinstance(node, Mapping) and depth < 16 and id(node) not in seen:
            seen.add(id(node))
            for key, value in node.items():
                if isinstance(value, Tensor | Mapping):
                    word = str(key)
                    if len(name) + len(word) > MAX_NAME or not word.isprintable():  # half characters are not, either
                        raise Refused(f"the name {word[:40]!a}, which no tensor can have")
                    walk(value, f"{name}.{word}" if name else word, depth + 1)

    walk(content, "", 0)
    walk(copies, "ema", 1)
    return found


def _first(content: Any, names: tuple[str, ...]) -> Any:
    """The first of some entries that is a dict with tensors in it."""
    inside = [content[name] for name in names if name in content] if isinstance(content, Mapping) else []
    return next((inner for inner in inside if isinstance(inner, Mapping) and _holds(inner)), None)


def _holds(node: Mapping[Any, Any]) -> bool:
    return any(isinstance(value, Tensor) for value in node.values())


def _shared(found: Mapping[str, Tensor]) -> str:
    """Tensors of one storage, as "a = b; c = d"."""
    users: dict[int, list[str]] = {}
    for name, tensor in found.items():
        users.setdefault(id(tensor.storage), []).append(name)
    return "; ".join(" = ".join(names[:8]) for names in users.values() if len(names) > 1)[:4000]
