"""A TensorPlan becomes a file, or tensors in memory.

Copies go straight from file to file in bounded windows, in the order of the source's bytes, hashed on the way; torch is
imported only when an op computes. The file appears under its name complete, or not at all.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from porter.core.atomic import PartialFile
from porter.core.checkpoint import ANY, BITS, TensorInfo, header_bytes
from porter.core.errors import BadInputError, CheckFailed, RecipeError, UsageError
from porter.core.hashing import SourceHashes
from porter.core.lanes import DEFAULT_WORKERS, Buffer, Lanes
from porter.core.ops import TORCH_NAMES, castable
from porter.core.stream import Room, Sources
from porter.core.tensorplan import Output, Step, TensorPlan
from porter.core.writer import LARGE, Progress, Writer

_PARALLEL_HASH = 1 << 20  # with smaller tensors only, threads cost more than they give


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
    names: Collection[str] | None = None,
    workers: int = DEFAULT_WORKERS,
    hashes: SourceHashes | None = None,
) -> Written:
    """Write the plan's targets to `output`, a safetensors file.

    Args:
        metadata: the file's `__metadata__`.
        progress: called with the number of bytes just written, header included.
        overwrite: replace an existing file, at the very end.
        names: only these targets: one shard.
        workers: threads, the copying one included; the bytes do not depend on it.
        hashes: takes the sha256 of the source files from what is read here.

    Raises:
        UsageError: the file exists and `overwrite` is off.
        RecipeError: a source of the plan is not in a file.
        BadInputError: tensors that the recipe takes for equal are not.
        CheckpointError: a source file became shorter since its header was read.
        ResourceError: no room, no permission, or another run writes the same file. Nothing is left behind.
    """
    output = Path(output)
    if not overwrite and os.path.lexists(output):
        raise UsageError(f"the output exists: {output}", hint="choose another output, or add --overwrite")
    pieces = [piece for piece in ordered(plan) if names is None or piece[1].name in names]
    pieces.sort(key=lambda piece: -BITS[piece[1].dtype])  # wider dtypes first, which keeps all aligned
    infos = [_info(item) for _, item in pieces]
    head = header_bytes(infos, metadata or {})
    size = len(head) + sum(info.nbytes for info in infos)
    largest = max((info.nbytes for info in infos), default=0)
    with (
        PartialFile(output, size) as partial,
        Lanes(workers if largest >= _PARALLEL_HASH else 1) as lanes,
        Sources(lanes, hashes, drops_cache=size >= LARGE) as sources,
    ):
        writer = Writer(partial.descriptor, size, sources.pool, lanes, progress)
        writer.write(head, None)
        digests: dict[str, Any] = {}
        for _, group in groupby(pieces, key=lambda piece: id(piece[0])):
            found = list(group)
            step, items = found[0][0], [item for _, item in found]
            _check_agreements(plan, step, sources)
            for item, windows in zip(items, _contents(plan, step, items, sources, writer.room), strict=True):
                digests[item.name] = hashlib.sha256()
                for window, buffer in windows:
                    writer.write(window, digests[item.name], buffer)
                    if buffer is not None:
                        buffer.release()
        for step in plan.steps:
            if not step.outputs and step.computed:  # a constant that is only checked, in every shard
                _compute(plan, step, sources)
        writer.finish()
        lanes.finish()
        if writer.position != size:
            raise CheckFailed(
                f"{output} would not be what its header says", expected=f"{size} bytes",
                found=f"{writer.position} bytes", hint="report the recipe that does this",
            )  # fmt: skip
        partial.publish()
    return Written(output, size, writer.file_hash.hexdigest(), {name: h.hexdigest() for name, h in digests.items()})


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


def ordered(plan: TensorPlan) -> list[tuple[Step, Output]]:
    """Target tensors so that reads go forward through the sources.

    Raises:
        RecipeError: a source of the plan is not in a file.
    """
    files: dict[Path, int] = {}
    for info in plan.sources.values():
        if info.file is not None:
            files.setdefault(info.file, len(files))

    def place(item: tuple[Step, Output]) -> tuple[int, int]:
        step, made = item
        run = next((run for run in made.runs if run.source >= 0), None)
        name = step.sources[run.source if run else 0] if step.sources else None
        if name is None or (run is None and made.dtype != ANY and not step.computed):
            return -1, 0  # a constant, or a tensor without elements
        source = plan.sources[name]
        if source.file is None:
            raise RecipeError(
                f"{plan.recipe}: {source.name} is not in a file", expected="a plan compiled on a file's header",
                hint="compile with read_header(FILE), or rebind the plan before inverting it",
            )  # fmt: skip
        return files[source.file], source.begin + (run.begin if run else 0) * BITS[source.dtype] // 8

    return sorted(plan.outputs(), key=place)


def _info(item: Output) -> TensorInfo:
    return TensorInfo(item.name, item.dtype, item.shape, None, 0, 0)


Windows = Iterator[tuple[Any, Buffer | None]]


def _contents(plan: TensorPlan, step: Step, items: Sequence[Output], sources: Sources, room: Room) -> Iterator[Windows]:
    """For each of a step's target tensors, its bytes."""
    if not step.computed:
        for item in items:
            yield _copied(plan, step, item, sources, room)
        return
    made = _compute(plan, step, sources)
    for item in items:
        yield iter([(made[item.name], None)])


