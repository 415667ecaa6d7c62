"""One file or several: which target tensors go into which shard, and the index over them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from porter.core.checkpoint import nbytes
from porter.core.errors import UsageError
from porter.core.execute import ordered
from porter.core.tensorplan import TensorPlan

_UNITS = {"B": 1, "KB": 1000, "MB": 1000**2, "GB": 1000**3, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


@dataclass(frozen=True)
class Shard:
    """A file that a job writes: its name, its tensors (None: all), and the bytes of those."""

    file: str
    names: tuple[str, ...] | None
    bytes: int


def parse_size(text: str) -> int:
    """`5GB`, `500MB`, `2GiB` → bytes.

    Raises:
        UsageError: it is no such size, or zero.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?I?B)\s*", text, re.IGNORECASE)
    size = int(float(found[1]) * _UNITS[found[2].upper()]) if found else 0
    if size <= 0:
        raise UsageError(f"{text!r} is no size of a shard", expected="a number and MB, GB, MiB or GiB", hint="5GB")
    return size


def shards(plan: TensorPlan, file: str, limit: int | None) -> tuple[Shard, ...]:
    """The files for a plan's targets, cut in the order of the source, none larger than `limit` unless one tensor is."""
    if limit is None:
        return (Shard(file, None, plan.bytes_out),)
    groups: list[list[str]] = [[]]
    sizes = [0]
    for _, item in ordered(plan):
        size = nbytes(item.dtype, plan.targets[item.name].numel)
        if groups[-1] and sizes[-1] + size > limit:
            groups.append([])
            sizes.append(0)
        groups[-1].append(item.name)
        sizes[-1] += size
    if len(groups) == 1:
        return (Shard(file, None, plan.bytes_out),)
    stem = file.removesuffix(".safetensors")
    return tuple(
        Shard(f"{stem}-{number:05d}-of-{len(groups):05d}.safetensors", tuple(names), size)
        for number, (names, size) in enumerate(zip(groups, sizes, strict=True), start=1)
    )


def index_of(parts: Sequence[Shard], file: str) -> dict[str, bytes]:
    """The index over several shards, by its file name; nothing for a single file."""
    if len(parts) == 1:
        return {}
    table = {name: part.file.rpartition("/")[2] for part in parts for name in part.names or ()}
    document = {
        "metadata": {"total_size": sum(part.bytes for part in parts)},
        "weight_map": dict(sorted(table.items())),
    }
    return {f"{file}.index.json": (json.dumps(document, indent=2) + "\n").encode()}
