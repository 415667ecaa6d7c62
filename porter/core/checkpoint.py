"""Safetensors files, read strictly and without torch: what is in them and where, never the weights themselves.

A file is 8 bytes of little-endian header length N, N bytes of JSON, then the tensors' bytes without gaps. Everything a
hostile or damaged file can get wrong is refused here, so that the rest of porter may trust a `Header`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from porter.core.errors import BadInputError, CheckpointError, MissingError
from porter.core.files import MAX_MARKS, count_marks, open_regular, read_json

# Bits of one element for each dtype code of the format.
BITS: Mapping[str, int] = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "F64": 64, "I64": 64, "U64": 64, "C64": 64,
}  # fmt: skip

ANY = "*"  # the dtype of a header entry that takes its source's dtype; of a source layout: any that weights have
# The format allows 100 MB. Released headers are below 1 MB, about a hundred bytes a tensor; 10 MB and 600,000 values
# hold 40,000 tensors and a large `__metadata__`, and keep what a hostile header takes in memory below 150 MB.
MAX_HEADER = 10 * 1000 * 1000
_MAX_BYTES = 2**63 - 1
_MAX_RANK = 32
_LFS_START = b"version "  # of a Git LFS pointer's first line, where a safetensors file has its header's length

_DTYPE_NAMES: Mapping[str, str] = {
    "float64": "F64", "fp64": "F64", "float32": "F32", "fp32": "F32", "float16": "F16", "fp16": "F16", "half": "F16",
    "bfloat16": "BF16", "bf16": "BF16",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor: its dtype code, shape, and absolute byte range [begin, end) in `file` (None: not a file yet)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path | None
    begin: int
    end: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor; 0 while the dtype is still open (`ANY`)."""
        return nbytes(self.dtype, self.numel)


Header = Mapping[str, TensorInfo]


def nbytes(dtype: str, numel: int) -> int:
    """Bytes of `numel` elements of `dtype`; 0 for the open dtype."""
    return 0 if dtype == ANY else numel * BITS[dtype] // 8


def floating(dtype: str) -> bool:
    """Whether weights may have this dtype: no integers, truth values or complex numbers."""
    return dtype == ANY or dtype.startswith(("F", "BF"))


def spec(dtype: str, shape: Iterable[int], name: str = "") -> TensorInfo:
    """A header entry for a tensor that is not in a file yet."""
    return TensorInfo(name, dtype, tuple(shape), None, 0, 0)


def specs(shapes: Mapping[str, tuple[int, ...]], dtype: str = ANY) -> dict[str, TensorInfo]:
    """Header entries for many tensors of one dtype; TypeError where a shape is made of something else than sizes."""
    for name, shape in shapes.items():
        if not all(type(size) is int and size >= 0 for size in shape):
            raise TypeError(f"{name} has the shape {list(shape)!r:.100}")
    return {name: spec(dtype, shape, name) for name, shape in shapes.items()}


def dtype_code(name: str) -> str:
    """The format's code for a dtype as people write it: `bfloat16`, `torch.float32`, `BF16`.

    Raises:
        CheckpointError: no dtype has that name.
    """
    plain = name.removeprefix("torch.")
    code = _DTYPE_NAMES.get(plain.lower(), plain.upper())
    if code not in BITS:
        raise CheckpointError(
            f"unknown dtype {name!r}", expected=", ".join(sorted({*_DTYPE_NAMES})), found=name, hint="use one of these"
        )
    return code


