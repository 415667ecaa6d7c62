"""Both sides' runs of a pipeline -> one verdict for each stage, in the reference's order."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from parity.case import PipelineCase
from parity.compare import DIFFERS, IDENTICAL, SKIPPED, Verdict, judge, skipped
from parity.draws import compare_draws, on_grid
from parity.precision import judge_low
from parity.recorder import Event
from parity.stages import Run, Stopped
from parity.trace import Value

IMAGE = "image"
OWN_WAY = "set_timesteps"  # how a side asks its scheduler is its own affair; what comes of it, is not


@dataclass
class Runs:
    """One side: as asked, for the other prompt, for a batch, and the truth (float64, or None where it cannot run)."""

    first: Run
    second: Run | Stopped
    third: Run | Stopped
    truth: Run | None
    why: str = ""


@dataclass
class Judged:
    """Verdicts in order, the image last; how many only one side has; what is no verdict but worth knowing."""

    stages: list[Verdict] = field(default_factory=list)
    missing: int = 0
    notes: list[str] = field(default_factory=list)


def judge_stages(case: PipelineCase, reference: Runs, candidate: Runs, dtype: str, gate: float) -> Judged:
    """Compare the first runs of both sides; their truths are the arbiter (see `Runs`)."""
    result = Judged()
    low = dtype != "float32"
    theirs, ours = _stages(reference.first), _stages(candidate.first)
    draws = compare_draws(reference.first.draws, candidate.first.draws, getattr(torch, dtype))
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
        elif other is None and name.startswith(OWN_WAY):
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
            result.stages.append(_grid(judge(name, pair, *own, gate=gate, casts=casts, single=single), value, other))
    result.missing += sum(v.status == SKIPPED for v in draws.values() if v.name in theirs)
    only = {n: v for n, v in draws.items() if n not in theirs} | _only_here(theirs, ours, case.own)
    result.missing += len(only)
    result.stages = _in_order(result.stages, only, list(ours))
    return result


def _in_order(stages: list[Verdict], only: dict[str, Verdict], ours: list[str]) -> list[Verdict]:
    """`only`, what the candidate alone has, each before the first common stage that follows it there."""
    places = {v.name: i for i, v in enumerate(stages)}
    found: dict[int, list[Verdict]] = {}
    for name, verdict in only.items():
        after = ours[ours.index(name) + 1 :] if name in ours else []
        found.setdefault(next((places[n] for n in after if n in places), len(stages) - 1), []).append(verdict)
    return [v for i, stage in enumerate(stages) for v in (*found.get(i, ()), stage)]


def _grid(verdict: Verdict, theirs: Tensor, ours: Tensor) -> Verdict:
    """A failing stage whose numbers, on one side only, all lie on a coarser dtype's grid says so."""
    grids = on_grid(theirs), on_grid(ours)
    if verdict.passed or grids[0] == grids[1]:
        return verdict
    side = f"the candidate's numbers all lie on {grids[1]}" if grids[1] else f"the reference's all lie on {grids[0]}"
    return replace(verdict, note="; ".join(n for n in (verdict.note, f"{side}'s grid") if n))


def _stages(run: Run) -> dict[str, Tensor]:
    return run.seen | {IMAGE: run.image}


def _steps(theirs: int, ours: int) -> Verdict:
    gap = float(abs(theirs - ours))
    note = f"{theirs} steps there, {ours} here" if gap else ""
    return Verdict("steps", DIFFERS if gap else IDENTICAL, gap, gap, gap, 0, 0, theirs, 1, 1, 1, note=note)


def _only_here(theirs: dict[str, Tensor], ours: dict[str, Tensor], own: tuple[str, ...]) -> dict[str, Verdict]:
    """Steps and inputs that only the candidate has: what the reference computes without cannot be the same."""
    known = {base(name) for name in theirs}
    found: dict[str, Verdict] = {}
    lacking: set[str] = set()
    for name in ours:
        kind = base(name)
        if name in theirs or " -> " in name or "scheduler " in name:
            continue
        if re.fullmatch(r"step \d+ latents", name):
            found[name] = skipped(name, "on the reference's side: never seen")
        elif kind not in known and kind not in lacking and not name.startswith(("draw ", OWN_WAY)):
            argument = kind.rpartition(" ")[2].partition(".")[0]
            if argument not in own:
                lacking.add(kind)
                found[name] = skipped(name, f"the reference's gets no {argument}; `own` of the case allows it")
    return found


def base(name: str) -> str:
    """`step 3 denoiser#1 timestep` -> `denoiser timestep`."""
    return re.sub(r"#\d+ ", " ", re.sub(r"^step \d+ ", "", name))
