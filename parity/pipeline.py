"""A whole pipeline against another: draws, encoders, schedule, every step and the image, without editing either side.

Module calls are seen through hooks, steps through the scheduler, draws through torch's own dispatch. Both sides run
alone: as asked, for another prompt, and in float64; in low precision the reference's float64 run judges both.
"""

from __future__ import annotations

import gc
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parity import pipeline_guards as guards
from parity.case import PipelineCase, PipelineSide
from parity.compare import DIFFERS, GATE, IDENTICAL, PASSING, SKIPPED, Verdict, judge, skipped, worst
from parity.draws import Drawn, OtherDraws, compare_draws
from parity.images import Metrics, frames, measure
from parity.precision import judge_low
from parity.recorder import Event
from parity.schedule import Growth, growth
from parity.stages import Request, Run, run_side
from parity.trace import Value
from porter.core.errors import CheckFailed

STEP, PIPELINE = "step", "pipeline"
IMAGE = "image"
_OWN_WAY = "set_timesteps"  # how a side asks its scheduler is its own affair; what comes of it, is not


@dataclass
class PipelineResult:
    """Verdicts of all stages in order; `images` are both sides' pictures, (3, H, W) in [0, 1], the worst frame of a video.

    Attributes:
        level: `step`, or `pipeline`: the stages around the loop only.
        dtype: what both sides ran in; float32 is judged in float64, lower ones by each side's error to the truth.
        guards: what keeps agreement on nothing from counting: pictures that show something, prompts that matter.
        metrics: candidate against reference; `to_truth` (low precision) reference and candidate against the truth.
    """

    request: Request
    level: str = STEP
    dtype: str = "float32"
    stages: list[Verdict] = field(default_factory=list)
    guards: list[Verdict] = field(default_factory=list)
    images: tuple[Tensor, Tensor] | None = None
    metrics: Metrics | None = None
    to_truth: tuple[Metrics, Metrics] | None = None
    draws: tuple[list[Drawn], list[Drawn]] = ((), ())  # type: ignore[assignment]
    growth: Growth | None = None
    missing: int = 0  # stages that only one side has
    notes: list[str] = field(default_factory=list)
    reason: str = ""

    @property
    def pixels_changed(self) -> int:
        """Pixels whose 8-bit levels differ."""
        return self.metrics.changed if self.metrics else 0

    @property
    def counts(self) -> dict[str, int]:
        """Stages and guards compared, left out though both sides have them, and had by one side only."""
        every = [*self.stages, *self.guards]
        left_out = sum(v.status == SKIPPED for v in every)
        return {"compared": len(every) - left_out, "skipped": left_out - self.missing, "missing": self.missing}

    @property
    def first_failing(self) -> Verdict | None:
        """The stage where both sides part; a guard where all stages agree."""
        return next((v for v in [*self.stages, *self.guards] if not v.passed), None)

    @property
    def status(self) -> str:
        """The image's verdict, unless a stage or a guard fails or was left out."""
        every = [*self.stages, *self.guards]
        gravest = worst(every)
        if self.reason or gravest is None:
            return SKIPPED
        if not gravest.passed:
            real = worst(v for v in every if not v.passed and v.status != SKIPPED)
            return real.status if real else SKIPPED
        return self.stages[-1].status

    @property
    def passed(self) -> bool:
        return self.status in PASSING

    @property
    def headline(self) -> Verdict | None:
        """The image, or the gravest stage or guard when something fails."""
        return self.stages[-1] if self.stages and self.passed else worst([*self.stages, *self.guards])

    def details(self) -> dict[str, Any]:
        """What parity.json holds of it besides the stages."""
        truth = self.to_truth
        return {
            "level": self.level,
            "dtype": self.dtype,
            "guards": [v.to_json(brief=True) for v in self.guards],
            "metrics": self.metrics.to_json() if self.metrics else None,
            "to_truth": {"reference": truth[0].to_json(), "candidate": truth[1].to_json()} if truth else None,
            "draws": [[d.to_json() for d in side] for side in self.draws],
            "growth": self.growth.to_json() if self.growth else None,
            "notes": self.notes,
        }


@dataclass
class _Runs:
    """One side: as asked, for the other prompt, and the truth (float64, or None where it cannot run)."""

    first: Run
    second: Run
    truth: Run | None
    why: str = ""


def compare_pipelines(
    case: PipelineCase,
    port: Path,
    request: Request,
    *,
    gate: float = GATE,
    dtype: str = "float32",
    level: str = STEP,
) -> PipelineResult:
    """Run `case.reference`, then `case.candidate` on the same port, one in memory at a time, and judge every stage.

    Args:
        dtype: `float32`, `bfloat16` or `float16`, of both sides' weights.
        level: `step`, or `pipeline` for the stages around the loop only.
    """
    result = PipelineResult(request, level, dtype)
    runs = []
    for load, truth in ((case.reference, True), (case.candidate, dtype == "float32")):
        try:
            runs.append(_run(load, port, request, case.other_prompt, getattr(torch, dtype), truth, level == STEP))
        except (RuntimeError, ValueError, TypeError, CheckFailed, OtherDraws) as error:
            text = str(error).splitlines()[0] if str(error) else ""
            result.reason = f"{getattr(load, '__name__', load)} did not run: {type(error).__name__}: {text}"
            return result
    reference, candidate = runs
    result.notes += [why for side in runs if (why := side.why)]
    result.draws = reference.first.draws, candidate.first.draws
    _judge_stages(result, case, reference, candidate, gate)
    _judge_images(result, reference, candidate)
    steps = [v for v in result.stages if re.fullmatch(r"step \d+ latents", v.name) and v.status != SKIPPED]
    result.growth = growth(steps)
    floors = {v.name: v.floor for v in result.stages}
    result.guards += guards.check(reference.first, candidate.first, reference.second, candidate.second, floors, dtype)
    return result


