"""Which modules answer to each other where several hold the same tensor: those that run, never the first by name."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from parity.align import Alignment, Part

Twins = Mapping[str, set[str]]


def twins(ties: Mapping[str, str]) -> dict[str, set[str]]:
    """Modules that hold the same tensor, from `tied.tied` -> for each of them the others."""
    groups: dict[str, set[str]] = {}
    for name, earlier in ties.items():
        groups.setdefault(earlier, {_path(earlier)}).add(_path(name))
    found: dict[str, set[str]] = {}
    for group in groups.values():
        for path in group:
            found.setdefault(path, set()).update(group - {path})
    return found


def answers(shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """How many numbers each module answers in its first call, from the shapes of `<module>#<call>.<in|out>.<name>`."""
    found: dict[str, int] = {}
    for key, shape in shapes.items():
        path, _, rest = key.partition("#")
        if rest.startswith("0.out."):
            found.setdefault(path, math.prod(shape))
    return found


def settled(
    alignment: Alignment, theirs: Twins, ours: Twins, recorded: Mapping[str, int], called: Mapping[str, int]
) -> Alignment:
    """An alignment in which a module stands for those that hold the same tensor, where it is the one that runs.

    Only where one is left on the candidate's side that answers as much; else all stay as the conversion names them.

    Args:
        theirs, ours: twins of the reference and of the candidate.
        recorded: how many numbers a reference module answers, of those that ran; `called`: the candidate's.
    """
    parts = dict(alignment.parts)
    open_ones: dict[str, tuple[Part, ...]] = {}
    for path in recorded:
        twin = next((twin for twin in sorted(theirs.get(path, ())) if twin in parts), "")
        mine = parts.get(path) or parts.get(twin, ())
        idle = any(part.candidate not in called and part.candidate in ours for part in mine)
        if mine and (idle or path not in parts):
            open_ones[path] = mine
    used = {part.candidate for path in recorded if path not in open_ones for part in parts.get(path, ())}
    left = {path: count for path, count in called.items() if path not in used}
    for path, mine in open_ones.items():
        chosen = [_only({part.candidate, *ours.get(part.candidate, ())}, left, recorded[path]) for part in mine]
        if all(chosen):
            parts[path] = tuple(replace(part, candidate=name) for part, name in zip(mine, chosen, strict=True) if name)
    gone = {path for path in parts if path not in recorded and any(t in recorded for t in theirs.get(path, ()))}
    return Alignment({path: mine for path, mine in parts.items() if path not in gone}, alignment.rules)


def _only(options: Collection[str], left: Mapping[str, int], count: int) -> str | None:
    found = [path for path in options if left.get(path) == count]
    return found[0] if len(found) == 1 else None


def _path(name: str) -> str:
    return name.rpartition(".")[0]
