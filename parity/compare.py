"""From two runs in two precisions to a verdict.

A rounding difference falls by orders of magnitude when both sides run in float64; a real difference stays. So the
float64 runs are the arbiter, the gate is only the outer fence, and each side's own noise stands beside the number.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from parity.trace import Value
from parity.wording import SKIPPED as SKIPPED

IDENTICAL, ROUNDING = "identical", "rounding"
DIFFERS, PRECISION, OVER = "differs", "differs (precision)", "over the gate"
PASSING = frozenset({IDENTICAL, ROUNDING})

GATE = 1e-3  # the fence that users ask for, on max|delta| scaled by max(1, max|reference|)
FALL = 1000.0  # a rounding difference shrinks this much in float64 (measured: 1e6); real ones by 0.93 to 1.02
NOISIER = 10.0  # with disagreeing cast traces: one side this much noisier than the other has lost precision
LOSSES = 2.0  # how many times the reference's own loss a candidate may lose in a lossy dtype
BASELINES = 3.0  # how many times its baseline a family may differ where float64 cannot run
ROUND_OFF_64 = 1e-12  # of the largest value: what float64 summation orders leave by themselves


@dataclass(frozen=True)
class Verdict:
    """One comparison. Differences are absolute, in the tensor's own unit; `scaled` divides by max(1, peak)."""

    name: str
    status: str
    max_abs: float = math.nan
    max_abs64: float = math.nan
    mean_abs: float = math.nan
    noise_reference: float = math.nan
    noise_candidate: float = math.nan
    peak: float = math.nan
    cosine: float = math.nan
    elements: int = 0
    of: int = 0
    worst: tuple[int, ...] = ()
    note: str = ""
    module: str = ""  # of several modules of the candidate that answer to one of the reference, the one it speaks of

    @property
    def passed(self) -> bool:
        return self.status in PASSING

    @property
    def fails(self) -> bool:
        """Whether it was compared, and does not pass."""
        return not self.passed and self.status != SKIPPED

    @property
    def floor(self) -> float:
        """The larger of both sides' own float32 noise."""
        return max(self.noise_reference, self.noise_candidate)

    @property
    def ratio(self) -> float:
        """How many floors the difference is."""
        return self.max_abs / self.floor if self.floor else (0.0 if self.max_abs == 0 else math.inf)

    @property
    def scaled(self) -> float:
        return self.max_abs / max(1.0, self.peak)

    def to_json(self, brief: bool = False) -> dict[str, Any]:
        """Plain data; numbers that are not finite become None. `brief` leaves out what a table does not show."""
        data = asdict(self) | {"floor": self.floor, "ratio": self.ratio, "scaled": self.scaled, "passed": self.passed}
        left_out = (*_DETAILS, "module") if brief else ("module",)
        return {k: _number(v, k) if isinstance(v, float) else v for k, v in data.items() if k not in left_out}


_DETAILS = ("mean_abs", "worst", "ratio")


def _number(value: float, name: str) -> float | None:
    """Five digits; a cosine needs twelve, as it is always nearly one."""
    return float(f"{value:.{12 if name == 'cosine' else 5}g}") if math.isfinite(value) else None


def skipped(name: str, why: str) -> Verdict:
    """A comparison that could not be made: never a pass."""
    return Verdict(name, SKIPPED, note=why)


def judge(
    name: str,
    reference: Value,
    low: Tensor,
    high: Tensor,
    *,
    gate: float = GATE,
    casts: str = "",
    positions: Tensor | None = None,
    single: float | None = None,
    accepted: float | None = None,
    singles: str = "",
) -> Verdict:
    """Compare a candidate's flat samples, `low` (float32 run) and `high` (float64 run), with a recorded value.

    Args:
        casts: what the cast traces of both sides disagree on; empty when they agree.
        positions: flat positions of the samples in the whole tensor, to name the worst element.
        single: float64 could not run: the family's baseline, a scaled difference in float32, decides; NaN where none is
            known.
        accepted: scaled difference that one side's lower precision may make.
        singles: where a side's float64 run took numbers of float32; empty where none did.
    """
    total = torch.Size(reference.event.shape).numel()
    if low.numel() != reference.low.numel() or high.numel() != reference.high.numel():
        return skipped(name, f"candidate has {low.numel()} elements, reference {reference.low.numel()}")
    if not low.numel():
        return skipped(name, "empty tensor")
    a, b = reference.low.double(), low.double()
    delta, delta64 = (a - b).abs(), (reference.high - high).abs()
    d32, d64 = float(delta.max()), float(delta64.max())
    peak = float(a.abs().max())
    noise_reference = float((reference.high - a).abs().max())
    noise_candidate = float((high - b).abs().max())
    scale = max(1.0, peak)
    norms = float(a.norm() * b.norm())
    at = int(delta.argmax())
    note = ""
    stays = d64 > max(max(d32, noise_reference, noise_candidate) / FALL, ROUND_OFF_64 * peak)
    if not all(math.isfinite(x) for x in (d32, d64, peak)):
        status, note = DIFFERS, _not_finite(a, b)
    elif d32 / scale > gate:
        status = OVER
    elif single is not None:
        noise_reference = noise_candidate = single * scale
        d64 = math.nan
        known = f"float64 cannot run: judged by the baseline {single:.1e} (scaled)"
        status, note = (ROUNDING, known) if d32 <= BASELINES * single * scale else (DIFFERS, known)
        if math.isnan(single):
            status, note = SKIPPED, "float64 cannot run, and the case gives no `baseline`"
        elif d32 == 0:
            status = IDENTICAL
    elif stays and not (singles and d64 <= max(noise_reference, noise_candidate)):
        status, note = DIFFERS, f"float64 keeps {d64:.1e} of {d32:.1e}"
    elif stays or (casts and max(noise_reference, noise_candidate) > NOISIER * min(noise_reference, noise_candidate)):
        casts = singles if stays else casts
        within = accepted is not None and d32 <= BASELINES * accepted * scale
        status, note = (ROUNDING, f"within the case's baseline: {casts}") if within else (PRECISION, casts)
    else:
        status = IDENTICAL if d32 == 0 else ROUNDING
    position = int(positions[at]) if positions is not None else at
    return Verdict(
        name,
        status,
        max_abs=d32,
        max_abs64=d64,
        mean_abs=float(delta.mean()),
        noise_reference=noise_reference,
        noise_candidate=noise_candidate,
        peak=peak,
        cosine=float(a @ b) / norms if norms else float(d32 == 0),
        elements=low.numel(),
        of=total,
        worst=_unravel(position, reference.event.shape),
        note=note,
    )


