"""Legacy torch files (`.ckpt`, `.pt`, `.pth`, `.bin`): which tensors they hold, without torch and without running them.

A pickle is a program. Here it is first scanned opcode by opcode, then run by an unpickler that knows a dozen names, all
of them stand-ins of ours: nothing that a file names is ever imported or called, and no storage is read.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import pickletools
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from porter.core.checkpoint import BITS, TensorInfo
from porter.core.errors import CheckpointError, MissingError
from porter.core.files import open_regular

MAX_PICKLE = 64 << 20
MAX_TENSORS = 1_000_000
_STEP = 1 << 18  # of an older file, which is one pickle after the other and then the storages
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_STORAGES = {
    "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16", "DoubleStorage": "F64",
    "LongStorage": "I64",
    "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8", "BoolStorage": "BOOL",
    "Float8_e4m3fnStorage": "F8_E4M3", "Float8_e5m2Storage": "F8_E5M2", "ComplexFloatStorage": "C64",
}  # fmt: skip
_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64", "int64": "I64", "uint8": "U8",
           "int32": "I32", "int16": "I16", "int8": "I8", "bool": "BOOL"}  # fmt: skip
# Names that hold the tensors in common training frameworks; other names become part of the tensors' own.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "params_ema", "params", "generator")


class _Storage:
    """A storage's dtype; its bytes stay where they are."""

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype


class _Tensor:
    def __init__(self, dtype: str, shape: tuple[int, ...]) -> None:
        self.dtype, self.shape = dtype, shape


