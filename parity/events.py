"""What was recorded of a pass, event by event, and what judges a candidate's runs by it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from parity.align import Alignment, Place, read
from parity.capture import Capture, capture
from parity.case import Candidate, Named
from parity.compare import GATE, IDENTICAL, Verdict, judge, judge_lossy, skipped
from parity.reach import reachable, unread
from parity.recorder import Exact, sample_indices, seeded, told
from parity.trace import Trace, split_key


@dataclass(frozen=True)
class Pair:
    """A run in float32 and the same in float64."""

    low: Capture
    high: Capture


@dataclass
class Runner:
    """Runs a candidate, in both precisions, as often as asked.

    Attributes:
        double: whether it runs in float64; the first run finds out.
        dtype: a lossy one to run in instead.
        exact: see `recorder.float64`.
    """

    module: nn.Module
    seed: int
    double: bool
    dtype: str = ""
    device: str = "cpu"
    exact: Exact | None = None
    notes: list[str] = field(default_factory=list)

    def pair(self, call: Callable[[Any, Named], Any], inputs: Named, **kind: Any) -> Pair:
        """One run in float32 and one in float64, with the same global random numbers and inputs of their own.

        float32 goes first, as it did with the reference: tables that a model keeps from its first call are of that run.
        """
        low = self._one(call, inputs, double=False, dtype=self.dtype, **kind)
        if self.dtype or not self.double:
            return Pair(low, low)
        try:
            return Pair(low, self._one(call, inputs, double=True, **kind))
        except Exception as error:
            self.double = False
            self.notes.append(f"the candidate does not run in float64 ({told(error)})")
            return Pair(low, low)

    def once(self, call: Callable[[Any, Named], Any], inputs: Named, **kind: Any) -> Capture:
        """One run, in float64 where the candidate runs in it."""
        return self._one(call, inputs, double=self.double, **kind)

    def reach(self, call: Callable[[Any, Named], Any], inputs: Named, paths: Collection[str]) -> Capture | None:
        """Which elements of modules' inputs and outputs reach an output of the call: `parity.reach`."""
        given = {name: tensor.to(self.device) for name, tensor in inputs.items()}
        return reachable(self.module, call, given, paths, self.seed, double=self.double, exact=self.exact)

    def unread(self, call: Callable[[Any, Named], Any], inputs: Named, paths: Collection[str]) -> set[str]:
        """Modules that use nothing but the shape of what they get: `parity.reach`."""
        given = {name: tensor.to(self.device) for name, tensor in inputs.items()}
        return unread(self.module, call, given, paths, self.seed, double=self.double, exact=self.exact)

    def _one(self, call: Callable[[Any, Named], Any], inputs: Named, **kind: Any) -> Capture:
        seeded(self.seed)
        given = {name: tensor.clone() for name, tensor in inputs.items()}
        return capture(self.module, call, given, device=self.device, exact=self.exact, **kind)


@dataclass(frozen=True)
class Event:
    """One recorded activation: its key, the reference module (`=`: the pass), `in` or `out`, its call."""

    key: str
    path: str
    kind: str
    call: int
    place: Place