def _copied(plan: TensorPlan, step: Step, item: Output, sources: Sources, room: Room | None = None) -> Windows:
    """One target tensor's bytes, cast where its sources have another dtype; sources of one target may differ.

    Args:
        room: where bytes that stay as they are may be read to, as `Sources.windows` takes it.
    """
    tensors = [plan.sources[name] for name in step.sources]
    for dtype, runs in groupby(item.runs, key=lambda run: tensors[run.source].dtype):
        convert = _converter(dtype, item.dtype) if dtype != item.dtype else None
        for window, buffer in sources.windows(tensors, list(runs), None if convert else room):
            if convert is None:
                yield window, buffer
            else:
                converted = convert(window)
                buffer.release()
                yield converted, None


def _compute(plan: TensorPlan, step: Step, sources: Sources) -> dict[str, memoryview]:
    """The targets of a step whose ops make new numbers; its sources are read whole.

    Raises:
        BadInputError: the tensors are not what an op takes them for.
    """
    import torch

    values = []
    for name in step.sources:
        info = plan.sources[name]
        dtype = getattr(torch, TORCH_NAMES[info.dtype])
        data = sources.whole(info)  # torch takes no empty one
        flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        values.append(flat.reshape(info.shape))
    try:
        for op in step.ops:
            values = op.compute(values, torch)
    except RecipeError as error:
        raise BadInputError(
            f"{plan.recipe}: {', '.join(step.sources)}: {error.what}", expected=error.expected, found=error.found,
            hint=error.hint,
        ) from error  # fmt: skip
    arrays = [value.contiguous().reshape(-1).view(torch.uint8).numpy() for value in values]
    pairs = zip(step.outputs, arrays, strict=True)
    return {item.name: memoryview(array) for item, array in pairs}  # type: ignore[arg-type]


def _check_agreements(plan: TensorPlan, step: Step, sources: Sources) -> None:
    """Tensors that become one must be equal; what an op computed on the way it has compared itself."""
    for pair in step.agreements if not step.computed else ():
        found = []
        for value in pair:
            digest = hashlib.sha256()
            for window, buffer in _copied(plan, step, value, sources):
                digest.update(window)
                if buffer is not None:
                    buffer.release()
            found.append(digest.digest())
        if found[0] != found[1]:
            names = [step.sources[value.runs[0].source] for value in pair if value.runs]
            raise BadInputError(
                f"{plan.recipe}: {' and '.join(names)} differ, and only one of them is kept",
                expected=pair[0].name, found="other values", hint="the other layout has one tensor for both",
            )  # fmt: skip


def _converter(old: str, new: str) -> Callable[[memoryview], memoryview]:
    """A function from bytes of dtype `old` to bytes of dtype `new`, rounding as torch does."""
    if not (castable(old) and castable(new)):
        raise RecipeError(f"cannot cast {old} to {new}", expected="floating-point dtypes", found=f"{old} and {new}")
    import torch

    source, target = getattr(torch, TORCH_NAMES[old]), getattr(torch, TORCH_NAMES[new])

    def convert(window: memoryview) -> memoryview:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # more of them would spin on the cores that hash
        try:
            tensor = torch.frombuffer(window, dtype=source).to(target)
        finally:
            torch.set_num_threads(threads)
        return memoryview(tensor.view(torch.uint8).numpy())  # type: ignore[arg-type]

    return convert
