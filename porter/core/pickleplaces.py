"""Where the tensors of a legacy torch file lie in it, so that their bytes can be copied without torch."""

from __future__ import annotations

import io
import os
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from porter.core.checkpoint import TensorInfo
from porter.core.errors import CheckpointError
from porter.core.files import open_regular
from porter.core.pickleops import Machine, Storage, Tensor
from porter.core.pickles import MAX_PICKLE, Limited, flatten, legacy, read_pickled, zipped

_AGAIN = "save it as safetensors with the code that made it"


def locate_pickled(path: Path) -> dict[str, TensorInfo]:
    """Tensors of a legacy torch file with their places in it, so that their bytes can be read without torch.

    Raises:
        MissingError, CheckpointError: as `read_pickled`; or a tensor's elements do not lie in order.
    """
    header, _ = read_pickled(path)
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        archive = zipfile.is_zipfile(Limited(file))
        file.seek(0)
        content, _ = zipped(file, set(), size) if archive else legacy(file, set(), size)
        found = flatten(content, size)
        starts = _zipped_places(file, found) if archive else _legacy_places(file, path)
    placed: dict[str, TensorInfo] = {}
    for name, tensor in found.items():
        if not tensor.contiguous:
            raise CheckpointError(
                f"{path}: the elements of {name} do not lie in order", expected="contiguous tensors",
                found=f"shape {list(tensor.shape)}, strides {list(tensor.stride)}",
                hint="save it again with contiguous tensors, or as safetensors",
            )  # fmt: skip
        begin = starts[tensor.storage.key] + tensor.offset * (tensor.nbytes // max(header[name].numel, 1))
        if begin + tensor.nbytes > size:
            raise CheckpointError(f"{path}: {name} ends beyond the file", expected=f"{size} bytes", hint=_AGAIN)
        placed[name] = TensorInfo(name, tensor.dtype, tensor.shape, path, begin, begin + tensor.nbytes)
    return placed


def _zipped_places(file: IO[bytes], found: Mapping[str, Tensor]) -> dict[str, int]:
    """Storage key → where its bytes begin; the archive's local headers say so."""
    file.seek(0)
    with zipfile.ZipFile(Limited(file)) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
    place = next(name for name in entries if name.endswith("data.pkl")).removesuffix("data.pkl") + "data/"
    starts: dict[str, int] = {}
    for key in {tensor.storage.key for tensor in found.values()}:
        entry = entries.get(place + key)
        if entry is None or entry.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(
                f"the storage {key[:40]!r} is {'missing' if entry is None else 'compressed'}",
                expected="a file that torch.save wrote", hint=_AGAIN,
            )  # fmt: skip
        file.seek(entry.header_offset)
        local = file.read(30)
        if len(local) < 30 or local[:4] != b"PK\x03\x04":
            raise CheckpointError(f"the storage {key[:40]!r} has no header of its own", hint=_AGAIN)
        name, extra = struct.unpack("<HH", local[26:30])
        starts[key] = entry.header_offset + 30 + name + extra
    return starts


def _legacy_places(file: IO[bytes], path: Path) -> dict[str, int]:
    """The same for the older format: after the pickled object, the list of keys, then each storage with its length."""
    file.seek(0)
    text = file.read(MAX_PICKLE)
    position, storages, keys = 0, dict[str, Storage](), []
    for index in range(5):
        machine = Machine(set(), position)
        value = machine.run(io.BytesIO(text))
        position = machine.position
        if index == 3:
            storages = machine.storages
        if index == 4:
            keys = [str(key) for key in value] if isinstance(value, list) else []
    if set(keys) != set(storages):
        raise CheckpointError(f"{path}: its storages are not those that its tensors name", hint=_AGAIN)
    starts: dict[str, int] = {}
    for key in keys:
        file.seek(position)
        (count,) = struct.unpack("<q", file.read(8))
        elements = storages[key].nbytes
        starts[key] = position + 8
        if count < 0 or count * max(1, elements // max(count, 1)) != elements:
            raise CheckpointError(f"{path}: the storage {key[:40]!r} is not as long as its tensors say", hint=_AGAIN)
        position += 8 + elements
    return starts
