"""The tensors of one component, wherever they lie: its own files, a file that holds several, a legacy torch file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from porter.core.checkpoint import TensorInfo
from porter.core.companions import AVERAGED
from porter.core.errors import CheckpointError, MissingError, UsageError
from porter.core.headers import read_any
from porter.core.plan import ComponentPlan
from porter.core.source import Source
from porter.core.weights import is_index, read_index, weight_sets


def component_tensors(
    source: Source, part: ComponentPlan, others: Iterable[ComponentPlan] = (), *, averaged: bool = False
) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The component's tensors under its own names, without the file's prefix, and the files' metadata.

    Args:
        others: the other components of the source; what stands under a prefix of theirs is not this one's.
        averaged: take the averaged (EMA) copies that the file holds beside them.

    Raises:
        CheckpointError: a tensor stands in two files, or is not where the header says.
        MissingError: a shard is not here.
        UsageError: averaged copies are asked for, and not every tensor has one.
    """
    check_shards(source, part.files, part.name)
    header, metadata = file_tensors(source, part.files, part.name)
    prefix = part.prefix
    inner = tuple(
        other.prefix for other in others
        if other.files == part.files and len(other.prefix) > len(prefix) and other.prefix.startswith(prefix)
    )  # fmt: skip
    own = {
        name[len(prefix) :]: info
        for name, info in header.items()
        if name.startswith(prefix) and not (inner and name.startswith(inner))
    }
    if not prefix:  # copies that the plan names beside the component
        own = {name: info for name, info in own.items() if not name.startswith(AVERAGED)} or own
    if averaged:
        own = _averaged(part, header, own, [other for other in others if other.files == part.files])
    return own, metadata


def check_shards(source: Source, files: Iterable[str], what: str) -> None:
    """Refuse a component of which a shard is not here: the others may look like a smaller model.

    Raises:
        MissingError: a shard that the files' own names, or an index beside them, promise.
    """
    names = set(files)
    lost = [f"{one.stem}, shard {number}" for one in weight_sets(names) for number in one.missing[:3]]
    for index in source.files if not lost else ():
        if is_index(index):
            told = set(read_index(source, index).values())
            lost += sorted(told - source.files.keys())[:3] if told & names else []
    if lost:
        raise MissingError(
            f"{what}: not all of its weights are here", expected="every shard", found="not here: " + "; ".join(lost),
            hint="download the missing files, and name the folder that holds all of them",
        )  # fmt: skip


def file_tensors(source: Source, files: tuple[str, ...], what: str) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """All tensors of some files, with their places, and the files' metadata."""
    header: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    for name in files:
        read, more = source.header(name)
        if "pickled" in more:
            from porter.core.pickleplaces import locate_pickled

            read, more = locate_pickled(source.path(name)), {}
        if twice := sorted(header.keys() & read.keys()):
            raise CheckpointError(
                f"{what}: {twice[0]} stands in more than one file", expected="each tensor once",
                found=", ".join(files), hint="name one file alone",
            )  # fmt: skip
        header.update(read)
        metadata.update({key: value for key, value in more.items() if isinstance(value, str)})
    return header, metadata


def local_tensors(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a file on this machine, with their places."""
    read, more = read_any(path)
    if "pickled" in more:
        from porter.core.pickleplaces import locate_pickled

        read = locate_pickled(path)
    return dict(read)


def _averaged(
    part: ComponentPlan, header: Mapping[str, TensorInfo], own: Mapping[str, TensorInfo], parts: list[ComponentPlan]
) -> dict[str, TensorInfo]:
    """The averaged copy of every tensor. `parts`: all components of the file, most of which training leaves alone."""
    found: dict[str, TensorInfo] = {}
    for name in own:
        spelt = _copies(part.prefix, name)
        copy = next((header[each] for each in spelt if each in header), None)
        if copy is None or copy.shape != own[name].shape:
            having = [other.name for other in parts if other is not part and _is_averaged(other, header)]
            raise UsageError(
                f"{part.name}: {part.prefix + name} has no averaged copy in {', '.join(part.files)}",
                expected="an averaged (EMA) copy of every tensor", found=f"none called {spelt[0]}",
                hint=f"--ema with --component {having[0]}, which has them" if having else "leave out --ema",
            )  # fmt: skip
        found[name] = copy
    return found


def _copies(prefix: str, name: str) -> tuple[str, ...]:
    """How an averaged copy may be called. Training codes name it `model_ema.` and the name, some without its dots."""
    whole = prefix + name
    inner = whole.removeprefix("model.")
    return (
        f"model_ema.{inner.replace('.', '')}", f"model_ema.{inner}", f"ema.{whole}", f"ema_model.{whole}",
        f"params_ema.{whole}", f"ema.{name}", f"model_ema.{name}",
    )  # fmt: skip


def has_averaged(source: Source, part: ComponentPlan) -> bool:
    """Whether the component's files hold an averaged (EMA) copy of any tensor of it."""
    return _is_averaged(part, file_tensors(source, part.files, part.name)[0])


def _is_averaged(part: ComponentPlan, header: Mapping[str, TensorInfo]) -> bool:
    own = (name[len(part.prefix) :] for name in header if name.startswith(part.prefix))
    return any(each in header for name in own for each in _copies(part.prefix, name))


def with_place(planned: TensorInfo, found: TensorInfo | None) -> TensorInfo:
    """A tensor that was planned from an earlier or a remote header, where it is now.

    Raises:
        CheckpointError: the file now holds something else than that header said.
    """
    if found is None or (found.dtype, found.shape, found.begin) != (planned.dtype, planned.shape, planned.begin):
        raise CheckpointError(
            f"{planned.name} is no longer in its file as the header said that was planned from",
            expected=f"{planned.dtype} {list(planned.shape)} at byte {planned.begin}",
            found=f"{found.dtype} {list(found.shape)} at byte {found.begin}" if found else "no tensor of this name",
            hint="run again when nothing writes to the file",
        )  # fmt: skip
    return found


def left_over(source: Source, parts: Iterable[ComponentPlan], used: set[str]) -> dict[str, list[str]]:
    """What of the parts' files no conversion takes: file → names of tensors."""
    left: dict[str, list[str]] = {}
    for file in dict.fromkeys(file for part in parts for file in part.files):
        header, _ = source.header(file)
        if names := [name for name in header if name not in used]:
            left[file] = names
    return left
