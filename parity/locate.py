"""Which module is guilty: its inputs match and its output does not.

Decided by the verdicts, so in float64. Where all weights of a place answer alike and what it hands on does not, the
code between them is at fault: the module that made the differing tensor is named.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from parity.align import NEVER_RAN, Alignment, Place, read
from parity.capture import Capture
from parity.case import Candidate
from parity.compare import FALL, PRECISION, SKIPPED, Verdict
from parity.makers import behind, maker_of
from parity.plain import Suspect
from parity.recorder import sample_indices
from parity.steps import Steps
from parity.trace import Trace, split_key


@dataclass(frozen=True)
class Tap:
    """One recorded activation with its verdicts: `free` as the whole model ran, `reset` with the reference's inputs."""

    key: str
    module: str
    kind: str
    free: Verdict
    reset: Verdict | None = None

    @property
    def differs(self) -> bool:
        """Whether it was compared, free or reset, and does not pass."""
        return any(v is not None and v.fails for v in (self.free, self.reset))

    def judged(self, free: Verdict, reset: Verdict | None) -> Tap:
        """The same with other verdicts."""
        return replace(self, free=free, reset=reset)


@dataclass(frozen=True)
class Guilty:
    """The first module whose inputs match and whose output does not.

    `within` is the reference block around it, and `others` the further blocks that fail with correct inputs.
    """

    candidate: str
    reference: str
    rule: str
    why: str
    within: str = ""
    others: tuple[str, ...] = ()
    code: bool = False  # its weights answer alike: its code is at fault, or the rule that aligns them

    def because(self, settings: Mapping[str, str]) -> Guilty:
        """The same with what the two modules' settings say about it."""
        near = [
            text for path, text in settings.items() if path == self.reference or self.reference.startswith(path + ".")
        ]
        return replace(self, why="; ".join([self.why, *near[-1:]])) if near else self

    def __str__(self) -> str:
        place = f"{self.candidate} ↔ {self.reference}"
        rule = f"rule {self.rule}" if self.rule else "the rules that fill it" if self.code else ""
        cause = ["its code"] * self.code + ([rule] if rule else [])
        return place + (f" ({' or '.join(cause)})" if cause else "")


@dataclass(frozen=True)
class Fault:
    """A leaf, or the step before it, that differs although the reference's values surround it.

    `step` tells the code before the module from the module itself, `by` names the module without weights in it that
    answers otherwise, `settings` says what differs in the module's own.
    """

    candidate: str
    reference: str
    call: int
    step: bool
    verdict: Verdict
    rule: str = ""
    by: str = ""
    settings: str = ""

    def __str__(self) -> str:
        by = f": {self.by or self.settings}" if self.by or self.settings else ""
        return f"{'the code before ' if self.step else ''}{self.candidate} ↔ {self.reference}, call {self.call}{by}"


def faults(
    taps: Sequence[Tap], steps: Steps, alone: Capture, before: Mapping[str, Verdict], settings: Mapping[str, str]
) -> list[Fault]:
    """Every leaf and every step that fails by itself, in order of execution; not what others hand on to it.

    Args:
        steps: what is known of the code between leaves.
        alone: the candidate's run in float64 with the reference's values around every leaf, and as `steps` plans.
        before: verdicts of the taps, and of the pass (empty), that failed without that plan.
        settings: reference module -> which of its settings differ.
    """
    found, since, alignment = [], "", steps.alignment
    for tap in taps:
        if tap.module not in alignment.parts or not (
            tap.key in {*steps.found, *steps.rows} or (tap.reset and not tap.reset.passed)
        ):
            continue
        ours, theirs, rule = _names(alignment, tap.module)
        call = _call(tap)
        if tap.key in steps.rows:
            found.append(Fault(ours, theirs, call, True, before[tap.key], "", str(steps.rows[tap.key])))
            since = tap.key
            continue
        for by in steps.found.get(tap.key, ()):
            found.append(Fault(ours, theirs, call, True, before[tap.key], "", str(by)))
        if tap.reset and not tap.reset.passed:
            step = tap.kind == "in"
            made = (steps.plain.suspect(tap.key, alone, since) or _code(tap, steps, alone)) if step else None
            said = "" if step else settings.get(tap.module, "")
            ours = _taker(tap) or ours
            found.append(Fault(ours, theirs, call, step, tap.reset, "" if step else rule, str(made or ""), said))
        since = tap.key
    for by in steps.found.get("", ()) if "" in before else ():
        found.append(Fault(by.candidate, by.reference, 0, False, before[""], "", by.settings or by.code))
    return found


