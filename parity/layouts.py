"""Activations in the other side's layout: merged, split and reordered axes, by shape and, where several fit, by value.

The same rearrangement is then used for every run, so that a fault cannot choose one that hides it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from parity.recorder import sample_indices
from parity.trace import Trace

Layout = Callable[[str, tuple[int, ...], Tensor], Tensor]
Shape = tuple[int, ...]
_MOST_AXES = 6


class Rearranged:
    """A `Candidate.layout` that the case's own one precedes.

    Called with the first, free-running activations of a module it settles how they are rearranged.
    """

    def __init__(self, trace: Trace, own: Layout) -> None:
        self.trace, self.own = trace, own
        self._chosen: dict[tuple[str, Shape, Shape], Callable[[Tensor], Tensor]] = {}
        self._values: dict[tuple[str, Shape], str] = {}
        given = [value for name in trace.passes for value in trace.inputs(name).values()]
        self._masks = [m.bool() for m in given if m.ndim and bool(((m == 0) | (m == 1)).all())]
        for key in trace.events:
            path = key.partition("/")[2].rpartition("#")[0]
            self._values.setdefault((path, trace.events[key].shape), key)

    def __call__(self, path: str, shape: Shape, tensor: Tensor) -> Tensor:
        given = self.own(path, shape, tensor)
        if tuple(given.shape) == shape or given.numel() < math.prod(shape):
            return given
        at = (path, shape, tuple(given.shape))
        if at not in self._chosen:
            self._chosen[at] = self._choose(path, shape, given)
        return self._chosen[at](given)

    def _choose(self, path: str, shape: Shape, tensor: Tensor) -> Callable[[Tensor], Tensor]:
        if tensor.numel() == math.prod(shape):
            ways = list(rearrangements(tuple(tensor.shape), shape))
        else:
            ways = [way for mask in self._masks for way in packings(mask, tuple(tensor.shape), shape)]
            ways += cuts(tuple(tensor.shape), shape)
        if not ways:
            return lambda t: t
        key = self._values.get((path, shape))
        if len(ways) == 1 or key is None:
            return ways[0]
        value = self.trace.value(key)
        index = sample_indices(math.prod(shape), value.event.elements)

        def gap(way: Callable[[Tensor], Tensor]) -> float:
            return float((way(tensor).reshape(-1)[index].double() - value.high).abs().mean())

        return min(ways, key=gap)


def rearrangements(old: Shape, new: Shape) -> Iterator[Callable[[Tensor], Tensor]]:
    """Ways from one shape to another by reordering axes and merging, or splitting, neighbours; each once."""
    seen: set[tuple[Shape, Shape, bool]] = set()
    for axes, split in ((tuple(n for n in new if n != 1), True), (tuple(n for n in old if n != 1), False)):
        if len(axes) > _MOST_AXES:
            continue
        other = tuple(n for n in (old if split else new) if n != 1)
        for order in itertools.permutations(range(len(axes))):
            moved = tuple(axes[i] for i in order)
            if not _merges(moved, other) or (axes, order, split) in seen:
                continue
            seen.add((axes, order, split))
            if split:  # old is `new` reordered, with neighbours merged
                back = tuple(order.index(i) for i in range(len(order)))
                yield partial(_rearranged, first=moved, order=back, last=new)
            else:
                yield partial(_rearranged, first=axes, order=order, last=new)


def packings(mask: Tensor, old: Shape, new: Shape) -> Iterator[Callable[[Tensor], Tensor]]:
    """Ways from padded tokens to those that `mask` (B, L), or (B, 1, 1, L), shows, one after the other as in `new`.

    Args:
        old: B first, L anywhere behind it; the other axes belong to a token.
    """
    sizes = tuple(n for n in mask.shape if n != 1) if mask.ndim != 2 else tuple(mask.shape)
    for axis in range(1, len(old)):
        if (old[0], old[axis]) == sizes:
            rest = (*old[1:axis], *old[axis + 1 :])
            for way in rearrangements((int(mask.sum()), *rest), new):
                yield partial(_packed, mask=mask.reshape(sizes), axis=axis, way=way)


def cuts(old: Shape, new: Shape) -> Iterator[Callable[[Tensor], Tensor]]:
    """Ways from tokens padded to a fixed number to those that `new` has: the first of one axis, or the last."""
    longer = [i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b] if len(old) == len(new) else []
    if len(longer) == 1 and 0 < longer[0] < len(old) - 1 and old[longer[0]] > new[longer[0]]:
        axis, length = longer[0], new[longer[0]]
        for start in (0, old[axis] - length):
            yield partial(torch.narrow, dim=axis, start=start, length=length)


def _packed(tensor: Tensor, mask: Tensor, axis: int, way: Callable[[Tensor], Tensor]) -> Tensor:
    return way(tensor.movedim(axis, 1)[mask])


def _rearranged(tensor: Tensor, first: Shape, order: Shape, last: Shape) -> Tensor:
    return tensor.reshape(first).permute(order).reshape(last)


def _merges(parts: Shape, whole: Shape) -> bool:
    """Whether neighbours of `parts` multiply to the axes of `whole`, in order."""
    at = 0
    for size in whole:
        product = 1
        while product < size and at < len(parts):
            product *= parts[at]
            at += 1
        if product != size:
            return False
    return at == len(parts)
