"""One pass of a component against its trace: run freely and with the reference's values, every event looked at."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from parity.align import Alignment
from parity.arbiter import cast_disagreement
from parity.capture import Capture
from parity.case import Candidate
from parity.compare import GATE, IDENTICAL, SKIPPED, Verdict, worst
from parity.events import Event, Judge, Pair, Runner, events, settle, singles_of
from parity.force import forcings
from parity.isolate import Isolation
from parity.locate import Fault, Guilty, Tap, faults, locate
from parity.perturb import PERTURBED
from parity.plain import Plain
from parity.reorder import reorder
from parity.steps import Steps
from parity.trace import Trace
from parity.twins import answers, settled


@dataclass
class Subject:
    """What all passes of a comparison share.

    Attributes:
        theirs, ours: modules of the reference, and of the candidate, that hold one tensor together (`parity.twins`).
        settings: reference module -> which of its settings the candidate's has otherwise.
        singles: pass -> where numbers of float32 came into its float64 run.
    """

    candidate: Candidate
    trace: Trace
    alignment: Alignment
    runner: Runner
    plain: Plain
    theirs: Mapping[str, set[str]]
    ours: Mapping[str, set[str]]
    settings: Mapping[str, str]
    gate: float = GATE
    baseline: float | None = None
    level: str = "module"
    dtype: str = ""
    step_names: Mapping[str, str] = field(default_factory=dict)
    singles: dict[str, str] = field(default_factory=dict)


class OnePass:
    """A pass of a `Subject`: `run`, then `look`, then `blame`.

    Attributes:
        free: the candidate as it runs by itself; `alone`: with the reference's values around every leaf.
        taps, outputs: what was looked at.
    """

    free: Pair
    judge: Judge
    alignment: Alignment
    isolation: Isolation

    def __init__(self, subject: Subject, name: str) -> None:
        self.subject, self.name = subject, name
        self.reset: Pair | None = None
        self.alone: Pair | None = None
        self.forced: list[str] = []
        self.reach: Capture | None = None
        self.taps: list[Tap] = []
        self.outputs: list[Verdict] = []
        self.faults: list[Fault] = []
        self.notes: list[str] = []
        self.steps: Steps | None = None

    @property
    def call(self) -> Any:
        """The candidate's function for this pass."""
        return self.subject.candidate.passes[plain(self.name)]

    def _pair(self, **kind: Any) -> Pair:
        return self.subject.runner.pair(self.call, self.subject.trace.inputs(self.name), **kind)

    def run(self) -> None:
        """Run it; raises whatever the candidate's code raises."""
        s, trace, name = self.subject, self.subject.trace, self.name
        self.free = self._pair()
        made = {k.partition("/")[2]: e.shape for k, e in trace.events.items() if k.startswith(f"{name}/")}
        called = {key: tensor.shape for key, tensor in self.free.low.tensors.items()}
        self.alignment = settled(s.alignment, s.theirs, s.ours, answers(made), answers(called))
        forcing = forcings(trace, name, s.candidate, self.alignment)
        self.isolation = Isolation(trace, name, s.candidate, self.alignment)
        settle(trace, name, s.candidate, self.alignment, self.free)
        if s.level != "component" and not s.dtype:
            self.reset = self._pair(forcing=forcing) if forcing else None
            self.alone = self._pair(isolation=self.isolation.of) if self.isolation.holders else None
        self.forced = [f.path for f in forcing.values() if not f.unfit]

    def look(self) -> None:
        """Judge every event."""
        s = self.subject
        self.judge = self._judge()
        events_of: list[Event] = []
        for event in events(s.trace, self.name):
            if event.path == "=":
                self.outputs.append(self.judge(event, self.free))
            elif s.level != "component" and not (s.level == "block" and event.path in self.alignment.parts):
                given = self._given(event)
                alone = self.judge(event, given) if given else None
                self.taps.append(Tap(event.key, event.path, event.kind, self.judge(event, self.free), alone))
                events_of.append(event)
        if not s.dtype:
            leaves = [(i, e) for i, e in enumerate(events_of) if e.path in self.alignment.parts]
            self._leave_out_unread([(i, e) for i, e in leaves if e.kind == "in"])
            self._leave_out_unreached([(i, e) for i, e in leaves if self.taps[i].differs])

    def _judge(self) -> Judge:
        s, name = self.subject, self.name
        pairs = {p: c for p in s.trace.modules(name) if (c := self.alignment.counterpart(p))}
        single = None if s.runner.double else s.baseline or math.nan
        casts = cast_disagreement(s.trace.casts, self.free.low.casts, {**pairs, "": ""}) if not s.dtype else {}
        self.notes += [f"{text}; lost precision would show in that side's own noise" for text in casts.values()][:1]
        judge = Judge(s.trace, s.candidate, self.alignment, s.gate, casts, single, s.dtype, s.baseline)
        low = singles_of(s.trace.meta.get("singles", ()), self.free.high.singles)
        if self.alone is not None and low:
            given = self.isolation.given
            apart = [e for e in events(s.trace, name) if e.kind == "out" and (e.path, e.call) in given]
            if not any(judge(event, self.alone).fails for event in apart):  # else a module computes otherwise itself
                s.singles[name] = low
        return replace(judge, singles=s.singles.get(name.partition(PERTURBED)[0], ""))

    def _given(self, event: Event) -> Pair | None:
        """The run in which a module had the reference's inputs."""
        if self.alone is not None and (event.path, event.call) in self.isolation.given:
            return self.alone
        inside = any(event.path == p or event.path.startswith(p + ".") for p in self.forced)
        return self.reset if inside else None

    def _leave_out_unread(self, taken: list[tuple[int, Event]]) -> None:
        """Inputs that could not be compared, and of which a module uses the shape only."""
        unlike = [(at, event) for at, event in taken if self.taps[at].free.status == SKIPPED]
        if not unlike:
            return
        takers = {event.path: self.alignment.parts[event.path][0].candidate for _, event in unlike}
        shapes = self.subject.runner.unread(self.call, self.subject.trace.inputs(self.name), set(takers.values()))
        passed = {at: event.path for at, event in unlike if takers[event.path] in shapes}
        for at in passed:
            same = Verdict(self.taps[at].free.name, IDENTICAL, max_abs=0.0, max_abs64=0.0)
            self.taps[at] = self.taps[at].judged(same, None)
        other = "gets something else, and nothing but its shape is used: not judged"
        self.notes += [f"{self.name}: {self.alignment.label(path)} {other}" for path in dict.fromkeys(passed.values())]

    def _leave_out_unreached(self, differing: list[tuple[int, Event]]) -> None:
        """What differs, and what of it reaches no output."""
        if not differing:
            return
        paths = {part.candidate for _, event in differing for part in self.alignment.parts[event.path]}
        self.reach = self.subject.runner.reach(self.call, self.subject.trace.inputs(self.name), paths)
        if self.reach is None:
            return
        for at, event in differing:
            given = self._given(event)
            free, reset = self.judge(event, self.free, self.reach), None
            if given:
                reset = self.judge(event, given, self.reach)
            self.taps[at] = self.taps[at].judged(free, reset)
        hidden = [event.path for at, event in differing if not self.taps[at].differs]
        if hidden:
            self.notes.append(
                f"{self.name}: what differs in {len(hidden)} tensors reaches no output of the candidate (padding, rows "
                f"that nothing uses) and was not judged: {', '.join(dict.fromkeys(hidden))}"
            )

    def blame(self, first: bool) -> Guilty | None:
        """All `faults`, and the first guilty module.

        Args:
            first: whether no pass before had one: then rows that a conversion puts elsewhere are looked for.
        """
        s, trace, name = self.subject, self.subject.trace, self.name
        if self.alone is not None:
            self._find_steps(self.alone, first)
        step = s.step_names.get(plain(name), "the steps after its last module")
        found = locate(
            trace, name, self.taps, self.outputs, self.alignment, s.candidate, self.free.high, step, self.steps
        )
        return found and found.because(s.settings)

    def _find_steps(self, alone: Pair, first: bool) -> None:
        s, trace, name = self.subject, self.subject.trace, self.name
        once = partial(s.runner.once, self.call, trace.inputs(name))
        self.steps = steps = Steps(
            trace, name, s.candidate, self.alignment, s.plain, self.isolation, once, s.runner.double
        )
        failing = {t.key: t.reset for t in self.taps if t.reset and t.kind == "in" and t.reset.fails}
        ends = [self.judge(event, alone) for event in events(trace, name) if event.path == "="]
        if bad := worst(v for v in ends if v.fails):
            failing[""] = bad
        if failing and first:
            reorder(steps, alone.high, [key for key in failing if key])
        if failing and steps.settle(alone.high):
            alone = self._pair(isolation=self.isolation.planned(steps.plan))
            of = {event.key: event for event in events(trace, name)}
            for i, tap in enumerate(self.taps):
                if (tap.module, of[tap.key].call) in self.isolation.given:
                    self.taps[i] = tap.judged(tap.free, self.judge(of[tap.key], alone, self.reach))
            still = [t.key for t in self.taps if t.reset and t.kind == "in" and t.reset.fails]
            steps.blame(alone.high, failing.keys(), still)
        self.faults = faults(self.taps, steps, alone.high, failing, s.settings)


def plain(name: str) -> str:
    """The pass as the case names it: `forward~mask` and `forward@3` are calls of `forward`."""
    return name.partition(PERTURBED)[0].partition("@")[0]