def read_header(path: str | os.PathLike[str]) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Read the tensors and the `__metadata__` of a safetensors file, in the order of their bytes.

    Raises:
        MissingError: there is no such file, or it cannot be read.
        CheckpointError: the file breaks the format in any way; the message names file and tensor.
    """
    path = Path(path)
    try:
        with open_regular(path) as stream:
            size = os.fstat(stream.fileno()).st_size
            length = header_length(stream.read(8), path, size)
            text = stream.read(length)
    except FileNotFoundError:
        raise MissingError(f"no such file: {path}", hint="check the path") from None
    except IsADirectoryError:
        raise CheckpointError(
            f"{path} is a folder, not a weights file", hint="name one .safetensors file in it"
        ) from None
    except OSError as error:
        raise MissingError(f"cannot read {path}: {error.strerror}", hint="check the path and its permissions") from None
    if len(text) != length:
        raise _bad(path, "it became shorter while it was read", f"{length} bytes of header", f"{len(text)} bytes")
    return parse_header(text, path, size)


def header_length(head: bytes, path: Path, size: int) -> int:
    """Bytes of JSON that follow the first 8 bytes of a safetensors file of `size` bytes.

    Raises:
        CheckpointError: no file can begin like this; a Git-LFS pointer.
    """
    if len(head) < 8:
        raise _bad(path, "too short to be a safetensors file", "at least 8 bytes", f"{size} bytes")
    if head == _LFS_START:
        _refuse_pointer(path)
    length = int.from_bytes(head, "little")
    if length > MAX_HEADER:
        raise _bad(path, "header too long", f"at most {MAX_HEADER} bytes", f"{length} bytes")
    if 8 + length > size:
        raise _bad(path, "truncated in its header", f"{8 + length} bytes of header", f"a file of {size} bytes")
    return length


def parse_header(text: bytes, path: Path, size: int) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Check the JSON part of a header (the N bytes after the length) against a file of `size` bytes.

    `path` stands in the result and in the messages; it need not exist here (a remote file's name will do).

    Raises:
        CheckpointError: see `read_header`.
    """
    if (marks := count_marks(text)) > MAX_MARKS:
        raise _bad(path, "its header holds too much", f"at most {MAX_MARKS} JSON values", f"{marks}")
    try:
        document = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except _DuplicateKeyError as error:
        raise _bad(path, f"the key {error.key!r} appears twice in its header", "each key once", "two entries") from None
    except (ValueError, RecursionError) as error:
        raise _bad(path, "its header is not JSON", "a JSON object", str(error)) from None
    if not isinstance(document, dict):
        raise _bad(path, "its header is not a JSON object", "an object", type(document).__name__)
    metadata = document.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _bad(path, "its __metadata__ is not a table of strings", "string values", repr(metadata)[:80])

    start = 8 + len(text)
    tensors = [_entry(path, name, entry, start) for name, entry in document.items()]
    tensors.sort(key=lambda tensor: (tensor.begin, tensor.end))
    position = start
    for tensor in tensors:
        if tensor.begin != position:
            kind = "overlaps its neighbour" if tensor.begin < position else "leaves a gap before it"
            raise _bad(path, f"tensor {tensor.name!r} {kind}", f"byte {position}", f"byte {tensor.begin}")
        position = tensor.end
    if position != size:
        kind = "truncated" if size < position else "longer than its header says"
        raise _bad(path, kind, f"{position} bytes", f"{size} bytes")
    return {tensor.name: tensor for tensor in tensors}, metadata


def stays_inside(name: str) -> bool:
    """Whether a shard's name, as an index gives it, is a plain path below the index's own folder."""
    pure = PurePosixPath(name)
    plain = name.isprintable() and "\\" not in name and ":" not in name and ".." not in pure.parts
    return bool(name) and plain and not pure.is_absolute()


def read_sharded(index: str | os.PathLike[str]) -> dict[str, TensorInfo]:
    """Read the headers of all shards that a `*.safetensors.index.json` names, in shard and byte order.

    Raises:
        MissingError: the index or a shard is missing.
        CheckpointError: a shard path is absolute or leaves the folder, or index and shards disagree on a tensor.
    """
    index = Path(index)
    try:
        document = read_json(index)
    except BadInputError as error:
        raise CheckpointError(error.what, expected=error.expected, found=error.found, hint=error.hint) from None
    places = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
        raise _bad(index, "it has no weight_map", "a table from tensor to file name", repr(places)[:80])

    root = index.parent.resolve()
    tensors: dict[str, TensorInfo] = {}
    for shard in sorted(set(places.values())):
        header, _ = read_header(_shard(index, root, shard))
        for name, tensor in header.items():
            if places.get(name) != shard:
                place = places.get(name, "no shard at all")
                raise _bad(index, f"tensor {name!r} lies in {shard}", f"the index to name {shard}", place)
            tensors[name] = tensor
    lost = [name for name in places if name not in tensors]
    if lost:
        raise _bad(index, f"tensor {lost[0]!r} is not in its shard", f"{lost[0]} in {places[lost[0]]}", "no such entry")
    return tensors