def judge_lossy(name: str, reference: Value, low: Tensor, dtype: str, *, positions: Tensor | None = None) -> Verdict:
    """Compare a candidate's run in a lossy `dtype` with the float64 truth, by what the reference itself loses in it.

    Both sides' losses are distances from the truth; they are never compared with each other's values.
    """
    if low.numel() != reference.high.numel():
        return skipped(name, f"candidate has {low.numel()} elements, reference {reference.high.numel()}")
    known = reference.event.losses.get(dtype)
    if known is None:
        return skipped(name, f"the reference has no run in {dtype}: its trace says none, or that it failed")
    if not low.numel():
        return skipped(name, "empty tensor")
    delta = (low.double() - reference.high).abs()
    largest, mean = float(delta.max()), float(delta.square().mean().sqrt())
    peak = float(reference.high.abs().max())
    fits = loses_no_more((largest, mean), (known[0], known[1]), reference.high, getattr(torch, dtype))
    at = int(delta.argmax())
    if not all(math.isfinite(x) for x in (largest, peak, *known)):
        lost = "" if all(map(math.isfinite, known)) else f"NaN or inf in the reference's run in {dtype}"
        here = "" if math.isfinite(largest) else _not_finite(reference.high, low.double())
        status, note = DIFFERS, "; ".join(n for n in (lost, here) if n)
    elif fits:
        status, note = (ROUNDING if largest else IDENTICAL), ""
    else:
        status, note = PRECISION, f"loses {mean:.1e} (rms) in {dtype}, the reference {known[1]:.1e}"
    return Verdict(
        name, status, max_abs=largest, mean_abs=float(delta.mean()), noise_reference=known[0], noise_candidate=largest,
        peak=peak, elements=low.numel(), of=torch.Size(reference.event.shape).numel(),
        worst=_unravel(int(positions[at]) if positions is not None else at, reference.event.shape), note=note,
    )  # fmt: skip


def loses_no_more(
    candidate: tuple[float, float], reference: tuple[float, float], truth: Tensor, dtype: torch.dtype
) -> bool:
    """Whether a run in a lossy dtype loses no more than `LOSSES` times what the reference itself loses in it.

    Below a step of the dtype at the truth's peak (in the root mean square: half a step of its own) it is what storing
    the numbers costs, and counts as rounding.

    Args:
        candidate, reference: largest and root mean square distance from the float64 truth.
    """
    step = torch.finfo(dtype).eps
    peak, size = float(truth.abs().max()), float(truth.square().mean().sqrt())
    largest, mean = candidate
    return mean <= max(LOSSES * reference[1], step / 2 * size) and largest <= max(
        2 * LOSSES * reference[0], step * peak
    )


def _not_finite(reference: Tensor, candidate: Tensor) -> str:
    """Which side has NaN or inf, and how many."""
    counts = [
        f"{int((~torch.isfinite(side)).sum())} of {side.numel()} elements of the {name}"
        for name, side in (("reference", reference), ("candidate", candidate))
        if not bool(torch.isfinite(side).all())
    ]
    return f"NaN or inf in {' and in '.join(counts)}" if counts else "NaN or inf in float64"


def worst(verdicts: Iterable[Verdict]) -> Verdict | None:
    """The gravest verdict: any that fails before any that passes, then by scaled difference."""
    order = {SKIPPED: 4, OVER: 3, DIFFERS: 3, PRECISION: 2, ROUNDING: 1, IDENTICAL: 0}
    return max(verdicts, key=lambda v: (order[v.status], v.scaled if v.status != SKIPPED else 0.0), default=None)


def _unravel(flat: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    index: list[int] = []
    for size in reversed(shape):
        flat, at = divmod(flat, size)
        index.append(at)
    return tuple(reversed(index))
