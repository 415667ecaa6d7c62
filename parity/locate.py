"""Which module is guilty: its inputs match and its output does not.

Decided by the verdicts, so in float64. Where all weights of a place answer alike and what it hands on does not, the
code between them is at fault: the module that made the differing tensor is named.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from parity.align import Alignment, Place, common_path, read
from parity.capture import Capture
from parity.case import Candidate
from parity.compare import FALL, SKIPPED, Verdict
from parity.recorder import sample_indices
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
        return any(v is not None and not v.passed and v.status != SKIPPED for v in (self.free, self.reset))

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

    `step` tells the code before the module from the module itself.
    """

    candidate: str
    reference: str
    call: int
    step: bool
    verdict: Verdict
    rule: str = ""

    def __str__(self) -> str:
        return f"{'the code before ' if self.step else ''}{self.candidate} ↔ {self.reference}, call {self.call}"


def faults(taps: Sequence[Tap], alignment: Alignment) -> list[Fault]:
    """Every leaf and every step that fails by itself, in order of execution; not what others hand on to it."""
    found = []
    for tap in taps:
        if tap.reset is None or tap.reset.passed or tap.module not in alignment.parts:
            continue
        ours, theirs, rule = _names(alignment, tap.module)
        call = int(split_key(tap.key)[0].rpartition("#")[2])
        found.append(Fault(ours, theirs, call, tap.kind == "in", tap.reset, "" if tap.kind == "in" else rule))
    return found


def locate(
    trace: Trace,
    name: str,
    taps: Sequence[Tap],
    outputs: Sequence[Verdict],
    alignment: Alignment,
    candidate: Candidate,
    captured: Capture,
    step: str,
) -> Guilty | None:
    """The first fault of a pass in order of execution, as close to its cause as the taps allow; None without a fault.

    Args:
        captured: the candidate's free run in float64.
        step: what stands outside of all modules, for a fault that no module shows.
    """
    blocks = {t.module for t in taps if t.reset is not None and t.module not in alignment.parts}
    failing = [t for t in taps if not t.free.passed]
    failing = [t for t in failing if t.free.status != SKIPPED] or failing  # what differs, before what is not compared
    if not failing:
        bad = [v for v in outputs if not v.passed]
        if bad:
            text = bad[0].note or f"max|Δ| {bad[0].max_abs:.1e}, floor {bad[0].floor:.1e}"
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
    size = size if math.isfinite(first.free.max_abs) else first.free.note
    if first.kind == "out":
        inputs = [t for t in taps if t.module == first.module and t.kind == "in"]
        match = inputs and all(t.free.passed for t in inputs)
        also = "its inputs match, its output does not" if match else "its output is the first that does not match"
        ours, theirs, rule = _names(alignment, first.module)
        ours = _differing(trace, first, alignment, candidate, captured) or ours
        return Guilty(ours, theirs, rule, f"{also}: {size}", within, others)
    # An input differs while everything before matches: the step that makes it is at fault, and it owns no recorded tap.
    maker, taker = _maker(trace, first, alignment, candidate, captured)
    at = maker
    while at and not alignment.behind(at):
        at = at.rpartition(".")[0]
    behind = alignment.behind(at) if at else []
    reference = common_path(behind) or ", ".join(dict.fromkeys(b.partition(".")[0] for b in behind)) or name
    rule = alignment.rule(behind[0]) if len(behind) == 1 else ""
    why = f"the weights in it match, what it hands to {taker} ({split_key(first.key)[2]}) does not: {size}"
    return Guilty(maker or "the model's own forward", reference, rule, why, within, others, code=True)


def _maker(trace: Trace, tap: Tap, alignment: Alignment, candidate: Candidate, captured: Capture) -> tuple[str, str]:
    """(candidate module that computes a differing input, the module that receives it)."""
    where, _, name = split_key(tap.key)
    leaf = tap.module in alignment.parts
    taker = alignment.parts[tap.module][0].candidate if leaf else alignment.counterpart(tap.module) or ""
    prefix = f"{taker}#{where.rpartition('#')[2]}.in."
    own = {k.removeprefix(prefix): t for k, t in captured.tensors.items() if k.startswith(prefix)}
    block = next((b for b in candidate.blocks if b.matches(tap.module)), None)
    if block and not leaf:
        value = block.inputs(own, Place.of(trace, tap.key).inputs).get(name)
        own = {k: t for k, t in own.items() if t is value}
    makers = [captured.producers[prefix + k] for k in own if prefix + k in captured.producers]
    if makers and makers[0] != taker:
        return makers[0], taker
    parent = taker.rpartition(".")[0]
    while parent and parent not in captured.ran:
        parent = parent.rpartition(".")[0]
    return parent, taker


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
    wrong = (mine.reshape(-1)[index].double() - value.high).abs() > tap.free.max_abs64 / FALL
    bad = dict.fromkeys(
        part.candidate
        for part in parts
        if part.source and bool((wrong & (rows >= part.source[0]) & (rows < part.source[1])).any())
    )
    return ", ".join(bad)


def _names(alignment: Alignment, module: str) -> tuple[str, str, str]:
    label = alignment.label(module)
    return label.partition(" ↔ ")[0], module, alignment.rule(module)
