"""Activations in the other side's layout: merged, split and reordered axes, by shape and, where several fit, by value.

What one side pads before a convolution and the other in it is padded, or cut, in the same way.

The same rearrangement is then used for every run, so that a fault cannot choose one that hides it.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad

from parity.recorder import sample_indices
from parity.trace import Trace

Layout = Callable[[str, tuple[int, ...], Tensor], Tensor]
Shape = tuple[int, ...]
Way = Callable[[Tensor], Tensor]
_MOST_AXES = 6
_CLEAR = 0.5  # of the next best's distance: the best is no chance
_MOST_EVENTS = 8  # of one module that a rearrangement is held against


class Rearranged:
    """A `Candidate.layout` that the case's own one precedes.

    Called with the first, free-running activations of a module it settles how they are rearranged.
    """

    def __init__(self, trace: Trace, own: Layout) -> None:
        self.trace, self.own = trace, own
        self._chosen: dict[tuple[str, Shape, Shape], Callable[[Tensor], Tensor]] = {}
        self._usual: dict[tuple[str, Shape, Shape], int] = {}
        self._values: dict[tuple[str, Shape], list[str]] = {}
        given = [value for name in trace.passes for value in trace.inputs(name).values()]
        self._masks = [m.bool() for m in given if m.ndim and bool(((m == 0) | (m == 1)).all())]
        for key in trace.events:
            path = key.partition("/")[2].rpartition("#")[0]
            self._values.setdefault((path, trace.events[key].shape), []).append(key)

    def __call__(self, path: str, shape: Shape, tensor: Tensor) -> Tensor:
        given = self.own(path, shape, tensor)
        if tuple(given.shape) == shape:
            return (
                self._chosen[path, shape, shape](given)
                if (path, shape, shape) in self._chosen
                else self._alike(path, given)
            )
        if given.numel() < math.prod(shape) and not self._bordered(path, shape, given):
            return given
        at = (path, shape, tuple(given.shape))
        if at not in self._chosen:
            self._chosen[at] = self._choose(path, shape, given)
        return self._chosen[at](given)

    def _alike(self, path: str, tensor: Tensor) -> Tensor:
        """Where there are as many channels as places, shapes do not say which come first: the values do, once."""
        shape = tuple(tensor.shape)
        ways: list[Way] = [lambda t: t]
        if tensor.ndim > 2 and shape[1:] == (shape[1],) * (tensor.ndim - 1) and (path, shape) in self._values:
            ways += [lambda t: t.movedim(1, -1), lambda t: t.movedim(-1, 1)]
        gaps = [self._gap(way, path, shape, tensor) for way in ways] if len(ways) > 1 else [0.0]
        best = min(range(len(ways)), key=lambda i: gaps[i])
        chosen = ways[best] if gaps[best] < 1e-3 * gaps[0] else ways[0]
        self._chosen[path, shape, shape] = chosen
        return chosen(tensor)

    def _gap(self, way: Way, path: str, shape: Shape, tensor: Tensor) -> float:
        """How far a rearranged tensor is from what was recorded: an input, or an output of the same shape."""
        moved, gaps = way(tensor).reshape(-1).double(), []
        for key in self._values[path, shape][:_MOST_EVENTS]:
            value = self.trace.value(key)
            index = sample_indices(math.prod(shape), value.event.elements)
            gaps.append(float((moved[index] - value.high).abs().mean()))
        return min(gaps)

    def _bordered(self, path: str, shape: Shape, tensor: Tensor) -> bool:
        """Whether a recorded input has the same axes with more, or fewer, places along some of the last."""
        keys, old = self._values.get((path, shape), [""]), tuple(tensor.shape)
        if ".in." not in keys[0] or len(old) != len(shape) or len(shape) < 3 or old[:2] != shape[:2]:
            return False
        more = [new - size for new, size in zip(shape, old, strict=True)]
        return all(n >= 0 for n in more) or all(n <= 0 for n in more)

    def _choose(self, path: str, shape: Shape, tensor: Tensor) -> Callable[[Tensor], Tensor]:
        old = tuple(tensor.shape)
        if tensor.numel() == math.prod(shape):
            ways = list(rearrangements(old, shape))
        else:
            ways = [way for mask in self._masks for way in packings(mask, old, shape)]
            ways += cuts(old, shape)
            ways += borders(old, shape) if self._bordered(path, shape, tensor) else ()
        if not ways:
            return lambda t: t
        if len(ways) == 1 or (path, shape) not in self._values:
            return ways[0]
        gaps = [self._gap(way, path, shape, tensor) for way in ways]
        best = min(range(len(ways)), key=gaps.__getitem__)
        others = [gap for gap in gaps if gap > gaps[best]]  # some ways are one and the same
        kind = (re.sub(r"\d+", "*", path), shape, old)  # the same module of all blocks
        if gaps[best] <= _CLEAR * min(others, default=math.inf):
            self._usual.setdefault(kind, best)
        else:  # other numbers, whatever their order: as where they were the same
            best = self._usual.get(kind, best)
        return ways[best]


def rearrangements(old: Shape, new: Shape) -> Iterator[Callable[[Tensor], Tensor]]:
    """Ways from one shape to another by reordering axes and merging, or splitting, neighbours; each once.

    Where neighbours are cut otherwise (B, T * L, C against B * T, L, C), the numbers stay in their order.
    """
    if old[-1:] == new[-1:] and math.prod(old) == math.prod(new) and not (_merges(old, new) or _merges(new, old)):
        yield partial(torch.reshape, shape=new)
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


def borders(old: Shape, new: Shape) -> Iterator[Callable[[Tensor], Tensor]]:
    """Ways to give an activation (B, C, places …) a border, or to cut one off: around, before or behind the places."""
    more = [n - o for o, n in zip(old[2:], new[2:], strict=True)]
    for share in (lambda n: n - n // 2, lambda n: n, lambda n: 0):
        amounts = [amount for n in reversed(more) for amount in (n - share(n), share(n))]
        for mode in ("constant", "replicate", "circular", "reflect") if max(more) > 0 else ("constant",):
            fits = mode not in ("circular", "reflect") or all(
                a < size for a, size in zip(amounts, [s for s in reversed(old[2:]) for _ in (0, 1)], strict=True)
            )
            if fits:
                yield partial(pad, pad=amounts, mode=mode)


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
