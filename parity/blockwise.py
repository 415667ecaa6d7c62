"""One side of a comparison block after block: run whole, or with most blocks handing on what they once answered.

Activations go to disk as they come. Keys are a trace's, without the pass: `<module>#<call>.<in|out>.<name>`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from parity.align import Alignment, Place, fit, read
from parity.capture import Capture
from parity.case import Candidate, Named
from parity.hollow import Around, Streamed
from parity.recorder import Dtypes, bind, float64, listen, tensors_of
from parity.shelf import Shelf, Slip, with_tensors

Slips = dict[str, Slip]
_ASIDE = "~"  # no module: where the comparison's own arithmetic stands in a cast trace


@dataclass
class Side:
    """An implementation that is filled block by block.

    Attributes:
        outside: modules with weights that no block holds; what they take and answer is kept in every run.
        ran: modules that ran so far.
    """

    streamed: Streamed
    call: Callable[[Any, Named], Any]
    outside: Sequence[str]
    shelf: Shelf
    seed: int
    ran: set[str] = field(default_factory=set)
    _dtypes: Dtypes = field(default_factory=Dtypes)
    _answers: dict[str, tuple[Any, Slips]] = field(default_factory=dict)

    @property
    def module(self) -> nn.Module:
        return self.streamed.module

    @property
    def casts(self) -> dict[str, list[str]]:
        """Floating-point dtypes computed inside each block, and outside of them, in float32 runs."""
        return {path: sorted(found) for path, found in self._dtypes.seen.items() if path != _ASIDE}

    @torch.no_grad()
    def run(self, inputs: Named, around: Around, kept: Slips, *, double: bool = False) -> None:
        """One run; `kept` gets what modules outside of blocks take and answer, and the output (`=.out.…`), in order.

        Inputs are given as copies, float64 where `double`; every run starts from the same global random numbers.
        """
        torch.manual_seed(self.seed)
        given = {k: v.double() if double and v.is_floating_point() else v.clone() for k, v in inputs.items()}
        blocks = self.streamed.blocks
        watched = {*self.outside, *blocks}

        def sink(key: str, path: str, kind: str, tensor: Tensor) -> None:
            if path not in blocks:
                with self.aside():
                    kept[key] = self.shelf.put(tensor)

        with ExitStack() as stack:
            if double:
                stack.enter_context(float64(self.module))
            stack.enter_context(self.streamed.running(around, double=double))
            noted = None if double else self._dtypes
            ran = stack.enter_context(listen(self.module, lambda path: path in watched, sink, noted))
            if noted:
                stack.enter_context(noted)
            out = self.call(self.module, given)
        self.ran |= ran
        kept.update({f"=.out.{name}": self.shelf.put(tensor) for name, tensor in tensors_of(out)})

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What is computed inside the block is none of the model's."""
        self._dtypes.stack.append(_ASIDE)
        try:
            yield
        finally:
            self._dtypes.stack.pop()

    def keep(self, where: str, kind: str, value: Any) -> Slips:
        """Put the tensors of a call's inputs (by argument) or of its answer on the shelf."""
        with self.aside():
            return {f"{where}.{kind}.{name}": self.shelf.put(tensor) for name, tensor in tensors_of(value)}

    def remember(self, where: str, out: Any) -> None:
        """Keep a call's answer for runs that leave the call out."""
        with self.aside():
            tensors = dict(tensors_of(out, integers=True))
            shape = with_tensors(out, {name: tensor.to("meta") for name, tensor in tensors.items()})
            self._answers[where] = shape, {name: self.shelf.put(tensor) for name, tensor in tensors.items()}

    def again(self, where: str, double: bool) -> Any:
        """A call's remembered answer."""
        with self.aside():
            shape, slips = self._answers[where]
            found = {name: self.shelf.get(slip) for name, slip in slips.items()}
            exact = {name: t.double() if double and t.is_floating_point() else t for name, t in found.items()}
            return with_tensors(shape, exact)


class Recorded(Mapping[str, Tensor]):
    """Recorded tensors by name, read when they are asked for. `used` are those that were."""

    def __init__(self, shelf: Shelf, slips: Mapping[str, Slip], double: bool = False) -> None:
        self._shelf, self._slips, self._double = shelf, slips, double
        self.used: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        self.used.add(name)
        tensor = self._shelf.get(self._slips[name])
        return tensor.double() if self._double else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._slips)

    def __len__(self) -> int:
        return len(self._slips)


