"""Where each element of a tensor comes from: views as runs of source elements, and how index ops rearrange them.

Ops that only move elements compose: after any number of them a view is still one list of runs, read once.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, product
from typing import NamedTuple

Shape = tuple[int, ...]


class Run(NamedTuple):
    """`length` elements of the step's source number `source`: `begin`, `begin + step`, `begin + 2 * step` …

    A negative source is a value that an op computes: -1 the first of the step, -2 the second.
    """

    source: int
    begin: int
    length: int
    step: int = 1

    @property
    def end(self) -> int:
        """One past the last element."""
        return self.begin + (self.length - 1) * self.step + 1

    @property
    def plain(self) -> bool:
        """Whether the elements are neighbours."""
        return self.step == 1 or self.length == 1

    def part(self, start: int, count: int, step: int = 1) -> Run:
        """Elements `start`, `start + step` … of this run, `count` of them."""
        return Run(self.source, self.begin + start * self.step, count, self.step * step)


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


class Piece(NamedTuple):
    """Elements `begin`, `begin + step` … along a view, `length` of them."""

    begin: int
    length: int
    step: int = 1


def take(runs: Sequence[Run], pieces: Iterable[Piece]) -> list[list[Run]]:
    """For each piece, the runs of its elements, counted along `runs`."""
    starts = list(accumulate((run.length for run in runs), initial=0))
    out: list[list[Run]] = []
    for begin, count, step in pieces:
        found: list[Run] = []
        while count:
            index = bisect_right(starts, begin) - 1
            inside = min(count, -((begin - starts[index] - runs[index].length) // step))
            found.append(runs[index].part(begin - starts[index], inside, step))
            begin, count = begin + inside * step, count - inside
        out.append(found)
    return out


def merge(runs: Iterable[Run]) -> tuple[Run, ...]:
    """The same elements with neighbouring runs joined and empty ones gone."""
    out: list[Run] = []
    for run in runs:
        if not run.length:
            continue
        if out and out[-1].source == run.source:
            last = out[-1]
            # A single element has no step of its own: it takes the one that its neighbour or the distance gives.
            step = last.step if last.length > 1 else run.step if run.length > 1 else run.begin - last.begin
            if run.begin == last.end - 1 + step and step > 0 and (run.length == 1 or run.step == step):
                out[-1] = Run(last.source, last.begin, last.length + run.length, step)
                continue
        out.append(run if run.length > 1 else run._replace(step=1))
    return tuple(out)


def cut(view: View, sizes: Sequence[int], dim: int) -> list[View]:
    """The parts of `view` along `dim`, one per size; the sizes fill the dim."""
    outer, inner = math.prod(view.shape[:dim]), math.prod(view.shape[dim + 1 :])
    row, parts, start = view.shape[dim] * inner, [], 0
    for size in sizes:
        pieces = [Piece(n * row + start * inner, size * inner) for n in range(outer)]
        shape = (*view.shape[:dim], size, *view.shape[dim + 1 :])
        parts.append(View(view.dtype, shape, merge(run for found in take(view.runs, pieces) for run in found)))
        start += size
    return parts


def join(views: Sequence[View], dim: int) -> View:
    """The views one after the other along `dim`; they agree in all other dims."""
    first = views[0]
    outer = math.prod(first.shape[:dim])
    taken = []
    for view in views:
        row = math.prod(view.shape[dim:])
        taken.append(take(view.runs, [Piece(n * row, row) for n in range(outer)]))
    runs = [run for n in range(outer) for rows in taken for run in rows[n]]
    size = sum(view.shape[dim] for view in views)
    return View(first.dtype, (*first.shape[:dim], size, *first.shape[dim + 1 :]), merge(runs))


def permute(view: View, order: Sequence[int]) -> View:
    """The view with its dims in another order: dim k of the result is dim `order[k]`."""
    strides = [math.prod(view.shape[dim + 1 :]) for dim in range(len(view.shape))]
    shape = tuple(view.shape[dim] for dim in order)
    kept = len(order)  # trailing dims that stay where they are move as one block
    while kept and order[kept - 1] == kept - 1:
        kept -= 1
    block = math.prod(shape[kept:])
    if kept and block == 1:  # the last dim that moves is read with its stride
        *outer, last = order[:kept]
        step, count = strides[last], view.shape[last]
    else:
        outer, step, count = list(order[:kept]), 1, block
    corners = (
        sum(index * strides[dim] for index, dim in zip(indices, outer, strict=True))
        for indices in product(*(range(view.shape[dim]) for dim in outer))
    )
    taken = take(view.runs, (Piece(corner, count, max(step, 1)) for corner in corners if count))
    return View(view.dtype, shape, merge(run for found in taken for run in found))
