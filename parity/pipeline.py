"""A whole pipeline against another: draws, encoders, schedule, every step and the image, without editing either side.

Module calls are seen through hooks, steps through the scheduler, draws through torch's own dispatch. Both sides run
alone: as asked, for another prompt, for a batch of another size, and in float64; in low precision the reference's
float64 run judges both.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parity import pipeline_guards as guards
from parity.case import PipelineCase, PipelineSide
from parity.compare import GATE, PASSING, SKIPPED, Verdict, worst
from parity.draws import Drawn, OtherDraws
from parity.images import Metrics, difference, frames, measure
from parity.pipeline_judge import Runs, judge_stages
from parity.schedule import Growth, growth
from parity.stages import Request, Run, Stopped, run_side
from porter.core.errors import CheckFailed, UsageError

STEP, PIPELINE = "step", "pipeline"


@dataclass
class PipelineResult:
    """Verdicts of all stages in order, and the pictures.

    Attributes:
        images: both sides' pictures (3, H, W) in [0, 1]; of a video, the worst frame.
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
    draws: tuple[list[Drawn], list[Drawn]] = field(default_factory=lambda: ([], []))
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
        """The stage where both sides part; a guard where all stages agree.

        Stages that agree in the first run, and part in float64 only, part because something was kept from run to run
        if a second request already did.
        """
        stage = next((v for v in self.stages if not v.passed), None)
        kept = next((v for v in self.guards if v.name == guards.SECOND and not v.passed), None)
        if kept and stage and stage.max_abs == 0:
            return kept
        return stage or next((v for v in self.guards if not v.passed), None)

    @property
    def status(self) -> str:
        """The image's verdict, unless a stage or a guard fails or was left out."""
        every = [*self.stages, *self.guards]
        gravest = worst(every)
        if self.reason or gravest is None:
            return SKIPPED
        if not gravest.passed:
            real = worst(v for v in every if v.fails)
            return real.status if real else SKIPPED
        return self.stages[-1].status

    @property
    def passed(self) -> bool:
        return self.status in PASSING

    @property
    def headline(self) -> Verdict | None:
        """The image, or the gravest stage or guard when something fails."""
        return self.stages[-1] if self.stages and self.passed else worst([*self.stages, *self.guards])

    def difference(self) -> tuple[Tensor, float] | None:
        """The difference of both pictures (3, H, W), scaled to 1, and its largest value; None without a pair."""
        return difference(*self.images) if self.images and self.metrics else None

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

    Raises:
        UsageError: another dtype or level.
    """
    for what, value, known in (("dtype", dtype, tuple(guards.STATE)), ("level", level, (STEP, PIPELINE))):
        if value not in known:
            raise UsageError(
                f"pipelines have no {what} {value!r}", expected=" | ".join(known), hint="porter parity PORT"
            )
    result = PipelineResult(request, level, dtype)
    asked = request, replace(request, prompt=case.other_prompt), _batch(case, request)
    runs: list[Runs] = []
    for load, truth in ((case.reference, True), (case.candidate, dtype == "float32")):
        gc.collect()  # the other side is gone, and so are its cycles
        try:
            runs.append(_run(load, port, asked, getattr(torch, dtype), truth, level == STEP))
        except Stopped as stop:
            result.reason = f"{getattr(load, '__name__', load)} did not run: {stop}"
            result.reason += guards.until_then(runs[0], runs[0].first, stop, dtype) if runs else ""
            return result
        except (RuntimeError, ValueError, TypeError, CheckFailed, OtherDraws) as error:
            text = next(iter(str(error).splitlines()), "")
            result.reason = f"{getattr(load, '__name__', load)} did not run: {type(error).__name__}: {text}"
            return result
    reference, candidate = runs
    result.notes += [why for side in runs if (why := side.why)]
    result.draws = reference.first.draws, candidate.first.draws
    found = judge_stages(case, reference, candidate, dtype, gate)
    result.stages, result.missing = found.stages, found.missing
    result.notes += found.notes
    _judge_images(result, reference, candidate)
    steps = [v for v in result.stages if re.fullmatch(r"step \d+ latents", v.name) and v.status != SKIPPED]
    result.growth = growth(steps)
    result.guards += guards.check(reference, candidate, asked[2], dtype)
    return result


def _batch(case: PipelineCase, request: Request) -> Request:
    """What one square picture without a negative prompt can't show."""
    more = (request.prompt,)
    steps = min(2, request.steps)
    return replace(request, prompt=case.other_prompt, more=more, steps=steps, part=case.part, negative=case.negative)


def _run(
    load: Callable[[Path, torch.dtype], PipelineSide],
    port: Path,
    asked: tuple[Request, Request, Request],
    dtype: torch.dtype,
    truth: bool,
    steps: bool,
) -> Runs:
    """All runs of one side, then it is gone from memory."""
    side = load(port, dtype)
    request = asked[0]
    first = run_side(side, request, steps=steps)
    second, third = (_try(side, one, steps) for one in asked[1:])
    runs = Runs(first, second, third, None)
    if not truth:
        return runs
    if dtype != torch.float32:
        del side
        gc.collect()
        side = load(port, torch.float32)
    try:
        runs.truth = run_side(side, request, double=True, steps=steps, replay=first.draws)
    except Stopped as stop:
        if isinstance(stop.__cause__, OtherDraws):
            raise stop.__cause__ from None
        runs.why = f"{getattr(load, '__name__', load)} cannot run in float64: {stop}"
        if dtype != torch.float32:
            runs.truth = run_side(side, request, steps=steps, replay=first.draws)
            runs.why += "; its float32 run is the truth"
    return runs


def _try(side: PipelineSide, request: Request, steps: bool) -> Run | Stopped:
    try:
        return run_side(side, request, steps=steps)
    except Stopped as stop:
        return stop


def _judge_images(result: PipelineResult, reference: Runs, candidate: Runs) -> None:
    a, b = reference.first.image, candidate.first.image
    at = 0
    if a.shape == b.shape:
        result.metrics = measure(a, b)
        at = result.metrics.frame
        if result.dtype != "float32" and reference.truth and reference.truth.image.shape == a.shape:
            truth = reference.truth.image
            result.to_truth = measure(truth, a), measure(truth, b)
    result.images = frames(a)[at], frames(b)[at]
