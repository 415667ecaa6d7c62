"""The verdicts of a pass that was compared block after block: first in float32, then settled by what float64 says."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from parity.align import Place
from parity.blockwise import Maps, Slips, of_call
from parity.compare import BASELINES, DIFFERS, IDENTICAL, ROUNDING, SKIPPED, Verdict, judge, skipped
from parity.recorder import Event
from parity.shelf import Shelf, digest
from parity.trace import Value, split_key

_EPS = 2.0**-23  # float32's


@dataclass
class Docket:
    """Verdicts by event key: `free` as the model ran, `reset` with the reference's inputs (both float32), `exact`.

    Attributes:
        recorded: the reference's float32 run, in order of execution.
        kind: call of a reference block -> its class.
        floors: kind of block -> its largest floor in float64, scaled.
        worst: kind of block -> the call that differs most, where float64 calls that rounding.
        unread: module outside of blocks -> why it is not compared by itself.
        unforced: call -> why nothing of the reference can be given to it.
        unhanded: call -> why the candidate hands on its own answer where it hands on the reference's elsewhere.
    """

    shelf: Shelf
    maps: Maps
    gate: float
    recorded: Slips
    kind: Callable[[str], str]
    free: dict[str, Verdict] = field(default_factory=dict)
    reset: dict[str, Verdict] = field(default_factory=dict)
    exact: dict[str, Verdict] = field(default_factory=dict)
    floors: dict[str, float] = field(default_factory=dict)
    worst: dict[str, str] = field(default_factory=dict)
    unread: dict[str, str] = field(default_factory=dict)
    unforced: dict[str, str] = field(default_factory=dict)
    unhanded: dict[str, str] = field(default_factory=dict)
    _pairs: dict[str, tuple[str, str]] = field(default_factory=dict)  # key -> hashes of both sides' tensors
    _seen: dict[tuple[str, str], Verdict] = field(default_factory=dict)

    def look(self, into: dict[str, Verdict], at: str, kind: str, tensors: Mapping[str, Tensor]) -> None:
        """Judge what a call (`=`: the run) took or answered, in float32 alone; the same pair of tensors once."""
        for name, slip in of_call(self.recorded, at, kind).items():
            key = f"{at}.{kind}.{name}"
            mine = self.maps.read(self.place(key), slip.shape, tensors)
            if isinstance(mine, str):
                into[key] = skipped(key, mine)
                continue
            pair = self._pairs[key] = slip.digest, digest(mine)
            if pair in self._seen:
                into[key] = replace(self._seen[pair], name=key)
                continue
            theirs, flat = self.shelf.get(slip), mine.reshape(-1).float()
            into[key] = judge(key, _value(key, theirs, theirs), flat, flat, gate=self.gate, single=math.nan)
            self._seen[pair] = into[key]

    def difference(self, at: str) -> float:
        """How far a block's answers are from the reference's on the same inputs, scaled."""
        found = [v.scaled for v in _outs(self.reset, at)]
        return max((math.inf if math.isnan(x) else x for x in found), default=0.0)

    def place(self, key: str) -> Place:
        """Where a recorded tensor stands."""
        where, kind, name = split_key(f"pass/{key}")
        where = where.partition("/")[2]
        path, _, call = where.partition("#")
        shapes = {n: slip.shape for n, slip in of_call(self.recorded, where, "in").items()}
        return Place(path, int(call or 0), kind, name, list(of_call(self.recorded, where, kind)).index(name), shapes)

    def arbitrate(
        self, high: Slips, mine: tuple[Slips, Slips], outside: Collection[str], casts: Mapping[str, str]
    ) -> None:
        """Verdicts in float64.

        Args:
            high: the reference's values in float64, of what stood alone.
            mine: what the candidate kept in float32 and in float64.
            outside: modules that need not be readable, as the blocks they feed and the output are compared too.
            casts: reference module -> what the cast traces of both sides disagree on.
        """
        for key in high:
            place = self.place(key)
            holders = tuple(f"{h}{'.' if h == '=' else '#'}" for h in self.maps.holders(place.module))
            near = [{k: self.shelf.get(s) for k, s in slips.items() if k.startswith(holders)} for slips in mine]
            low, exact = (self.maps.read(place, high[key].shape, tensors) for tensors in near)
            if isinstance(low, str) or isinstance(exact, str):
                why = low if isinstance(low, str) else str(exact)
                if place.module in outside:
                    self.unread[place.module] = why
                else:
                    self.exact[key] = skipped(key, why)
                continue
            value = _value(key, self.shelf.get(self.recorded[key]), self.shelf.get(high[key]))
            found = casts.get("" if place.module == "=" else place.module, "")
            a, b = low.reshape(-1).float(), exact.reshape(-1).double()
            self.exact[key] = judge(key, value, a, b, gate=self.gate, casts=found)

    def settle(self, alone: Collection[str]) -> None:
        """Verdicts for all that float32 left open; `alone` are the blocks that ran in float64."""
        for kind in {self.kind(at) for at in alone}:
            alike = {at: _outs(self.exact, at) for at in alone if self.kind(at) == kind}
            self.floors[kind] = max(v.floor / max(1.0, v.peak) for found in alike.values() for v in found)
            worst = max(alike, key=self.difference)
            if all(v.passed for v in alike[worst]):
                self.worst[kind] = worst
        known = {self._pairs[k]: v for k, v in self.exact.items() if k in self._pairs and v.passed}
        beside = {k: v for k, v in self.exact.items() if k.rpartition(".out.")[0] not in alone}
        made_of = [v for v in beside.values() if v.passed]
        made_of += [v for at in self.unhanded for v in _outs(self.reset, at)]
        carried = max([_EPS, *(v.scaled for v in made_of if math.isfinite(v.scaled))])
        why = f"float32 alone: what it is made of differs by {carried:.1e} (scaled)"
        for key, verdict in beside.items() if self.unhanded else ():
            if verdict.status == DIFFERS:
                self.exact[key] = settled(replace(verdict, status=SKIPPED), BASELINES * carried, why)
        for key, verdict in self.reset.items():
            same = known.get(self._pairs.get(key, ("", "")))
            if key in self.exact:
                self.reset[key] = self.exact[key]
            elif ".out." in key:
                self.reset[key] = self._bounded(key, verdict)
            else:
                self.reset[key] = replace(same, name=key) if same else settled(verdict, BASELINES * carried, why)
        for key, verdict in self.free.items():
            judged = self.reset.get(key, self.exact.get(key, skipped(key, "not reached again")))
            self.free[key] = (
                settled(verdict, math.inf, "float32, carried from block to block")
                if judged.passed
                else replace(verdict, status=judged.status, note=judged.note)
            )

    def _bounded(self, key: str, verdict: Verdict) -> Verdict:
        """A block that did not run in float64: no block of its kind differs more than one that did."""
        at = key.rpartition(".out.")[0]
        kind = self.kind(at)
        if at in self.unforced:
            return skipped(key, self.unforced[at])
        if kind in self.worst:
            return settled(
                verdict, math.inf, f"float32 alone: {self.worst[kind]} differs no less, and passes in float64"
            )
        floor = self.floors.get(kind, math.nan)
        why = f"float32 alone: judged by its kind's floor in float64, {floor:.1e} (scaled)"
        return settled(verdict, BASELINES * floor, why)


def settled(verdict: Verdict, most: float, why: str) -> Verdict:
    """A verdict that float32 left open, decided by the scaled difference that is `most` allowed; NaN allows none."""
    if verdict.status != SKIPPED or not math.isfinite(verdict.max_abs):
        return verdict
    passes = ROUNDING if verdict.scaled <= most else DIFFERS
    return replace(verdict, status=IDENTICAL if verdict.max_abs == 0 else passes, note=why)


def _outs(verdicts: Mapping[str, Verdict], at: str) -> list[Verdict]:
    return [v for key, v in verdicts.items() if key.startswith(f"{at}.out.")]


def _value(key: str, low: Tensor, high: Tensor) -> Value:
    event = Event(key, tuple(low.shape), "float32", low.numel())
    return Value(event, low.reshape(-1).float(), high.reshape(-1).double())
