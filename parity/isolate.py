"""Each leaf and each step between two leaves by itself, all in one run.

The reference's recorded input replaces a leaf's own after it was captured, and the reference's output replaces what it
answers. So what a leaf answers, and what reaches the next one, depends on nothing that went wrong before. An input is
replaced in place where it can be: then what reads the same tensor later (a residual) has the reference's values too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from parity.align import Alignment, Part, Place, channels, scatter
from parity.case import Candidate
from parity.mend import Plan, mended
from parity.recorder import held
from parity.rows import answering
from parity.trace import Trace


class Isolation:
    """What of a pass can be given to the candidate's leaves, and what of it was.

    Attributes:
        given: (reference module, call) whose input and output were the reference's in the last run.
        unfit: reference module -> why nothing could be given to it.
    """

    def __init__(self, trace: Trace, name: str, candidate: Candidate, alignment: Alignment) -> None:
        self.trace, self.name, self.candidate, self.alignment = trace, name, candidate, alignment
        self.given: set[tuple[str, int]] = set()
        self.unfit: dict[str, str] = {}
        self.holders: dict[str, list[tuple[str, Part]]] = {}  # candidate leaf -> reference leaves whose rows it has
        for path in trace.modules(name):
            taken = trace.keys(name, path, 0, "in")  # none where it takes whole numbers only, as embeddings do
            whole = (self._whole(path, 0, "in", 0) or not taken) and self._whole(path, 0, "out")
            if path and path in alignment.parts and whole and not any(b.matches(path) for b in candidate.blocks):
                for part in alignment.parts[path]:
                    self.holders.setdefault(part.candidate, []).append((path, part))

    def _whole(self, path: str, call: int, kind: str, count: int = 1) -> bool:
        """Whether all of a place was recorded: `count` tensors, or any number (0)."""
        keys = self.trace.keys(self.name, path, call, kind)
        return len(keys) == (count or max(len(keys), 1)) and all(self.trace.value(key).complete for key in keys)

    def _value(self, path: str, call: int, kind: str, at: int, count: int) -> tuple[Place, Tensor] | None:
        if not self._whole(path, call, kind, count):
            return None
        key = self.trace.keys(self.name, path, call, kind)[at]
        double = torch.get_default_dtype() == torch.float64
        return Place.of(self.trace, key), self.trace.value(key).tensor(double)

    def replaced(self, leaf: str, call: int, kind: str, own: Tensor, at: int = 0, count: int = 1) -> Tensor | None:
        """The reference's `in` (number `at` of `count`) or `out` in the layout of a candidate's leaf.

        None where it cannot be given.
        """
        result = None
        for path, part in self.holders[leaf] if kind == "out" else self.holders[leaf][:1]:
            found = self._value(path, call, kind, at, count)
            if found is None:
                return None
            place, value = found
            calls = [call]
            if place.share and own.ndim and call == 0 and own.shape[0] == place.share[2]:  # all samples in one call
                calls = list(range(self.trace.modules(self.name)[path]))
                each = [self._value(path, i, kind, at, count) for i in calls]
                value = torch.cat([v for _, v in filter(None, each)])
                if value.shape[0] != place.share[2]:
                    return None
            parts = self.alignment.parts[path]
            # Only this leaf's rows are asked for: the others of a split are given to theirs.
            others = [p for p in parts if p.candidate == leaf] if kind == "out" else [part]
            if kind == "out" and len(others) < len(parts):
                if any(p.source is None for p in others):
                    others = [p for p in others if p.source is None]
                else:
                    value = _rows(value, others, max(part.source[1] for part in parts if part.source))
                    others = _renumbered(others)
            only = Alignment({path: tuple(others)})
            made = scatter(only, self.candidate, place, value, {leaf: own if result is None else result})
            if isinstance(made, str):
                self.unfit[path] = made
                return None
            result = made[leaf]
            self.given |= {(path, i) for i in calls}
        return result

    def planned(
        self, plan: Plan, answers: Mapping[str, Tensor] | None = None
    ) -> Callable[[nn.Module], AbstractContextManager[None]]:
        """`of`, with further modules that take and answer what `plan` says, and leaves that answer `answers`."""

        @contextmanager
        def both(module: nn.Module) -> Iterator[None]:
            with self.of(module), mended(module, self.trace, plan), answering(module, answers or {}):
                yield

        return both

    @contextmanager
    def of(self, module: nn.Module) -> Iterator[None]:
        """Give and take in every run of `module` inside the block; its hooks must come after those that listen."""
        self.given.clear()
        calls: dict[str, int] = {}
        fixed = {tensor.untyped_storage().data_ptr() for _, tensor in held(module)}

        def enter(leaf: str) -> Any:
            def hook(m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                calls[leaf] = calls.get(leaf, -1) + 1
                given: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
                alike = {id(a): key for key, a in reversed(given.items()) if isinstance(a, Tensor)}
                own = {key: given[key] for key in reversed(alike.values())}
                if not all(a.is_floating_point() for a in own.values()):
                    return None
                count = len(own)
                values = [self.replaced(leaf, calls[leaf], "in", a, i, count) for i, a in enumerate(own.values())]
                whole = [value for value in values if value is not None]
                if len(whole) < count:
                    return None
                for key, value in zip(own, whole, strict=True):
                    if own[key].is_contiguous() and own[key].untyped_storage().data_ptr() not in fixed:
                        own[key].copy_(value)
                    else:
                        given |= {k: value for k, a in given.items() if a is own[key]}
                return tuple(given[i] for i in range(len(args))), {k: given[k] for k in kwargs}

            return hook

        def leave(leaf: str) -> Any:
            def hook(m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
                return self.replaced(leaf, calls[leaf], "out", out) if isinstance(out, Tensor) else None

            return hook

        with ExitStack() as hooks:
            for path, child in module.named_modules():
                if path in self.holders:
                    hooks.enter_context(child.register_forward_pre_hook(enter(path), with_kwargs=True))
                    hooks.enter_context(child.register_forward_hook(leave(path), with_kwargs=True))
            yield


def _rows(value: Tensor, parts: list[Part], count: int) -> Tensor:
    """The rows of a reference leaf's output, of `count`, that these parts hold."""
    axis = channels(value, count)
    pieces = [value.narrow(axis, *_span(part)) for part in parts]
    return torch.cat(pieces, axis)


def _span(part: Part) -> tuple[int, int]:
    assert part.source is not None
    return part.source[0], part.source[1] - part.source[0]


def _renumbered(parts: list[Part]) -> list[Part]:
    """The same parts, with their rows counted in what `_rows` made."""
    made, at = [], 0
    for part in parts:
        count = _span(part)[1]
        made.append(Part(part.candidate, (at, at + count), part.target))
        at += count
    return made
