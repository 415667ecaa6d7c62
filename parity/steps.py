"""Whose code it is that goes wrong between two modules with weights.

Beside those, a trace of a case knows what each module around others takes and answers (blocks, attentions), and what
modules without weights do. Where a step goes wrong, these get the reference's values too, kind after kind: a kind
whose values mend a step, and spoil none, answers to the reference's, and those of it that differ by themselves are
at fault. So a lost residual is found in the block whose code lost it, and two faults in one step are two.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from parity.align import Alignment, read
from parity.capture import Capture
from parity.case import Candidate
from parity.events import Event, events
from parity.isolate import Isolation
from parity.mend import Moment, Way, containers, moments, way_to
from parity.plain import ALIKE, Plain, Suspect
from parity.recorder import sample_indices
from parity.trace import Trace, split_key

_ALIKE_SINGLE = 1e-5  # of the largest number, where float64 does not run
_MOST_RUNS = 24


Found = tuple[str, Way] | Literal[True] | None  # what the reference has in its place; True: the same; None: unknown


@dataclass(frozen=True)
class Look:
    """What of a run is the reference's: taps of leaves and outputs, and whatever else was recognised."""

    taps: frozenset[str]
    known: frozenset[str]
    wrong: Mapping[Moment, tuple[str, Way]]  # what answers otherwise, with what the reference has in its place