def read_bytes(tensor: TensorInfo) -> bytes:
    """The bytes of one tensor.

    Raises:
        CheckpointError: the file has become shorter since its header was read, or there is none.
    """
    if tensor.file is None:
        raise CheckpointError(f"tensor {tensor.name!r} is not in a file", hint="give the header of a file")
    with open_regular(tensor.file) as stream:
        stream.seek(tensor.begin)
        data = stream.read(tensor.end - tensor.begin)
    if len(data) != tensor.end - tensor.begin:
        raise _bad(tensor.file, f"truncated in {tensor.name!r}", f"{tensor.nbytes} bytes", f"{len(data)} bytes")
    return data


def header_bytes(tensors: Iterable[TensorInfo], metadata: Mapping[str, str]) -> bytes:
    """The length and JSON that start a file holding `tensors` back to back in this order, padded to 8 bytes."""
    document: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    position = 0
    for tensor in tensors:
        end = position + tensor.nbytes
        document[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class _DuplicateKeyError(Exception):
    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for key, value in pairs:
        (key + value if isinstance(value, str) else key).encode()  # a lone surrogate is a ValueError
        if key in table:
            raise _DuplicateKeyError(key)
        table[key] = value
    return table


def _entry(path: Path, name: str, entry: Any, start: int) -> TensorInfo:
    """One tensor of the header, checked by itself; `start` is where the file's data begins."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _bad(path, f"tensor {name!r} is badly described", "dtype, shape and data_offsets", repr(entry)[:80])
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise _bad(path, f"tensor {name!r} has an unknown dtype", ", ".join(BITS), repr(dtype)[:40])
    if not isinstance(shape, list) or len(shape) > _MAX_RANK or not all(_is_size(size) for size in shape):
        raise _bad(path, f"tensor {name!r} has a bad shape", "a list of sizes", repr(shape)[:80])
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(offset) for offset in offsets):
        raise _bad(path, f"tensor {name!r} has bad data_offsets", "[begin, end]", repr(offsets)[:80])
    bits = math.prod(shape) * BITS[dtype]
    if bits > _MAX_BYTES or bits % 8:
        raise _bad(path, f"tensor {name!r} has an impossible size", "whole bytes below 2^63", f"{shape} x {dtype}")
    begin, end = offsets
    if end - begin != bits // 8:
        raise _bad(
            path, f"tensor {name!r} does not fill its byte range", f"{bits // 8} bytes for {dtype} {shape}",
            f"{end - begin} bytes",
        )  # fmt: skip
    return TensorInfo(name, dtype, tuple(shape), path, start + begin, start + end)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MAX_BYTES


def _shard(index: Path, root: Path, name: str) -> Path:
    """The file that an index calls `name`; it has to lie in the index's folder `root`."""
    if not stays_inside(name):
        raise _bad(index, f"the shard path {name!r} leaves the folder", "a file name", name[:80])
    target = Path(os.path.realpath(root / name))  # not `resolve`, which raises on a loop
    if not target.is_relative_to(root) and not _is_cache_link(target, root):
        raise _bad(index, f"the shard {name!r} is a link out of its folder", f"a file in {root}", name)
    try:
        target.stat()
    except OSError as error:
        raise MissingError(
            f"{index.name} names a shard that is missing: {name[:80]}", found=error.strerror, hint="download it again"
        ) from None
    return index.parent / name


def _is_cache_link(target: Path, root: Path) -> bool:
    """Whether a link of the hub's cache leads to its own repository: snapshots/<commit>/file → ../../blobs/<hash>."""
    return target.parent.name == "blobs" and any(target.parent.parent == folder.parent for folder in root.parents
                                                 if folder.name == "snapshots")  # fmt: skip


def _refuse_pointer(path: Path) -> None:
    raise CheckpointError(
        f"{path} is a Git LFS pointer, not the weights", expected="the file itself", found="a pointer of a few lines",
        hint=f"git lfs pull --include {path.name}",
    )  # fmt: skip


def _bad(path: Path, what: str, expected: str, found: str) -> CheckpointError:
    return CheckpointError(f"{path}: {what}", expected=expected, found=found, hint="download or export the file again")