class _Thing:
    """Whatever else a file names: an object that does nothing, with the state that the file gives it."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass

    def extend(self, values: Any) -> None:
        pass


def _rebuild(storage: Any, _offset: Any, size: Any, *_: Any) -> _Tensor:
    """Stands for torch._utils._rebuild_tensor_v2(storage, offset, size, stride, …)."""
    sizes = tuple(size) if isinstance(size, tuple | list) else ()
    if not isinstance(storage, _Storage) or not all(isinstance(s, int) and 0 <= s < 2**48 for s in sizes):
        raise pickle.UnpicklingError("a tensor without a storage or with an impossible size")
    return _Tensor(storage.dtype, sizes)


def _parameter(data: Any = None, *_: Any) -> Any:
    """Stands for torch._utils._rebuild_parameter(data, requires_grad, hooks)."""
    return data


class _Unpickler(pickle.Unpickler):
    """Knows the names that a state dict needs; every other name becomes a `_Thing`, and is remembered."""

    def __init__(self, file: IO[bytes], others: set[str]) -> None:
        super().__init__(file, encoding="latin1")
        self.others = others

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch._utils" and name in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3"):
            return _rebuild
        if module == "torch._utils" and name.startswith("_rebuild_parameter"):
            return _parameter
        if module == "torch" and name in _STORAGES:
            return _Storage(_STORAGES[name])
        if module == "torch" and name in _DTYPES:
            return _Storage(_DTYPES[name])
        if module in ("torch.storage", "torch") and name in ("TypedStorage", "UntypedStorage"):
            return _Storage("U8")
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) not in (("torch", "Size"), ("torch", "device"), ("builtins", "set"), ("__builtin__", "set")):
            self.others.add(f"{module}.{name}"[:120])
        return _Thing

    def persistent_load(self, pid: Any) -> _Storage:
        if isinstance(pid, tuple) and len(pid) >= 2 and pid[0] == "storage" and isinstance(pid[1], _Storage):
            return pid[1]
        raise pickle.UnpicklingError("a storage that is described badly")


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
        archive = zipfile.is_zipfile(file)
        file.seek(0)
        content = _zipped(path, file, others) if archive else _legacy(path, file, others)
    except (
        OSError,
        zipfile.BadZipFile,
        EOFError,
        struct.error,
        ValueError,
        pickle.UnpicklingError,
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
    tensors = _flatten(content, path)
    if not tensors:
        raise CheckpointError(
            f"{path}: no tensors in it", expected="a state dict", found=", ".join(sorted(others)[:3]) or "none",
            hint="name a checkpoint file",
        )  # fmt: skip
    total = sum(info.end - info.begin for info in tensors.values())
    notes = {"pickled": "true", "whole": str(total <= size).lower()}
    return tensors, notes | ({"code": ", ".join(sorted(others)[:8])} if others else {})


def _zipped(path: Path, file: IO[bytes], others: set[str]) -> Any:
    with zipfile.ZipFile(file) as archive:
        names = [name for name in archive.namelist() if name.endswith("/data.pkl") or name == "data.pkl"]
        if len(names) != 1:
            raise pickle.UnpicklingError(f"{len(names)} data.pkl in the archive")
        info = archive.getinfo(names[0])
        if info.file_size > MAX_PICKLE or info.compress_type != zipfile.ZIP_STORED:
            raise pickle.UnpicklingError(f"a data.pkl of {info.file_size} bytes, compressed or too large")
        return _run(archive.read(info), others)


def _legacy(path: Path, file: IO[bytes], others: set[str]) -> Any:
    """Before torch 1.6: magic number, protocol, system, then the object, each a pickle; storages follow."""
    text, position = b"", 0
    heads: list[Any] = []
    while len(heads) < 4:
        try:
            end = _scan(text, position)
        except (ValueError, EOFError, struct.error, IndexError):
            # Perhaps it only does not end yet: the storages behind it are not read for its sake.
            more = file.read(min(max(_STEP, len(text)), MAX_PICKLE - len(text)))
            if not more:
                raise
            text += more
            continue
        heads.append(_Unpickler(io.BytesIO(text[position:end]), others).load())
        position = end
        if heads[0] != _LEGACY_MAGIC:
            raise pickle.UnpicklingError("neither a zip archive nor torch's older format")
    return heads[3]


def _run(text: bytes, others: set[str]) -> Any:
    return _Unpickler(io.BytesIO(text[: _scan(text, 0)]), others).load()


def _scan(text: bytes, position: int) -> int:
    """Where the pickle that begins at `position` ends; refuses one that could take memory beyond its size."""
    stream = io.BytesIO(text)
    stream.seek(position)
    memo = 0
    for opcode, argument, _ in pickletools.genops(stream):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT"):
            if not isinstance(argument, int) or argument > memo + 65_536:
                raise pickle.UnpicklingError("a memo index out of line")
            memo = max(memo, argument)
        elif opcode.name == "MEMOIZE":
            memo += 1
        elif opcode.name in ("EXT1", "EXT2", "EXT4", "NEXT_BUFFER", "READONLY_BUFFER"):
            raise pickle.UnpicklingError(f"the opcode {opcode.name}")
        elif opcode.name == "STOP":
            return stream.tell()
    raise EOFError("the pickle does not end")


def _flatten(content: Any, path: Path) -> dict[str, TensorInfo]:
    """Tensors of nested dicts by dotted names; the usual wrappers are opened, and a dict is visited once."""
    for _ in range(4):  # wrappers inside wrappers; a dict may hold itself
        inside = [content[name] for name in _WRAPPERS if isinstance(content, Mapping) and name in content]
        content = next((inner for inner in inside if isinstance(inner, Mapping) and _holds(inner)), content)
    found: dict[str, TensorInfo] = {}
    seen: set[int] = set()

    def walk(node: Any, prefix: str, depth: int) -> None:
        if isinstance(node, _Tensor):
            name = prefix.rstrip(".")
            bits = math.prod(node.shape) * BITS.get(node.dtype, 8)
            found[name] = TensorInfo(name, node.dtype, node.shape, path, 0, bits // 8)
            if len(found) > MAX_TENSORS:
                raise CheckpointError(f"{path}: more than {MAX_TENSORS} tensors", hint="is it a checkpoint?")
        elif isinstance(node, Mapping) and depth < 16 and id(node) not in seen:
            seen.add(id(node))
            for key, value in node.items():
                walk(value, f"{prefix}{key}.", depth + 1)

    walk(content, "", 0)
    return found


def _holds(node: Mapping[Any, Any]) -> bool:
    return any(isinstance(value, _Tensor) for value in node.values())
