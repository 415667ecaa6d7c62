"""A candidate's run in which chosen modules take, or answer, what the reference recorded."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from parity.align import Alignment, common_path
from parity.capture import Capture
from parity.layouts import rearrangements
from parity.recorder import bind, held, tensors_of
from parity.shelf import with_tensors
from parity.trace import Trace, Value, split_key

Way = Callable[[Tensor], Tensor]
Plan = Mapping[str, "tuple[str, Way]"]  # what the candidate captured -> what the reference recorded, and its layout


@dataclass(frozen=True)
class Moment:
    """Something captured of a candidate.

    Attributes:
        frame: the module whose code made it: of what comes out the module itself, of what goes in the one that calls.
        inside: calls that were not over.
    """

    key: str
    path: str
    call: int
    kind: str
    frame: str
    inside: tuple[str, ...]

    @property
    def where(self) -> str:
        return f"{self.path}#{self.call}"

    @property
    def sort(self) -> str:
        """The same for all blocks of a list, and for all calls."""
        return re.sub(r"\d+", "*", self.path) + self.key[len(self.where) :]


def moments(captured: Capture) -> Iterator[Moment]:
    """What was captured, in order, with the calls that were open."""
    calls: list[str] = []
    left = ""
    for key in captured.tensors:
        if key.startswith("=.out."):
            continue  # of the pass
        where, kind, _ = split_key(key)
        path, _, call = where.rpartition("#")
        if left not in ("", where) and left in calls:
            del calls[calls.index(left) :]
        if kind == "in" and where not in calls:
            calls.append(where)
        left = where if kind == "out" else ""
        above = [c for c in calls if c != where]
        frame = path if kind == "out" else above[-1].rpartition("#")[0] if above else ""
        yield Moment(key, path, int(call), kind, frame, tuple(calls))


def containers(trace: Trace, alignment: Alignment) -> dict[str, list[str]]:
    """Modules of the candidate around others -> those of the reference around the same weights."""
    found: dict[str, list[str]] = {}
    for path in trace.meta.get("around", ()):
        leaves = {leaf for leaf in alignment.leaves(path) if leaf != path}
        own = sorted({part.candidate for leaf in leaves for part in alignment.parts[leaf]})
        if not own:
            continue
        depth = min(leaf.count(".") for leaf in leaves) - path.count(".")
        ours = common_path(own) if len(own) > 1 else own[0].rsplit(".", depth)[0]
        # A module whose parts all lie in one of them (a block of nothing but its attention) may be meant as well.
        while ours and {leaf for leaf in alignment.behind(ours) if leaf != path} == leaves:
            found.setdefault(ours, []).append(path)
            ours = ours.rpartition(".")[0]
    return found


def way_to(value: Value, shape: tuple[int, ...], fits: Callable[[Tensor], bool] = lambda tensor: True) -> Way | None:
    """How a recorded tensor is brought into a shape, so that it `fits`; None where no reordering of axes does it."""
    if not value.complete:
        return None
    theirs, there = tuple(value.event.shape), tuple(shape)
    ways: list[Way] = [lambda t: t] if theirs == there else []
    if theirs != there or not fits(value.tensor(True)):
        ways += rearrangements(theirs, there)
    return next((way for way in ways if fits(way(value.tensor(True)))), None)


@contextmanager
def mended(module: nn.Module, trace: Trace, plan: Plan) -> Iterator[None]:
    """Every run of `module` inside the block takes and answers as the plan says; call it after what listens.

    Values are put in place where they can be: what reads the same tensor later then has the reference's too.
    """
    calls: dict[str, int] = {}
    fixed = {tensor.untyped_storage().data_ptr() for _, tensor in held(module)}

    def replaced(where: str, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those that were not put in place."""
        double = torch.get_default_dtype() == torch.float64
        given = {}
        for name, own in named.items():
            if (known := plan.get(f"{where}.{name}")) is None:
                continue
            value = known[1](trace.value(known[0]).tensor(double)).to(own, copy=True)
            shared = any(step == 0 and size > 1 for step, size in zip(own.stride(), own.shape, strict=True))
            if shared or own.untyped_storage().data_ptr() in fixed:
                given[name] = value
            else:
                own.copy_(value)
        return given

    def enter(path: str) -> Any:
        def hook(m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            calls[path] = calls.get(path, -1) + 1
            named = dict(tensors_of(bind(m, args, kwargs)))
            new = {id(named[name]): t for name, t in replaced(f"{path}#{calls[path]}.in", named).items()}
            return tuple(new.get(id(a), a) for a in args), {k: new.get(id(a), a) for k, a in kwargs.items()}

        return hook

    def leave(path: str) -> Any:
        def hook(m: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
            return with_tensors(out, replaced(f"{path}#{calls[path]}.out", dict(tensors_of(out))))

        return hook

    paths = {split_key(key)[0].rpartition("#")[0] for key in plan}
    with ExitStack() as hooks:
        for path, child in module.named_modules():
            if path in paths:
                hooks.enter_context(child.register_forward_pre_hook(enter(path), with_kwargs=True))
                hooks.enter_context(child.register_forward_hook(leave(path)))
        yield
