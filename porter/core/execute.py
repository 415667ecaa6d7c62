"""A TensorPlan becomes a file, or tensors in memory.

Copies go straight from file to file in bounded windows, in the order of the source's bytes, hashed on the way; torch is
imported only when a cast computes. The file appears under its name complete, or not at all.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from porter.core.atomic import PartialFile
from porter.core.checkpoint import ANY, BITS, TensorInfo, header_bytes
from porter.core.errors import CheckFailed, CheckpointError, RecipeError, UsageError
from porter.core.ops import TORCH_NAMES, castable
from porter.core.tensorplan import WINDOW, Output, Step, TensorPlan
from porter.core.views import Run
from porter.core.writeback import Writeback

Progress = Callable[[int], None]
_PARALLEL_HASH = 1 << 20  # below this many bytes a second thread costs more than it gives


@dataclass(frozen=True)
class Written:
    """What `execute` wrote: the file's size and sha256, and each tensor's sha256 by name."""

    path: Path
    bytes: int
    sha256: str
    tensors: Mapping[str, str]


def execute(
    plan: TensorPlan,
    output: str | os.PathLike[str],
    *,
    metadata: Mapping[str, str] | None = None,
    progress: Progress | None = None,
    overwrite: bool = False,
) -> Written:
    """Write the plan's targets to `output`, a safetensors file.

    Args:
        metadata: the file's `__metadata__`.
        progress: called with the number of bytes just written, header included.
        overwrite: replace an existing file, at the very end.

    Raises:
        UsageError: the file exists and `overwrite` is off.
        RecipeError: a source of the plan is not in a file.
        CheckpointError: a source file became shorter since its header was read.
        ResourceError: no room, no permission, or another run writes the same file. Nothing is left behind.
    """
    output = Path(output)
    if not overwrite and os.path.lexists(output):
        raise UsageError(f"the output exists: {output}", hint="choose another output, or add --overwrite")
    pieces = _ordered(plan)
    head = header_bytes([_info(item) for _, item in pieces], metadata or {})
    with PartialFile(output, len(head) + plan.bytes_out) as partial, _Sources() as sources:
        writer = _Writer(partial.descriptor, progress, drops_cache=plan.bytes_out >= Writeback.WORTH)
        with writer:
            writer.write(memoryview(head), None)
            hashes = {}
            for step, item in pieces:
                hashes[item.name] = _write_tensor(plan, step, item, sources, writer)
        if writer.position != len(head) + plan.bytes_out:
            raise CheckFailed(
                f"{output} would not be what its header says", expected=f"{len(head) + plan.bytes_out} bytes",
                found=f"{writer.position} bytes", hint="report the recipe that does this",
            )  # fmt: skip
        partial.publish()
    return Written(output, writer.position, writer.file_hash.hexdigest(), hashes)


def apply(plan: TensorPlan, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Run the plan on torch tensors in memory. Results may be views of `tensors`, which are left as they are.

    Args:
        tensors: name → torch.Tensor, all of the plan's sources, on any device (`meta` too).

    Raises:
        RecipeError: a tensor is missing, left over, or has another shape than the plan's.
    """
    import torch

    if odd := sorted(plan.sources.keys() ^ tensors.keys()):
        raise RecipeError(
            f"{plan.recipe}: other tensors than the plan's: {odd[0]}", expected=f"{len(plan.sources)} tensors",
            found=f"{len(tensors)} tensors, {len(odd)} of them missing or left over",
        )  # fmt: skip
    made: dict[str, Any] = {}
    for step in plan.steps:
        values = [tensors[name] for name in step.sources]
        for name, value in zip(step.sources, values, strict=True):
            if tuple(value.shape) != plan.sources[name].shape:
                raise RecipeError(
                    f"{plan.recipe}: {name} has the wrong shape", expected=str(list(plan.sources[name].shape)),
                    found=str(list(value.shape)),
                )  # fmt: skip
        for op in step.ops:
            values = op.compute(values, torch)
        made.update(zip((item.name for item in step.outputs), values, strict=True))
    return {name: made[name] for name in plan.targets}


def _ordered(plan: TensorPlan) -> list[tuple[Step, Output]]:
    """Target tensors so that reads go forward through the sources; wider dtypes first, which keeps all aligned."""

    def place(item: tuple[Step, Output]) -> tuple[int, str, int]:
        step, made = item
        if not made.runs and made.dtype != ANY:
            return -BITS[made.dtype], "", 0
        run = made.runs[0]
        source = plan.sources[step.sources[run.source]]
        if source.file is None:
            raise RecipeError(
                f"{plan.recipe}: {source.name} is not in a file", expected="a plan compiled on a file's header",
                hint="compile with read_header(FILE), or rebind the plan before inverting it",
            )  # fmt: skip
        return -BITS[made.dtype], str(source.file), source.begin + run.begin * BITS[source.dtype] // 8

    return sorted(plan.outputs(), key=place)


def _info(item: Output) -> TensorInfo:
    return TensorInfo(item.name, item.dtype, item.shape, None, 0, 0)


