"""Where each element of a tensor comes from: views as runs of source elements, and cutting and joining them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

Shape = tuple[int, ...]


class Run(NamedTuple):
    """Elements [begin, end) of the step's source number `source`."""

    source: int
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class View:
    """A tensor as a sequence of runs of source elements, in row-major order of `shape`."""

    dtype: str
    shape: Shape
    runs: tuple[Run, ...]

    @staticmethod
    def whole(source: int, dtype: str, shape: Shape) -> View:
        """All of a source tensor."""
        return View(dtype, shape, (Run(source, 0, math.prod(shape)),))


def take(runs: Sequence[Run], pieces: Sequence[tuple[int, int]]) -> list[list[Run]]:
    """For each piece, the runs of its elements [begin, end), counted along `runs`; pieces ascend."""
    out: list[list[Run]] = []
    index, start = 0, 0  # `start`: position of runs[index] along the whole
    for begin, end in pieces:
        found: list[Run] = []
        while begin < end:
            run = runs[index]
            length = run.end - run.begin
            if begin >= start + length:
                index, start = index + 1, start + length
                continue
            stop = min(end, start + length)
            found.append(Run(run.source, run.begin + begin - start, run.begin + stop - start))
            begin = stop
        out.append(found)
    return out


def merge(runs: Sequence[Run]) -> tuple[Run, ...]:
    """The same elements with neighbouring runs joined and empty ones gone."""
    out: list[Run] = []
    for run in runs:
        if run.begin == run.end:
            continue
        if out and out[-1].source == run.source and out[-1].end == run.begin:
            out[-1] = Run(run.source, out[-1].begin, run.end)
        else:
            out.append(run)
    return tuple(out)


def cut(view: View, sizes: Sequence[int], dim: int) -> list[View]:
    """The parts of `view` along `dim`, one per size; the sizes fill the dim."""
    outer, inner = math.prod(view.shape[:dim]), math.prod(view.shape[dim + 1 :])
    row, parts, start = view.shape[dim] * inner, [], 0
    for size in sizes:
        pieces = [(n * row + start * inner, n * row + (start + size) * inner) for n in range(outer)]
        shape = (*view.shape[:dim], size, *view.shape[dim + 1 :])
        parts.append(View(view.dtype, shape, merge([run for found in take(view.runs, pieces) for run in found])))
        start += size
    return parts


def join(views: Sequence[View], dim: int) -> View:
    """The views one after the other along `dim`; they agree in all other dims."""
    first = views[0]
    outer = math.prod(first.shape[:dim])
    taken = []
    for view in views:
        row = math.prod(view.shape[dim:])
        taken.append(take(view.runs, [(n * row, (n + 1) * row) for n in range(outer)]))
    runs = [run for n in range(outer) for rows in taken for run in rows[n]]
    size = sum(view.shape[dim] for view in views)
    return View(first.dtype, (*first.shape[:dim], size, *first.shape[dim + 1 :]), merge(runs))
