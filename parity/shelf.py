"""Activations on disk, by their content: what one block hands to the next is written once."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from porter.core.atomic import lock, unwritable
from porter.core.errors import ResourceError

PREFIX = ".activations-"


@contextmanager
def spool(folder: Path) -> Iterator[Path]:
    """A folder for one run inside `folder`, for this process alone; what a killed run left there goes first.

    Raises:
        ResourceError: `folder` cannot be made or written.
        BusyError: another process is at work in it.
    """
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            lock(descriptor, folder)
            for left in folder.glob(f"{PREFIX}*"):
                shutil.rmtree(left, ignore_errors=True)
            made = stack.enter_context(tempfile.TemporaryDirectory(prefix=PREFIX, dir=folder))
        except OSError as error:
            raise unwritable(folder, error) from error
        yield Path(made)


@dataclass(frozen=True)
class Slip:
    """Where a tensor lies: the name of its file is the hash of its bytes."""

    digest: str
    shape: tuple[int, ...]
    dtype: torch.dtype


class Shelf:
    """A folder of tensors; whoever makes the folder removes it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bytes = 0
        self._known: set[str] = set()

    def put(self, tensor: Tensor) -> Slip:
        """Write a tensor, unless it is there.

        Raises:
            ResourceError: the disk is full, or cannot be written.
        """
        with torch._C.DisableTorchFunction():  # under `recorder.Float64` it would say that it is of float32
            kind = tensor.dtype
        slip = Slip(digest(tensor), tuple(tensor.shape), kind)
        if slip.digest not in self._known:
            try:
                (self.folder / slip.digest).write_bytes(_bytes(tensor))
            except OSError as error:
                raise ResourceError(
                    f"activations cannot be written to {self.folder.parent}", found=str(error),
                    expected="about 2 GB for a model of 12 billion parameters", hint="another folder: -o DIR",
                ) from error  # fmt: skip
            self._known.add(slip.digest)
            self.bytes += tensor.nbytes
        return slip

    def get(self, slip: Slip) -> Tensor:
        """Read a tensor."""
        kind = str(slip.dtype).removeprefix("torch.")
        with torch._C.DisableTorchFunction():
            flat = torch.from_numpy(np.fromfile(self.folder / slip.digest, getattr(np, kind, np.uint8)))
            return (flat if flat.dtype == slip.dtype else flat.view(slip.dtype)).reshape(slip.shape)


def digest(tensor: Tensor) -> str:
    """The hash of a tensor's bytes, in order."""
    return hashlib.sha256(_bytes(tensor)).hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def with_tensors(value: Any, given: Mapping[str, Any], name: str = "") -> Any:
    """`value` with the tensors in it replaced that `given` names, as `recorder.tensors_of` names them."""
    if name and name in given:
        return given[name]
    if isinstance(value, Tensor):
        return given.get(name or "0", value)

    def inner(key: Any, item: Any) -> Any:
        return with_tensors(item, given, f"{name}.{key}" if name else str(key))

    if isinstance(value, Mapping):
        changed: Any = copy.copy(value)
        for key in value:
            changed[key] = inner(key, value[key])
        return changed
    if isinstance(value, (tuple, list)):
        items = [inner(i, item) for i, item in enumerate(value)]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [f.name for f in dataclasses.fields(value)]
        return dataclasses.replace(value, **{n: inner(n, getattr(value, n)) for n in fields})
    return value
