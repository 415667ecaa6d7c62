"""One pass of a model larger than memory, compared block after block.

Both sides run once in float32: each block of the candidate as the model ran, and again on the reference's recorded
inputs. Then a few blocks stand alone, in float32 and float64: the first, the middle and the last, and of each kind the
one that differs most. All blocks, on both sides, hand on what the reference answered. So whatever is computed outside
of blocks stands alone too, and is compared: before the first, between two, behind the last.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from parity.arbiter import cast_disagreement
from parity.blockwise import Maps, Recorded, Side, Slips, arguments, of_call, with_arguments
from parity.case import Named
from parity.hollow import Around
from parity.judging import Docket
from parity.recorder import tensors_of
from parity.shelf import with_tensors


@dataclass
class Pass:
    """What runs when, for one pass of a case.

    Attributes:
        blocks: candidate block -> reference block.
        recorded: the reference's float32 run, in order of execution.
        docket: the verdicts.
        calls: the reference's calls of blocks, in order; `alone` are those that ran in float64 too.
        seconds: by step.
    """

    reference: Side
    candidate: Side
    maps: Maps
    blocks: Mapping[str, str]
    inputs: Named
    gate: float
    say: Callable[[str], None]
    recorded: Slips = field(default_factory=dict)
    alone: list[str] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    _used: dict[str, set[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.docket = Docket(self.candidate.shelf, self.maps, self.gate, self.recorded, self._kind)

    def record(self) -> None:
        """The reference, as it runs."""
        self._run("reference, float32", self.reference, self._record, self.recorded)

    def compare(self) -> None:
        """The candidate; `record` came before."""
        own: Slips = {}
        self._run("candidate, float32", self.candidate, self._compare, own)
        answer = {key: self.candidate.shelf.get(slip) for key, slip in own.items() if key.startswith("=")}
        self.docket.look(self.docket.free, "=", "out", answer)
        self.alone = self._chosen()
        high, low, exact = Slips(), Slips(), Slips()
        steps = (
            ("chosen blocks of the reference, float64", self.reference, high, True),
            ("chosen blocks of the candidate, float32", self.candidate, low, False),
            ("chosen blocks of the candidate, float64", self.candidate, exact, True),
        )
        for step, side, kept, double in steps:
            self._run(step, side, self._standing(side, kept, double), kept, double=double)
        pairs = {theirs: ours for ours, theirs in self.blocks.items()}
        pairs |= {path: self.maps.holders(path)[-1] for path in self.reference.outside}
        casts = cast_disagreement(self.reference.casts, self.candidate.casts, {**pairs, "": ""})
        self.docket.arbitrate(high, (low, exact), self.reference.outside, casts)
        self.docket.settle(self.alone)

    def _run(self, step: str, side: Side, around: Around, kept: Slips, *, double: bool = False) -> None:
        began = time.monotonic()
        side.run(self.inputs, around, kept, double=double)
        self.seconds[step] = round(time.monotonic() - began, 1)
        self.say(f"{step}: {self.seconds[step]:.0f} s")

    def _record(self, path: str, call: int, run: Any, args: Any, kwargs: Any) -> Any:
        where, side = f"{path}#{call}", self.reference
        self.calls.append(where)
        self.recorded.update(side.keep(where, "in", arguments(side.module.get_submodule(path), args, kwargs)))
        out = run(*args, **kwargs)
        self.recorded.update(side.keep(where, "out", out))
        side.remember(where, out)
        self.say(f"{len(self.calls)} of {len(self.blocks)} blocks: {where}")
        return out

    def _compare(self, path: str, call: int, run: Any, args: Any, kwargs: Any) -> Any:
        """A block as the model runs, and on the reference's inputs; later it hands on the reference's answer."""
        where, at, side = f"{path}#{call}", f"{self.blocks[path]}#{call}", self.candidate
        if at not in self.calls:
            raise RuntimeError(f"it runs {where}, where the reference does not run {at}")
        module = side.module.get_submodule(path)
        own = arguments(module, args, kwargs)
        with side.aside():
            recorded = Recorded(side.shelf, of_call(self.recorded, at, "in"))
            given = self.maps.forced(self.blocks[path], recorded, own)
            same = not isinstance(given, str) and _equal(given, own)
            self.docket.look(self.docket.free, at, "in", {f"{where}.in.{name}": t for name, t in own.items()})
        out = answer = run(*args, **kwargs)
        if isinstance(given, str):
            self.docket.unforced[at] = given
        else:
            self._used[at] = recorded.used
            if not same:  # where it is, the block would answer the same again
                args, kwargs = with_arguments(module, args, kwargs, given)
                answer = run(*args, **kwargs)
        with side.aside():
            inputs = {f"{where}.in.{name}": t for name, t in own.items()}
            self.docket.look(
                self.docket.free, at, "out", inputs | {f"{where}.out.{name}": t for name, t in tensors_of(out)}
            )
            tensors = dict(tensors_of(answer))
            self.docket.look(
                self.docket.reset, at, "out", inputs | {f"{where}.out.{name}": t for name, t in tensors.items()}
            )
            theirs = dict(Recorded(side.shelf, of_call(self.recorded, at, "out")))
            places = {name: self.docket.place(f"{at}.out.{name}") for name in theirs}
            handed = self.maps.given_back(places, theirs, tensors, f"{where}.out.")
            if isinstance(handed, str):
                self.docket.unhanded[at] = handed
            else:
                answer = with_tensors(answer, handed)
        side.remember(where, answer)
        done, apart = len(self._used) + len(self.docket.unforced), self.docket.difference(at)
        self.say(f"{done} of {len(self.blocks)} blocks: {where}: {apart:.1e} (scaled)")
        return out

    def _standing(self, side: Side, kept: Slips, high: bool) -> Around:
        """Chosen blocks run on the reference's inputs; all hand on what the reference answered."""
        ours = side is self.candidate

        def around(path: str, call: int, run: Any, args: Any, kwargs: Any) -> Any:
            where, at = f"{path}#{call}", f"{self.blocks[path] if ours else path}#{call}"
            module = side.module.get_submodule(path)
            own = arguments(module, args, kwargs)
            if at == self.calls[0]:  # nothing of its inputs came through a block
                kept.update(side.keep(where, "in", own))
            if ours and not high:
                with side.aside():
                    self.docket.look(self.docket.reset, at, "in", {f"{where}.in.{name}": t for name, t in own.items()})
            if at not in self.alone:
                return side.again(where, high)
            with side.aside():
                recorded = Recorded(side.shelf, of_call(self.recorded, at, "in"), high)
                given: Any = {name: recorded[name] for name in self._used[at]}
                given = self.maps.forced(self.blocks[path], recorded, own) if ours else given
            args, kwargs = with_arguments(module, args, kwargs, given)
            kept.update(side.keep(where, "out", run(*args, **kwargs)))
            return side.again(where, high)

        return around

    def _chosen(self) -> list[str]:
        """The first, the middle and the last block, and of each kind the one that differs most on the same inputs."""
        able = [at for at in self.calls if at in self._used]
        if not able:
            return []
        chosen = {able[0], able[len(able) // 2], able[-1]}
        for kind in {self._kind(at) for at in able}:
            alike = [at for at in able if self._kind(at) == kind]
            chosen.add(max(alike, key=self.docket.difference))
        return [at for at in able if at in chosen]

    def _kind(self, at: str) -> str:
        return type(self.reference.module.get_submodule(at.partition("#")[0])).__qualname__


def _equal(given: Mapping[str, Any], own: Named) -> bool:
    """Whether a reset would change nothing, to the bit."""
    tensors = dict(tensors_of(dict(given)))
    return all(n in own and t.shape == own[n].shape and torch.equal(t, own[n]) for n, t in tensors.items())
