"""Which module is guilty: its inputs match and its output does not.

Decided by the verdicts, so in float64. Where all weights of a place answer alike and what it hands on does not, the
code between them is at fault: the module that made the differing tensor is named.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from parity.align import NEVER_RAN, Alignment, Place, common_path, read
from parity.capture import Capture
from parity.case import Candidate
from parity.compare import FALL, SKIPPED, Verdict
from parity.plain import Plain
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

    `step` tells the code before the module from the module itself, `by` names the module without weights in it that
    answers otherwise.
    """

    candidate: str
    reference: str
    call: int
    step: bool
    verdict: Verdict
    rule: str = ""
    by: str = ""

    def __str__(self) -> str:
        by = f": {self.by}" if self.by else ""
        return f"{'the code before ' if self.step else ''}{self.candidate} ↔ {self.reference}, call {self.call}{by}"


def faults(
    taps: Sequence[Tap], alignment: Alignment, plain: Plain | None = None, alone: Capture | None = None
) -> list[Fault]:
    """Every leaf and every step that fails by itself, in order of execution; not what others hand on to it.

    Args:
        alone: the candidate's run in float64 with the reference's values around every leaf.
    """
    found, since = [], ""
    for tap in taps:
        if tap.reset is None or tap.reset.passed or tap.module not in alignment.parts:
            continue
        ours, theirs, rule = _names(alignment, tap.module)
        call = int(split_key(tap.key)[0].rpartition("#")[2])
        step = tap.kind == "in"
        by = plain.suspect(tap.key, alone, since) if step and plain and alone else None
        since = tap.key
        found.append(Fault(ours, theirs, call, step, tap.reset, "" if step else rule, str(by or "")))
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
    plain: Plain | None = None,
) -> Guilty | None:
    """The first fault of a pass in order of execution, as close to its cause as the taps allow; None without a fault.

    Args:
        captured: the candidate's free run in float64.
        step: what stands outside of all modules, for a fault that no module shows.
        plain: the modules without weights, where they were recorded.
    """
    blocks = {t.module for t in taps if t.reset is not None and t.module not in alignment.parts}
    failing = [t for t in taps if not t.free.passed]
    # What differs, or never ran, before what cannot be compared.
    failing = [t for t in failing if t.free.status != SKIPPED or NEVER_RAN in t.free.note] or failing
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
    if plain is not None and (found := plain.suspect(first.key, captured)):
        taken = f"seen in {split_key(first.key)[2]} of {_names(alignment, first.module)[0]}: {size}"
        words = ["it has no weights, its input matches, its output does not", found.settings, taken]
        return Guilty(found.candidate, found.reference, "", "; ".join(filter(None, words)), within, others)
    maker, taker = _maker(trace, first, alignment, candidate, captured)
    at = maker
    while at and not alignment.behind(at):
        at = at.rpartition(".")[0]
    behind = alignment.behind(at) if at else []
    reference = common_path(behind) or ", ".join(dict.fromkeys(b.partition(".")[0] for b in behind)) or name
    rule = alignment.rule(behind[0]) if len(behind) == 1 else ""
    why = f"the weights in it match, what it hands to {taker} ({split_key(first.key)[2]}) does not: {size}"
    if passed := _between(first, taker, alignment, captured):
        why += f"; without weights ran before it: {', '.join(passed)}"
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
    value = next(iter(own.values()), None)
    if value is not None and (maker := _source(value, taker, alignment, captured)):
        return maker, taker
    handed = {captured.handed.get(prefix + k) for k in own}
    parent = _around(taker, captured)
    while parent:  # who only hands on what it got did not make it
        got = [k for k in captured.handed if k.startswith(f"{parent}#") and captured.handed[k] in handed]
        if made := [captured.producers[k] for k in got if k in captured.producers]:
            return made[0], taker
        if not got and not _received(value, parent, captured):
            break
        parent = _around(parent, captured)
    return parent, taker


def _around(path: str, captured: Capture) -> str:
    """The next module around a path that runs itself; empty for the outermost."""
    parent = path.rpartition(".")[0]
    while parent and parent not in captured.ran:
        parent = parent.rpartition(".")[0]
    return parent


def _received(value: Tensor | None, module: str, captured: Capture) -> bool:
    """Whether a module was handed these very numbers, so that it did not make them."""
    if value is None:
        return False
    given = (t for k, t in captured.tensors.items() if k.startswith(f"{module}#") and ".in." in k)
    return any(t.shape == value.shape and torch.equal(t, value) for t in given)


def _source(value: Tensor, taker: str, alignment: Alignment, captured: Capture) -> str:
    """The last module that answered these numbers, in whatever order; empty for one whose own answer is compared."""
    leaves = {part.candidate for parts in alignment.parts.values() for part in parts}
    sums = _sums(value)
    found = ""
    for key, tensor in captured.tensors.items():
        path, mark, rest = key.partition("#")
        if path == taker and ".in." in rest:
            break
        same = mark and ".out." in rest and tensor.numel() == value.numel() and tensor.is_floating_point()
        if same and torch.allclose(_sums(tensor), sums, rtol=1e-12, atol=0):
            found = path
    return "" if found in leaves else found


def _sums(tensor: Tensor) -> Tensor:
    """Numbers that no rearrangement changes, up to rounding: the ends, and the sums of two powers."""
    flat = tensor.double().reshape(-1)
    return torch.stack([flat.min(), flat.max(), flat.square().sum(), flat.pow(4).sum()])


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