def of_call(slips: Mapping[str, Slip], where: str, kind: str) -> Slips:
    """The tensors of one call, or of the whole run (`=`), by their names."""
    prefix = f"{where}.{kind}."
    return {key.removeprefix(prefix): slip for key, slip in slips.items() if key.startswith(prefix)}


@dataclass(frozen=True)
class Maps:
    """How the candidate answers to the reference."""

    candidate: Candidate
    alignment: Alignment

    def forced(self, theirs: str, recorded: Recorded, own: Named) -> Mapping[str, Any] | str:
        """Arguments of the candidate's block to replace by those `recorded` of `theirs`, or why none can be."""
        block = next((b for b in self.candidate.blocks if b.matches(theirs)), None)
        if block:
            given = dict(block.force(recorded, own))
            odd = [name for name in given if name not in own and not any(n.startswith(f"{name}.") for n in own)]
            return f"the argument map gives {odd[0]}, which the candidate's block does not take" if odd else given
        if len(recorded) == len(own) == 1:
            ((name, mine),) = own.items()
            value = fit(next(iter(recorded.values())), tuple(mine.shape))
            return value if isinstance(value, str) else {name: value}
        if own.keys() == recorded.keys():
            return dict(recorded)
        return f"the candidate's block takes {', '.join(own)}, the reference's {', '.join(recorded)}; declare a Block"

    def read(self, place: Place, shape: tuple[int, ...], tensors: Mapping[str, Tensor]) -> Tensor | str:
        """The candidate's counterpart of a recorded tensor among its own `tensors` by key, or why there is none."""
        return read(Capture(dict(tensors)), self.alignment, self.candidate, place, shape)

    def given_back(
        self, places: Mapping[str, Place], answers: Mapping[str, Tensor], own: Mapping[str, Tensor], prefix: str
    ) -> dict[str, Tensor] | str:
        """The reference's `answers` in the tensors that the candidate answers with (`own`), or why they do not fit.

        Numbers that name their place go through the argument map; where they arrive, an answer's elements are taken.
        """
        sizes = [tensor.numel() for tensor in own.values()]
        ids = torch.arange(sum(sizes), dtype=torch.float64)
        pieces = torch.split(ids, sizes)
        named = {prefix + n: i.reshape(t.shape) for (n, t), i in zip(own.items(), pieces, strict=True)}
        buffer = torch.cat([tensor.reshape(-1) for tensor in own.values()])
        taken = torch.zeros(len(buffer), dtype=torch.int64)
        for name, answer in answers.items():
            found = self.read(places[name], tuple(answer.shape), named)
            if isinstance(found, str):
                return found
            at = found.reshape(-1).long()
            inside = torch.equal(at.double(), found.reshape(-1)) and bool(((at >= 0) & (at < len(buffer))).all())
            taken = taken + torch.bincount(at, minlength=len(buffer)) if inside else taken
            if not inside or int(taken.max()) > 1:
                return "the argument map of its outputs is no rearrangement"
            buffer[at] = answer.reshape(-1).to(buffer.dtype)
        return {n: b.reshape(t.shape) for (n, t), b in zip(own.items(), torch.split(buffer, sizes), strict=True)}

    def holders(self, theirs: str) -> list[str]:
        """The candidate's modules that answer to a reference module; the outermost is `=`."""
        if theirs == "=":
            return [theirs]
        parts = self.alignment.parts.get(theirs, ())
        return list(dict.fromkeys([*(part.candidate for part in parts), self.alignment.counterpart(theirs) or ""]))


def with_arguments(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], given: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same call with other tensors, by the names that `recorder.bind` gives to arguments."""
    bound = inspect.signature(module.forward).bind(*args, **kwargs)
    for name, value in bound.arguments.items():
        flattened = bound.signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
        bound.arguments[name] = with_tensors(value, given, "" if flattened else name)
    return bound.args, bound.kwargs


def arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """The floating-point tensors of a call by name."""
    return dict(tensors_of(bind(module, args, kwargs)))