@dataclass(frozen=True)
class Judge:
    """Looks at one recorded event in a pair of runs.

    Attributes:
        casts: reference module -> what the cast traces of both sides disagree on.
        single: the baseline where float64 cannot run, see `compare.judge`; `accepted`: the one that a case gives.
        singles: where numbers of float32 came into float64 runs, where that may explain what float64 keeps.
        dtype: of a lossy run, judged by its distance from the float64 truth; empty for float32.
    """

    trace: Trace
    candidate: Candidate
    alignment: Alignment
    gate: float = GATE
    casts: Mapping[str, str] = field(default_factory=dict)
    single: float | None = None
    dtype: str = ""
    accepted: float | None = None
    singles: str = ""

    def __call__(self, event: Event, pair: Pair, reach: Capture | None = None) -> Verdict:
        """The verdict on an event; `not compared` where the candidate has no counterpart of it.

        Where several modules take what one of the reference takes (a split projection, copies), the first that is
        given something else decides.

        Args:
            reach: 1 where the candidate's elements reach an output (see `parity.reach`); others are left out, and an
                event without any that does so is `identical`, with no element compared.
        """
        declared = any(block.matches(event.path) for block in self.candidate.blocks)
        parts = self.alignment.parts.get(event.path, ()) if event.kind == "in" and not declared else ()
        takers = {part.candidate: part for part in parts}  # what a module takes does not depend on which rows it holds
        if len(takers) > 1:
            found = {
                name: self._one(event, pair, reach, Alignment({event.path: (part,)})) for name, part in takers.items()
            }
            bad = [name for name, one in found.items() if one.fails]
            if bad and any(one.passed for one in found.values()):
                one = found[bad[0]]
                return replace(one, module=bad[0], note="; ".join(filter(None, [one.note, f"in what {bad[0]} takes"])))
        return self._one(event, pair, reach, self.alignment)

    def _one(self, event: Event, pair: Pair, reach: Capture | None, alignment: Alignment) -> Verdict:
        value, place = self.trace.value(event.key), event.place
        what = event.key.partition("/")[0] if event.path == "=" else event.key.partition("/")[2]
        shape = value.event.shape
        low, high = (read(run, alignment, self.candidate, place, shape) for run in (pair.low, pair.high))
        if isinstance(low, str) or isinstance(high, str):
            return skipped(what, low if isinstance(low, str) else str(high))
        index = sample_indices(low.numel(), value.event.elements)
        live = read(reach, alignment, self.candidate, place, shape) if reach else ""
        if not isinstance(live, str):
            kept = live.reshape(-1)[index] != 0
            if not bool(kept.any()):
                return Verdict(what, IDENTICAL, max_abs=0.0, max_abs64=0.0, of=low.numel())
            index, value = index[kept], replace(value, low=value.low[kept], high=value.high[kept])
        if self.dtype:
            return judge_lossy(what, value, low.reshape(-1)[index], self.dtype, positions=index)
        a, b = low.reshape(-1)[index].float(), high.reshape(-1)[index].double()
        casts = self.casts.get("" if event.path == "=" else event.path, "")
        if event.kind == "in":  # made by code that stands in no recorded module
            casts = casts or self.casts.get("", "")
        return judge(
            what, value, a, b, gate=self.gate, casts=casts, positions=index, single=self.single, accepted=self.accepted,
            singles=self.singles,
        )  # fmt: skip


def singles_of(reference: Collection[str], candidate: Collection[str]) -> str:
    """Where numbers of float32 came into float64 runs."""
    found = []
    for side, paths in (("reference", reference), ("candidate", candidate)):
        where = ", ".join(sorted(path or "its outermost code or its call" for path in paths)[:3])
        found += [f"the {side} computes with numbers that were made in float32, in {where}"] if paths else []
    return "; ".join(found)


def events(trace: Trace, name: str) -> Iterator[Event]:
    """Every recorded event of a pass in order, but for its own inputs."""
    order: Counter[tuple[str, str]] = Counter()
    for key in trace.events:
        where, kind, _ = split_key(key)
        of, _, rest = where.partition("/")
        if of != name or (rest == "=" and kind == "in"):
            continue
        path, _, call = rest.partition("#")
        position = order[where, kind]
        order[where, kind] += 1
        yield Event(key, path, kind, int(call or 0), Place.of(trace, key, position))


def settle(trace: Trace, name: str, candidate: Candidate, alignment: Alignment, free: Pair) -> None:
    """Let the candidate's layout see the free run first: what it settles there holds for the runs with values given."""
    for event in events(trace, name):
        if event.path != "=":
            read(free.high, alignment, candidate, event.place, trace.events[event.key].shape)