def _run(
    load: Callable[[Path, torch.dtype], PipelineSide],
    port: Path,
    request: Request,
    other_prompt: str,
    dtype: torch.dtype,
    truth: bool,
    steps: bool,
) -> _Runs:
    """All runs of one side, then it is gone from memory."""
    side = load(port, dtype)
    first = run_side(side, request, steps=steps)
    try:
        second = run_side(side, Request(other_prompt, request.seed, request.steps, request.guidance), steps=steps)
    except Exception as error:
        text = f"its second request ended in {type(error).__name__}: {error}"
        raise RuntimeError(text) from error
    runs = _Runs(first, second, None)
    if not truth:
        return runs
    if dtype != torch.float32:
        del side
        gc.collect()
        side = load(port, torch.float32)
    try:
        runs.truth = run_side(side, request, double=True, steps=steps, replay=first.draws)
    except (RuntimeError, ValueError, TypeError) as error:
        runs.why = f"{getattr(load, '__name__', load)} cannot run in float64: {str(error).splitlines()[0]}"
        if dtype != torch.float32:
            runs.truth = run_side(side, request, steps=steps, replay=first.draws)
            runs.why += "; its float32 run is the truth"
    return runs


def _judge_stages(
    result: PipelineResult, case: PipelineCase, reference: _Runs, candidate: _Runs, gate: float
) -> None:
    low = result.dtype != "float32"
    theirs, ours = _stages(reference.first), _stages(candidate.first)
    draws = compare_draws(reference.first.draws, candidate.first.draws, getattr(torch, result.dtype))
    truths = [_stages(side.truth) if side.truth else None for side in (reference, candidate)]
    single = None
    if not low and None in truths:
        single = math.nan if case.baseline is None else case.baseline
    for name, value in theirs.items():
        other = ours.get(name)
        if name == "latents":
            result.stages.append(_steps(reference.first.schedule.steps, candidate.first.schedule.steps))
        if name in draws:
            result.stages.append(draws[name])
        elif other is None and name.startswith(_OWN_WAY):
            result.notes.append(f"{name}: on the reference's side only")
        elif other is None or other.shape != value.shape:
            found = "never seen" if other is None else f"shape {tuple(other.shape)}, reference {tuple(value.shape)}"
            result.stages.append(skipped(name, f"on the candidate's side: {found}"))
            result.missing += other is None
        elif low:
            assert truths[0] is not None  # a reference without any truth did not run
            result.stages.append(judge_low(name, truths[0].get(name, value), value, other))
        else:
            highs = [value if truths[0] is None else truths[0][name], other if truths[1] is None else truths[1][name]]
            if any(h.shape != value.shape for h in highs):
                result.stages.append(skipped(name, "another shape in float64"))
                continue
            event = Event(name, tuple(value.shape), str(value.dtype), value.numel())
            pair = Value(event, value.float().reshape(-1), highs[0].double().reshape(-1))
            casts = "" if value.dtype == other.dtype else f"{value.dtype} there, {other.dtype} here"
            own = other.float().reshape(-1), highs[1].double().reshape(-1)
            result.stages.append(judge(name, pair, *own, gate=gate, casts=casts, single=single))
    result.missing += sum(v.status == SKIPPED for v in draws.values() if v.name in theirs)
    only = [draws[n] for n in draws if n not in theirs] + _only_here(theirs, ours, case.own)
    result.missing += len(only)
    result.stages[-1:-1] = only


def _stages(run: Run) -> dict[str, Tensor]:
    return run.seen | {IMAGE: run.image}


def _steps(theirs: int, ours: int) -> Verdict:
    gap = float(abs(theirs - ours))
    note = f"{theirs} steps there, {ours} here" if gap else ""
    return Verdict("steps", DIFFERS if gap else IDENTICAL, gap, gap, gap, 0, 0, theirs, 1, 1, 1, note=note)


def _only_here(theirs: dict[str, Tensor], ours: dict[str, Tensor], own: tuple[str, ...]) -> list[Verdict]:
    """Steps and inputs that only the candidate has: what the reference computes without cannot be the same."""
    known = {_base(name) for name in theirs}
    found: dict[str, Verdict] = {}
    for name in ours:
        base = _base(name)
        if name in theirs or " -> " in name or "scheduler " in name:
            continue
        if re.fullmatch(r"step \d+ latents", name):
            found[name] = skipped(name, "on the reference's side: never seen")
        elif base not in known and not name.startswith(("draw ", _OWN_WAY)):
            argument = base.rpartition(" ")[2].partition(".")[0]
            if argument not in own:
                found.setdefault(base, skipped(name, f"the reference's gets no {argument}; `own` of the case allows it"))
    return list(found.values())


def _base(name: str) -> str:
    """`step 3 denoiser#1 timestep` -> `denoiser timestep`."""
    return re.sub(r"#\d+ ", " ", re.sub(r"^step \d+ ", "", name))


def _judge_images(result: PipelineResult, reference: _Runs, candidate: _Runs) -> None:
    a, b = reference.first.image, candidate.first.image
    at = 0
    if a.shape == b.shape:
        result.metrics = measure(a, b)
        at = result.metrics.frame
        if result.dtype != "float32" and reference.truth and reference.truth.image.shape == a.shape:
            truth = reference.truth.image
            result.to_truth = measure(truth, a), measure(truth, b)
    result.images = frames(a)[at], frames(b)[at]
