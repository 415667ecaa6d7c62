"""Weights that a conversion puts into the wrong rows: tried by exchanging what leaves answer, in whole or in part.

Nothing goes wrong by itself in a module of wrong rows: it computes with what it has. So where the code behind such
modules does not match, it is run on exchanged answers; if that mends it, the rows are the cause.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from parity.align import channels
from parity.capture import Capture

_MOST_LEAVES = 6  # before the step, the last ones
_MOST_HEADS = 64


@dataclass(frozen=True)
class Guess:
    """Leaves of the candidate, what they would have to answer, and what the conversion would have to do."""

    leaves: tuple[str, ...]
    answers: Mapping[str, Tensor]
    words: str


def guesses(captured: Capture, wheres: Sequence[str]) -> Iterator[Guess]:
    """What to try, the likelier first.

    Args:
        captured: a run in which what the leaves answer is right for their weights.
        wheres: calls of leaves (`path#call`) before the step, in order.
    """
    outs = {
        where: out for where in wheres[-_MOST_LEAVES:] if (out := captured.tensors.get(f"{where}.out.0")) is not None
    }
    name = {where: where.rpartition("#")[0] for where in outs}
    for a, b in itertools.combinations(outs, 2):
        if outs[a].shape == outs[b].shape and name[a] != name[b]:
            answers = {f"{a}.out.0": outs[b], f"{b}.out.0": outs[a]}
            yield Guess((name[a], name[b]), answers, f"exchanges {name[a]} and {name[b]}")
    for where, out in reversed(outs.items()):
        for words, turned in _turned(out):
            yield Guess(
                (name[where],), {f"{where}.out.0": turned}, f"puts the rows of {name[where]} in another order: {words}"
            )


def _turned(out: Tensor) -> Iterator[tuple[str, Tensor]]:
    """An answer with its rows in other orders: halves, thirds, sixths with two exchanged; heads first or last."""
    axis = channels(out) % out.ndim
    for count, what in ((2, "halves"), (3, "thirds"), (6, "sixths")):
        if out.shape[axis] % count:
            continue
        pieces = out.chunk(count, axis)
        for a, b in itertools.combinations(range(count), 2):
            order = [b if i == a else a if i == b else i for i in range(count)]
            yield f"{what} {a + 1} and {b + 1} exchanged", torch.cat([pieces[i] for i in order], axis)
    size = out.shape[axis]
    for heads in (n for n in range(1, min(size // 4, _MOST_HEADS) + 1) if size % n == 0):
        width = size // heads
        inner = range(2, width // 2 + 1) if heads == 1 else sorted({2, width // 2})  # within heads: pairs, or halves
        for first in (n for n in inner if width % n == 0):
            split = out.reshape(*out.shape[:axis], heads, first, width // first, *out.shape[axis + 1 :])
            within = f"within each of {heads} groups " if heads > 1 else ""
            yield (
                f"{within}{first} times {width // first} transposed",
                split.transpose(axis + 1, axis + 2).reshape(out.shape),
            )


@contextmanager
def answering(module: nn.Module, answers: Mapping[str, Tensor]) -> Iterator[None]:
    """Leaves answer other tensors (`path#call.out.0` -> tensor) in every run inside the block."""
    calls: dict[str, int] = {}

    def leave(path: str) -> Callable[..., Tensor | None]:
        def hook(m: nn.Module, args: object, out: Tensor) -> Tensor | None:
            calls[path] = calls.get(path, -1) + 1
            given = answers.get(f"{path}#{calls[path]}.out.0")
            return None if given is None else given.to(out, copy=True)  # it may be changed in place

        return hook

    paths: Collection[str] = {key.rpartition("#")[0] for key in answers}
    with ExitStack() as hooks:
        for path, child in module.named_modules():
            if path in paths:
                hooks.enter_context(child.register_forward_hook(leave(path)))
        yield