@dataclass
class Steps:
    """The code between leaves in one pass.

    Attributes:
        isolation: what lets leaves stand alone.
        run: runs the candidate in float64 (float32 where that does not run), within an `isolation=`.
        plan: what mends the steps that go wrong.
        rows: taps that match once the rows of leaves before them are in another order.
        found: who is at fault, by the tap that is reached next; under an empty key where none is.
    """

    trace: Trace
    name: str
    candidate: Candidate
    alignment: Alignment
    plain: Plain
    isolation: Isolation
    run: Callable[..., Capture]
    double: bool = True
    plan: dict[str, tuple[str, Way]] = field(default_factory=dict)
    found: dict[str, list[Suspect]] = field(default_factory=dict)
    rows: dict[str, Suspect] = field(default_factory=dict)
    _sorted: dict[str, Tensor] = field(default_factory=dict)
    _calls: list[tuple[str, str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.taps: dict[str, Event] = {  # what goes into leaves, and the outputs
            e.key: e
            for e in events(self.trace, self.name)
            if e.path == "=" or (e.kind == "in" and e.path in self.alignment.parts)
        }
        paths = [p for p in self.trace.modules(self.name) if p in self.alignment.parts]
        self.leaves = {part.candidate for p in paths for part in self.alignment.parts[p]}
        self.pairs = containers(self.trace, self.alignment)

    def settle(self, alone: Capture) -> bool:
        """Look for a plan that mends the steps that go wrong; whether there is one.

        Args:
            alone: the run with an empty plan.
        """
        now = self._look(alone)
        refused: set[str] = set()
        for _ in range(_MOST_RUNS):
            kind = next((m.sort for m in now.wrong if m.sort not in refused and m.key not in self.plan), None)
            if kind is None or now.taps == self.taps.keys():
                break
            mends, after = False, now
            group = {m.key: known for m, known in now.wrong.items() if m.sort == kind}
            with suppress(Exception):  # a model may refuse values that fit nothing around them
                after = self._look(self.run(isolation=self.isolation.planned({**self.plan, **group})))
                mends = now.taps <= after.taps and bool(after.known - now.known - group.keys())
            if mends:
                self.plan |= group
                now = after
            else:
                refused.add(kind)
        return bool(self.plan)

    def blame(self, captured: Capture, before: Collection[str], after: Collection[str]) -> None:
        """Note in `found` who is at fault, by the tap that is reached next (empty: none is).

        Args:
            captured: the candidate's run with the plan.
            before, after: taps that fail without the plan, and with it.
        """
        look = self._look(captured)
        wrong = {m.key for m in look.wrong}
        order = list(moments(captured))
        reached: dict[str, str] = {}
        for key, event in self.taps.items():
            for part in self.alignment.parts[event.path] if event.path != "=" else ():
                reached.setdefault(f"{part.candidate}#{event.call}", key)
        spoilt: set[str] = set()  # calls in which something went wrong that goes on
        for at, moment in enumerate(order):
            if moment.kind == "in" and reached.get(moment.where, "") in after:
                spoilt.update(moment.inside)
            if moment.key not in self.plan or moment.key not in wrong or moment.where in spoilt:
                continue
            following = (reached.get(m.where, "") for m in order[at + 1 :] if m.kind == "in")
            tap = next((t for t in following if t in before), "")
            suspect, named = self._suspect(moment, order[:at], look.known), self.found.setdefault(tap, [])
            if suspect not in named:
                named.append(suspect)

    def part(self, captured: Capture, maker: str, where: str) -> str:
        """Which part of a module's code makes what the call `where` takes: `its code between a and b`."""
        order = list(moments(captured))
        at = next((i for i, m in enumerate(order) if m.kind == "in" and m.where == where), len(order))
        left = next((i for i in reversed(range(at)) if order[i].path == maker and order[i].kind == "out"), at)
        inner = at < len(order) and order[at].frame == maker
        until = order[at].path if inner else ""
        return self._part(maker, order[: at if inner else left], until, self._look(captured).known)

    def _part(self, maker: str, earlier: list[Moment], until: str, known: Collection[str]) -> str:
        """
        Args:
            known: what of the run is the reference's.
        """
        stem = f"{maker}." if maker else ""
        ends = (m.path for m in reversed(earlier) if m.kind == "out" and (m.path in self.leaves or m.key in known))
        since = next((path for path in ends if path.startswith(stem)), "")
        if since and until:
            return f"its code between {since} and {until}"
        return f"its code after {since}" if since else f"its code before {until}" if until else "its code"

    def _suspect(self, moment: Moment, earlier: list[Moment], known: Collection[str]) -> Suspect:
        if moment.path in self.plain.own:
            theirs = split_key(self.plan[moment.key][0])[0].partition("/")[2].rpartition("#")[0]
            return Suspect(moment.path, theirs, self.plain.differing(moment.path, theirs))
        code = self._part(moment.frame, earlier, moment.path if moment.kind == "in" else "", known)
        return Suspect(moment.frame, self.pairs.get(moment.frame, [""])[0], code=code)

    def _look(self, captured: Capture) -> Look:
        """What of a run is the reference's, and what is not."""
        taps = frozenset(key for key in self.taps if self.matches(key, captured))
        known: set[str] = set(taps)
        wrong: dict[Moment, tuple[str, Way]] = {}
        mine = {key: tensor.double().reshape(-1).sort().values for key, tensor in captured.tensors.items()}
        for moment in moments(captured):
            if moment.path in self.pairs:
                found = self._in_container(moment, captured, mine)
            elif moment.path in self.plain.own:
                found = self._in_plain(moment, captured, mine)
            else:
                continue
            if found is True:
                known.add(moment.key)
            elif found:
                wrong[moment] = found
        return Look(taps, frozenset(known), wrong)

    def _in_container(self, moment: Moment, captured: Capture, mine: Mapping[str, Tensor]) -> Found:
        """Of what a container takes or answers, the one tensor of the reference's that is not there otherwise."""
        keys = self._theirs(moment)
        if any(self._alike(mine[moment.key], key) for key in keys):
            return True
        beside = [f"{moment.where}.{moment.kind}.{name}" for name in captured.at(f"{moment.where}.{moment.kind}")]
        free = [k for k in keys if self._numel(k) == len(mine[moment.key])]
        free = [k for k in free if not any(self._alike(mine[other], k) for other in beside)]
        way = way_to(self.trace.value(free[0]), captured.tensors[moment.key].shape) if len(free) == 1 else None
        return (free[0], way) if way else None

    def _in_plain(self, moment: Moment, captured: Capture, mine: Mapping[str, Tensor]) -> Found:
        """A module without weights is the reference's that gets the same; what it answers is then wrong or right."""
        taken = captured.at(f"{moment.where}.in")
        if len(taken) != 1:
            return None
        given = f"{moment.where}.in.{next(iter(taken))}"
        same = [(path, a, b) for path, a, b in self._plain() if self._alike(mine[given], a)]
        if not same or moment.kind == "in":
            return True if same else None
        if any(self._alike(mine[moment.key], answer) for _, _, answer in same):
            return True
        kinds: Mapping[str, str] = self.trace.meta.get("plain", {})
        same = [found for found in same if self._numel(found[2]) == len(mine[moment.key])]
        same = [found for found in same if kinds[found[0]] == self.plain.own[moment.path]] or same
        own, out = captured.tensors[given], captured.tensors[moment.key]
        if len({path for path, _, _ in same}) != 1 or own.shape != out.shape:
            return None
        _, before, after = same[0]
        value = self.trace.value(before)
        if self.trace.value(after).event.shape != value.event.shape:
            return None
        way = way_to(value, own.shape, lambda t: self._near(own.double().reshape(-1), t.reshape(-1)))
        return (after, way) if way else None

    def _plain(self) -> list[tuple[str, str, str]]:
        """Calls of the reference's modules without weights: path, what goes in, what comes out."""
        if not self._calls:
            for path in self.trace.meta.get("plain", {}):
                call = 0
                while taken := self.trace.keys(self.name, path, call, "in"):
                    answers = self.trace.keys(self.name, path, call, "out")
                    if len(taken) == len(answers) == 1:
                        self._calls.append((path, taken[0], answers[0]))
                    call += 1
        return self._calls

    def _theirs(self, moment: Moment) -> list[str]:
        """What the reference recorded of the modules that answer to a container's call; the first that has any."""
        kept = (self.trace.keys(self.name, path, moment.call, moment.kind) for path in self.pairs[moment.path])
        return next((keys for keys in kept if keys), [])

    def matches(self, key: str, captured: Capture) -> bool:
        """Whether a tap is the reference's in a run."""
        value = self.trace.value(key)
        mine = read(captured, self.alignment, self.candidate, self.taps[key].place, value.event.shape)
        if isinstance(mine, str):
            return False
        mine = mine.reshape(-1)[sample_indices(mine.numel(), value.event.elements)].double()
        return self._near(mine, value.high)

    def _alike(self, mine: Tensor, key: str) -> bool:
        if key not in self._sorted:
            self._sorted[key] = self.trace.value(key).high.sort().values
        return self._near(mine, self._sorted[key])

    def _near(self, mine: Tensor, theirs: Tensor) -> bool:
        if mine.shape != theirs.shape or not mine.numel():
            return False
        return bool((mine - theirs).abs().max() <= self._tolerance() * max(1.0, float(theirs.abs().max())))

    def _tolerance(self) -> float:
        return ALIKE if self.double else _ALIKE_SINGLE

    def _numel(self, key: str) -> int:
        value = self.trace.value(key)
        return value.low.numel() if value.complete else -1
