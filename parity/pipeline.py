"""A whole pipeline against another: encoders, noise, schedule, every step and the image, without editing either side.

Module calls are seen through hooks, steps through the scheduler; both sides run alone, in float32 and in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from parity.case import PipelineCase, PipelineSide
from parity.compare import DIFFERS, GATE, PASSING, SKIPPED, Verdict, judge, skipped, worst
from parity.recorder import Event, bind, float64, tensors_of
from parity.trace import Value

Stages = dict[str, Tensor]


@dataclass(frozen=True)
class Request:
    """What both sides are asked for."""

    prompt: str
    seed: int
    steps: int
    guidance: float


@dataclass
class PipelineResult:
    """Verdicts of all stages in order; `images` are both sides' pictures, (3, H, W) in [0, 1]."""

    request: Request
    stages: list[Verdict] = field(default_factory=list)
    images: tuple[Tensor, Tensor] | None = None
    pixels_changed: int = 0
    missing: int = 0  # stages that only one side has
    reason: str = ""

    @property
    def counts(self) -> dict[str, int]:
        """Stages compared, left out though both sides have them, and had by one side only."""
        left_out = sum(v.status == SKIPPED for v in self.stages)
        return {
            "compared": len(self.stages) - left_out,
            "skipped": left_out - self.missing,
            "missing": self.missing,
        }

    @property
    def first_failing(self) -> Verdict | None:
        """The stage where both sides part."""
        return next((v for v in self.stages if not v.passed), None)

    @property
    def status(self) -> str:
        """The image's verdict, unless a stage fails or was left out."""
        gravest = worst(self.stages)
        if self.reason or gravest is None:
            return SKIPPED
        if not gravest.passed:
            real = worst(v for v in self.stages if not v.passed and v.status != SKIPPED)
            return real.status if real else SKIPPED
        return self.stages[-1].status

    @property
    def passed(self) -> bool:
        return self.status in PASSING

    @property
    def headline(self) -> Verdict | None:
        """The image, or the gravest stage when something fails."""
        return self.stages[-1] if self.stages and self.passed else worst(self.stages)


def compare_pipelines(case: PipelineCase, port: Path, request: Request, *, gate: float = GATE) -> PipelineResult:
    """Run `case.reference`, then `case.candidate` on the same port, one in memory at a time, and judge every stage."""
    result = PipelineResult(request)
    runs: list[tuple[Stages, Stages]] = []
    for load in (case.reference, case.candidate):
        try:
            runs.append(_run(load, port, request))
        except (RuntimeError, ValueError, TypeError) as error:
            result.reason = f"{getattr(load, '__name__', load)} did not run: {type(error).__name__}: {error}"
            return result
    (ref32, ref64), (own32, own64) = runs
    for name, low in ref32.items():
        high = ref64[name]
        if name not in own32 or own32[name].shape != low.shape or own64[name].shape != low.shape:
            found = f"shape {tuple(own32[name].shape)}, reference {tuple(low.shape)}" if name in own32 else "never seen"
            result.stages.append(skipped(name, f"on the candidate's side: {found}"))
            result.missing += name not in own32
            continue
        low32, high64 = low.float().reshape(-1), high.double().reshape(-1)
        value = Value(Event(name, tuple(low.shape), str(low.dtype), low.numel()), low32, high64)
        casts = "" if low.dtype == own32[name].dtype else f"{low.dtype} there, {own32[name].dtype} here"
        mine = own32[name].float().reshape(-1), own64[name].double().reshape(-1)
        result.stages.append(judge(name, value, *mine, gate=gate, casts=casts))
    # Inputs that only the candidate has (a table computed ahead) are its own affair; another number of steps is not.
    for name in [n for n in own32 if n.endswith(" latents") and n not in ref32]:
        result.stages.insert(-1, skipped(name, "on the reference's side: never seen"))
        result.missing += 1
    left, right = ref32["image"][0], own32["image"][0]
    result.images = (left, right)
    if left.shape == right.shape:
        result.pixels_changed = int(((left * 255).round() != (right * 255).round()).any(0).sum())
    if float(left.float().std()) < 1e-3:
        result.stages.append(Verdict("image", DIFFERS, note="the reference's image is flat: nothing was compared"))
    return result


@torch.no_grad()
def _run(load: Callable[[Path], PipelineSide], port: Path, request: Request) -> tuple[Stages, Stages]:
    """One side in float32 and in float64, then gone from memory."""
    side = load(port)
    runs = []
    for double in (False, True):
        seen: Stages = {}
        with ExitStack() as stack:
            if double:
                stack.enter_context(float64(*side.weights))
            for name, module in side.stages.items():
                stack.enter_context(_watch(name, module, seen))
            stack.enter_context(_watch_steps(side.scheduler, seen))
            image = side.run(request.prompt, request.seed, request.steps, request.guidance)
        seen["sigmas"] = torch.as_tensor(side.scheduler.sigmas).clone()
        seen["timesteps"] = torch.as_tensor(side.scheduler.timesteps).clone()
        runs.append(_ordered(seen) | {"image": image.detach().cpu().clone()})
    return runs[0], runs[1]


def _ordered(seen: Stages) -> Stages:
    """Schedule before the first denoising call; everything else as it happened."""
    schedule = {k: seen.pop(k) for k in ("sigmas", "timesteps")}
    at = next((i for i, k in enumerate(seen) if k.startswith("step ")), len(seen))
    items = list(seen.items())
    return dict([*items[:at], *schedule.items(), *items[at:]])


@contextmanager
def _watch(name: str, module: nn.Module, seen: Stages) -> Iterator[None]:
    """Keep what a stage's module receives and returns; a module called once a step is numbered."""
    calls = -1

    def label(what: str) -> str:
        return f"step {calls} {name} {what}" if name == "denoiser" else f"{name} {what}"

    def enter(m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal calls
        calls += 1
        for key, tensor in tensors_of(bind(m, args, kwargs), integers=True):
            seen[label(key)] = tensor.detach().clone()

    def leave(m: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        for key, tensor in tensors_of(out, integers=True):
            seen[label(f"-> {key}")] = tensor.detach().clone()

    handles = [module.register_forward_pre_hook(enter, with_kwargs=True), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _watch_steps(scheduler: Any, seen: Stages) -> Iterator[None]:
    """Keep the latents after every `scheduler.step`."""
    step, count = scheduler.step, 0

    def watched(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        out = step(*args, **kwargs)
        latents = out[0] if isinstance(out, tuple) else out.prev_sample
        seen[f"step {count} latents"] = latents.detach().clone()
        count += 1
        return out

    scheduler.step = watched
    try:
        yield
    finally:
        del scheduler.step