def _code(tap: Tap, steps: Steps, captured: Capture) -> Suspect | None:
    """The module whose code makes what a tap shows; None for the outermost."""
    maker, taker = maker_of(steps.trace, tap.key, steps.alignment, steps.candidate, captured, _taker(tap))
    theirs = behind(maker, steps.alignment)[0]
    if not (maker and theirs):
        return None
    return Suspect(maker, theirs, code=steps.part(captured, maker, f"{taker}#{_call(tap)}"))


def _taker(tap: Tap) -> str:
    """Of several modules that answer to the tap's, the one that takes something else; empty where the first does."""
    return tap.reset.module if tap.reset else ""


def _call(tap: Tap) -> int:
    return int(split_key(tap.key)[0].rpartition("#")[2])


def locate(
    trace: Trace,
    name: str,
    taps: Sequence[Tap],
    outputs: Sequence[Verdict],
    alignment: Alignment,
    candidate: Candidate,
    captured: Capture,
    step: str,
    steps: Steps | None = None,
) -> Guilty | None:
    """The first fault of a pass in order of execution, as close to its cause as the taps allow; None without a fault.

    Args:
        captured: the candidate's free run in float64.
        step: what stands outside of all modules, for a fault that no module shows.
        steps: what is known of the code between leaves, where they could stand alone.
    """
    blocks = {t.module for t in taps if t.reset is not None and t.module not in alignment.parts}
    unlike = next((t for t in taps if not t.free.passed), None)
    comparable = [t for t in taps if t.free.status != SKIPPED or NEVER_RAN in t.free.note]
    # What differs, or never ran, before what cannot be compared.
    failing = [t for t in comparable if not t.free.passed]
    if failing and unlike is not None and failing[0] is not unlike:  # which may be the cause
        guilty = locate(trace, name, comparable, outputs, alignment, candidate, captured, step, steps)
        before = f"before it {_names(alignment, unlike.module)[0]} could not be compared: {unlike.free.note}"
        return guilty and replace(guilty, why=f"{guilty.why}; {before}")
    failing = failing or [t for t in taps if not t.free.passed]
    if not failing:
        bad = [v for v in outputs if not v.passed]
        if bad and taps:  # else no module was looked at, and none is said to match
            text = bad[0].note or f"max|Δ| {bad[0].max_abs:.1e}, floor {bad[0].floor:.1e}"
            if named := steps.found.get("", ()) if steps else ():
                return _accused(named[0], f"seen in the output of {name}: {text}")
            return Guilty(step, f"{name}(…)", "", f"every module of {name} matches, its output does not: {text}")
        return None
    first = failing[0]
    bad_blocks = [
        t.module for t in taps if t.module in blocks and t.kind == "out" and t.reset is not None and not t.reset.passed
    ]
    around = [b for b in blocks if first.module == b or first.module.startswith(b + ".")]
    others = tuple(dict.fromkeys(alignment.label(b) for b in bad_blocks if b not in around))
    inner = max(around, key=len, default="")
    within = alignment.label(inner) if inner and inner != first.module else ""
    if first.free.status == SKIPPED:
        return Guilty(*_names(alignment, first.module), f"not compared: {first.free.note}", within, others)
    size = f"max|Δ| {first.free.max_abs:.1e}, in float64 {first.free.max_abs64:.1e}, floor {first.free.floor:.1e}"
    if math.isnan(first.free.max_abs64) and first.free.note:  # a lossy run, or one side alone in float32
        size = first.free.note
    size = size if math.isfinite(first.free.max_abs) else first.free.note
    size += f"; {first.free.note}" if first.free.status == PRECISION else ""
    if first.kind == "out":
        inputs = [t for t in taps if t.module == first.module and t.kind == "in"]
        match = inputs and all(t.free.passed for t in inputs)
        also = "its inputs match, its output does not" if match else "its output is the first that does not match"
        ours, theirs, rule = _names(alignment, first.module)
        ours = _differing(trace, first, alignment, candidate, captured) or ours
        return Guilty(ours, theirs, rule, f"{also}: {size}", within, others)
    # An input differs while everything before matches: the step that makes it is at fault, and it owns no recorded tap.
    if steps is not None:
        named = [
            *([steps.rows[first.key]] if first.key in steps.rows else ()),
            *steps.found.get(first.key, ()),
            *filter(None, [steps.plain.suspect(first.key, captured)]),
        ]
        if named:
            seen = f"seen in {split_key(first.key)[2]} of {_names(alignment, first.module)[0]}: {size}"
            return _accused(named[0], seen, within, others, alignment)
    maker, taker = maker_of(trace, first.key, alignment, candidate, captured, first.free.module)
    reference, rule = behind(maker, alignment)
    code = steps.part(captured, maker, f"{taker}#{_call(first)}") if steps is not None and maker else "it"
    why = f"the weights in it match, what {code} hands to {taker} ({split_key(first.key)[2]}) does not: {size}"
    if passed := _between(first, taker, alignment, captured):
        why += f"; without weights ran before it: {', '.join(passed)}"
    return Guilty(maker or "the model's own forward", reference or name, rule, why, within, others, code=True)