def _write_tensor(plan: TensorPlan, step: Step, item: Output, sources: _Sources, writer: _Writer) -> str:
    """Stream one target tensor; -> its sha256."""
    digest = hashlib.sha256()
    for run in item.runs:
        source = plan.sources[step.sources[run.source]]  # sources of one target may differ in dtype
        convert = _converter(source.dtype, item.dtype) if source.dtype != item.dtype else None
        for window in sources.windows(source, run):
            writer.write(convert(window) if convert else window, digest)
        writer.follow(sources)
    return digest.hexdigest()


def _converter(old: str, new: str) -> Callable[[memoryview], memoryview]:
    """A function from bytes of dtype `old` to bytes of dtype `new`, rounding as torch does."""
    if not (castable(old) and castable(new)):
        raise RecipeError(f"cannot cast {old} to {new}", expected="floating-point dtypes", found=f"{old} and {new}")
    import torch

    source, target = getattr(torch, TORCH_NAMES[old]), getattr(torch, TORCH_NAMES[new])

    def convert(window: memoryview) -> memoryview:
        tensor = torch.frombuffer(window, dtype=source).to(target)
        return memoryview(tensor.view(torch.uint8).numpy())  # type: ignore[arg-type]

    return convert


class _Sources:
    """The source files, opened once each, read by position into one buffer."""

    def __init__(self) -> None:
        self.open: dict[Path, int] = {}
        self.read_to: dict[int, int] = {}  # descriptor → how far it has been read
        self.buffer = bytearray()

    def __enter__(self) -> _Sources:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self.open.values():
            os.close(descriptor)

    def windows(self, tensor: TensorInfo, run: Run) -> Iterator[memoryview]:
        """The bytes of a run of a tensor; each window is valid until the next."""
        bits = BITS[tensor.dtype]
        if run.begin * bits % 8 or run.end * bits % 8:
            raise RecipeError(f"{tensor.name} is cut inside a byte", expected="whole bytes", found=f"{bits} bits each")
        descriptor = self._descriptor(tensor)
        position, end = tensor.begin + run.begin * bits // 8, tensor.begin + run.end * bits // 8
        if len(self.buffer) < min(WINDOW, end - position):
            self.buffer = bytearray(min(WINDOW, end - position))
        while position < end:
            window = memoryview(self.buffer)[: min(WINDOW, end - position)]
            self._read(descriptor, window, position, tensor)
            position += len(window)
            self.read_to[descriptor] = position
            yield window

    def _descriptor(self, tensor: TensorInfo) -> int:
        assert tensor.file is not None
        if tensor.file not in self.open:
            try:
                self.open[tensor.file] = os.open(tensor.file, os.O_RDONLY | getattr(os, "O_BINARY", 0))
            except OSError as error:
                raise CheckpointError(
                    f"cannot read {tensor.file}", expected="the file whose header was read", found=error.strerror,
                    hint="run again when nothing changes the file",
                ) from error  # fmt: skip
        return self.open[tensor.file]

    def _read(self, descriptor: int, window: memoryview, position: int, tensor: TensorInfo) -> None:
        filled = 0
        while filled < len(window):
            try:
                count = os.preadv(descriptor, [window[filled:]], position + filled)
            except OSError as error:
                raise CheckpointError(f"cannot read {tensor.name} in {tensor.file}", found=error.strerror) from error
            if count == 0:
                raise CheckpointError(
                    f"{tensor.file} became shorter while it was read",
                    expected=f"{tensor.name} up to byte {tensor.end}", found=f"the end at byte {position + filled}",
                    hint="run again when nothing changes the file",
                )  # fmt: skip
            filled += count


class _Writer:
    """Writes and hashes one file from start to end."""

    def __init__(self, descriptor: int, progress: Progress | None, *, drops_cache: bool) -> None:
        self.descriptor, self.progress = descriptor, progress
        self.position = 0
        self.file_hash = hashlib.sha256()
        self.writeback = Writeback(descriptor) if drops_cache else None
        self.pool = ThreadPoolExecutor(1) if drops_cache else None

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        if self.pool:
            self.pool.shutdown()

    def write(self, window: memoryview, tensor_hash: Any) -> None:
        # The file's hash runs in a second thread (hashlib lets go of the interpreter), the tensor's in this one.
        parallel = self.pool is not None and len(window) >= _PARALLEL_HASH
        waiting = self.pool.submit(self.file_hash.update, window) if self.pool and parallel else None
        if waiting is None:
            self.file_hash.update(window)
        written = 0
        try:
            while written < len(window):
                written += os.pwrite(self.descriptor, window[written:], self.position + written)
            if tensor_hash is not None:
                tensor_hash.update(window)
        finally:
            if waiting is not None:
                waiting.result()
        self.position += len(window)
        if self.progress:
            self.progress(len(window))

    def follow(self, sources: _Sources) -> None:
        """Let the system write out, and forget, what lies behind."""
        if self.writeback:
            self.writeback.follow(self.position, sources.read_to)
