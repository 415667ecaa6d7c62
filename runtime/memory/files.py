"""A module's weights where they are anyway: in their files, read through the compiled on-load plan when they are asked
for. Nothing is kept, and nothing is mapped into memory."""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from porter.core.checkpoint import TensorInfo
from porter.core.errors import CheckpointError
from porter.core.ops import TORCH_NAMES
from porter.core.shards import Cut, stored
from porter.core.tensorplan import Step, TensorPlan
from runtime.parallel.tensor import Share, whole

_ALIGNED = 64  # bytes at whose multiples torch's own tensors begin
Precision = Callable[[str, torch.dtype], torch.dtype]  # of a module's tensor: its name, its dtype on disk


class Reader:
    """Byte ranges of files, each opened once, for as long as this object lives."""

    def __init__(self) -> None:
        self._open: dict[Path, int] = {}
        weakref.finalize(self, _close, self._open)

    def into(self, tensor: Tensor, info: TensorInfo, start: int = 0) -> Tensor:
        """Fill a contiguous `tensor` with the bytes of a stored one, from byte `start` of it on.

        Raises:
            CheckpointError: the file cannot be read, or became shorter since its header was read.
        """
        assert info.file is not None  # a header that was read
        if not tensor.numel():
            return tensor
        bytes_of: Any = tensor.reshape(-1).view(torch.uint8).numpy()
        view, filled = memoryview(bytes_of), 0
        try:
            if info.file not in self._open:
                self._open[info.file] = os.open(info.file, os.O_RDONLY | getattr(os, "O_BINARY", 0))
            while filled < len(view):
                count = os.preadv(self._open[info.file], [view[filled:]], info.begin + start + filled)
                if not count:
                    raise OSError(f"it ends inside {info.name}")
                filled += count
        except OSError as error:
            raise CheckpointError(
                f"{info.file} cannot be read", expected=f"{info.name} up to byte {info.end}", found=str(error),
                hint="run again when nothing changes the file",
            ) from error  # fmt: skip
        return tensor


def _close(opened: dict[Path, int]) -> None:
    for descriptor in opened.values():
        os.close(descriptor)


class FileHome:
    """The tensors that a plan makes of safetensors files."""

    def __init__(self, plan: TensorPlan, precision: Precision, share: Share = whole) -> None:
        """`share`: makes of a step what this process holds of its outputs."""
        self.plan, self._precision, self._share = plan, precision, share
        self._steps = {output.name: step for step, output in plan.outputs()}
        self._reader = Reader()

    @property
    def names(self) -> Sequence[str]:
        return tuple(self._steps)

    def fetch(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Raises CheckpointError where a file cannot be read any more."""
        wanted, found = set(names), dict[str, Tensor]()
        for name in names:
            if name in found:
                continue
            step = self._steps[name]
            if self._share is whole and (tensor := self._joined(step)) is not None:
                found[name] = tensor
                continue
            for output, value in zip(step.outputs, self._share(self.plan, step, self._read), strict=True):
                if output.name in wanted:
                    found[output.name] = value.to(self._wanted(output.name, value.dtype))
        return found

    def dtype(self, name: str) -> torch.dtype:
        step = self._steps[name]
        kinds = {_dtype(self.plan.sources[source]) for source in step.sources}
        return self._wanted(name, kinds.pop() if len(kinds) == 1 else torch.float32)

    def _joined(self, step: Step) -> Tensor | None:
        """A tensor that is a stored one, or several one below the other: read to where they belong, without a copy.
        None: the step does more."""
        if step.computed or len(step.outputs) > 1 or not step.outputs[0].shape:
            return None
        (output,) = step.outputs
        rows = stored(self.plan, step, Cut(0, ((0, output.shape[0]),)))
        if rows is None:
            return None
        dtype, first = self.dtype(output.name), self.plan.sources[rows[0][0]]
        made = _room(output.shape, dtype, first if len(rows) == 1 and dtype == _dtype(first) else None)
        place = 0
        for name, begin, end in rows:
            info, part = self.plan.sources[name], made[place : place + end - begin]
            if _dtype(info) == made.dtype:
                self._reader.into(part, info)
            else:
                part.copy_(self._read(name))
            place += end - begin
        return made

    def _wanted(self, name: str, kind: torch.dtype) -> torch.dtype:
        return self._precision(name, kind) if kind.is_floating_point else kind

    def _read(self, name: str, *index: slice) -> Tensor:
        """A stored tensor, or a part of it; of a range of rows no other byte is read."""
        info = self.plan.sources[name]
        shape, start = info.shape, 0
        if index and index[0] != slice(None) and len(index) == 1:
            begin, end, _ = index[0].indices(shape[0])
            start = begin * (info.nbytes // shape[0])
            shape, index = (end - begin, *shape[1:]), ()
        found = self._reader.into(torch.empty(shape, dtype=_dtype(info)), info, start)
        return found[index].contiguous() if index else found


def _dtype(info: TensorInfo) -> torch.dtype:
    found: torch.dtype = getattr(torch, TORCH_NAMES[info.dtype])
    return found


def _room(shape: tuple[int, ...], dtype: torch.dtype, info: TensorInfo | None) -> Tensor:
    """Memory for a tensor; for one that is as it is stored, placed as a mapped file would have it: kernels for CPUs add
    in another order where a tensor begins elsewhere, and libraries compute on mapped files."""
    first = info.begin % _ALIGNED // dtype.itemsize if info is not None else 0
    return torch.empty(first + math.prod(shape), dtype=dtype)[first:].view(shape)