def _accused(
    by: Suspect, seen: str, within: str = "", others: tuple[str, ...] = (), alignment: Alignment | None = None
) -> Guilty:
    """A module without weights, or whose code, answers otherwise by itself; or modules with rows at other places."""
    if by.rows:
        why = f"it computes what its weights say, and all behind it matches if the conversion {by.rows}; {seen}"
        rule = alignment.rule(by.reference.partition(", ")[0]) if alignment else ""
        return Guilty(by.candidate, by.reference, rule, why, within, others)
    if by.code:
        why = f"the weights in it match, {by.code} does not compute what the reference does; {seen}"
        return Guilty(by.candidate or "the model's own forward", by.reference, "", why, within, others, code=True)
    words = ["it has no weights, its input matches, its output does not", by.settings, seen]
    return Guilty(by.candidate, by.reference, "", "; ".join(filter(None, words)), within, others)


def _between(tap: Tap, taker: str, alignment: Alignment, captured: Capture) -> list[str]:
    """Modules without weights that answered after the last compared one and before the module that takes the input."""
    leaves = {part.candidate for parts in alignment.parts.values() for part in parts}
    call = split_key(tap.key)[0].rpartition("#")[2]
    found: list[str] = []
    for key in captured.tensors:
        path, _, rest = key.partition("#")
        if path == taker and rest.startswith(f"{call}.in."):
            return list(dict.fromkeys(found))
        if ".out." in rest:
            found = [] if path in leaves else [*found, path] if not alignment.behind(path) else found
    return []


def _differing(trace: Trace, tap: Tap, alignment: Alignment, candidate: Candidate, captured: Capture) -> str:
    """Of a fused reference module's several counterparts, those that differ."""
    parts = alignment.parts.get(tap.module, ())
    value = trace.value(tap.key)
    mine = read(captured, alignment, candidate, Place.of(trace, tap.key), value.event.shape)
    if len(parts) < 2 or isinstance(mine, str):
        return ""
    index = sample_indices(mine.numel(), value.event.elements)
    axis = 1 if mine.ndim == 4 else mine.ndim - 1
    rows = torch.unravel_index(index, mine.shape)[axis]
    gap = (mine.reshape(-1)[index].double() - value.high).abs()
    wrong = gap > tap.free.max_abs64 / FALL
    if bool((gap > 1.001 * tap.free.max_abs64).any()):  # rows that reach no output were not judged: the worst place is
        at = torch.stack(torch.unravel_index(index, mine.shape))
        there = torch.tensor([*tap.free.worst[:axis], 0, *tap.free.worst[axis:][1:]])[:, None]
        at[axis] = 0
        wrong &= (at == there).all(0)
    bad = dict.fromkeys(
        part.candidate
        for part in parts
        if part.source and bool((wrong & (rows >= part.source[0]) & (rows < part.source[1])).any())
    )
    return ", ".join(bad)


def _names(alignment: Alignment, module: str) -> tuple[str, str, str]:
    label = alignment.label(module)
    return label.partition(" ↔ ")[0], module, alignment.rule(module)
