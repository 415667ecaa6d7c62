"""A scheduler's calls, its state between them, and how the error grows from step to step."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from parity.compare import Verdict

JUMP = 100.0  # an error this many times that of the step before it did not grow: something happened there
SMALLEST = 1e-15  # scaled errors below are the rounding of float64
_HINT = ("_begin_index",)  # where to start looking for the first step: another way to the same answer


@dataclass
class Schedule:
    """What a scheduler was asked and held in one run.

    Attributes:
        kind: the class, with its module.
        states: `first step`, `end` (with a number from the second schedule on) -> plain attributes at that point.
        steps: how often it stepped.
    """

    kind: str = ""
    states: dict[str, dict[str, Any]] = field(default_factory=dict)
    steps: int = 0


def numbers_of(value: Any) -> Tensor | None:
    """A number, a list of numbers, an array or a tensor as a tensor; None for anything else."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if (
        isinstance(value, (bool, str))
        or value is None
        or (isinstance(value, (list, tuple)) and any(v is None for v in value))
    ):
        return None
    try:
        return torch.from_numpy(np.asarray(value, dtype=np.float64).copy())
    except (TypeError, ValueError):
        return None


def state_of(scheduler: Any) -> dict[str, Any]:
    """Its plain attributes: numbers, texts, lists of them, tensors (as float64 on the CPU)."""
    found: dict[str, Any] = {}
    for name, value in vars(scheduler).items():
        if name in _HINT or callable(value) or isinstance(value, Mapping):
            continue
        tensor = numbers_of(value)
        if tensor is not None and isinstance(value, (Tensor, np.ndarray, list, tuple)):
            found[name] = tensor.double().cpu()
        elif value is None or isinstance(value, (bool, int, float, str)):
            found[name] = value
        elif isinstance(value, (list, tuple)):  # a multistep scheduler's memory: tensors and gaps
            found[name] = [None if (t := numbers_of(v)) is None else t.double().cpu() for v in value]
    return found


def differing(reference: Mapping[str, Any], candidate: Mapping[str, Any], tolerance: float) -> list[str]:
    """Attributes that both states have and that differ: `_step_index: None there, 8 here`.

    Args:
        tolerance: largest scaled difference between tensors that counts as equal.
    """
    return [
        f"{name}: {_short(reference[name])} there, {_short(candidate[name])} here"
        for name in reference
        if name in candidate and not _alike(reference[name], candidate[name], tolerance)
    ]


def _alike(a: Any, b: Any, tolerance: float) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.shape != b.shape or not a.numel():
            return a.shape == b.shape
        return torch.allclose(b, a, rtol=0, atol=tolerance * max(1.0, float(a.abs().max())), equal_nan=True)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(_alike(x, y, tolerance) for x, y in zip(a, b, strict=True))
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=max(tolerance, 1e-12), abs_tol=tolerance) or (a != a and b != b)
    return type(a) is type(b) and bool(a == b)


def _short(value: Any) -> str:
    if isinstance(value, Tensor):
        flat = value.reshape(-1)
        return f"{[round(float(x), 5) for x in flat[:3]]}{'…' if flat.numel() > 3 else ''} of {flat.numel()}"
    return f"{len(value)} entries" if isinstance(value, list) else repr(value)


class Watcher:
    """Sees the calls of one scheduler: `set_timesteps` with its arguments, the schedule as the first step finds it,
    what each step gets and returns.

    Args:
        scheduler: any object with `step`; `set_timesteps`, `sigmas` and `timesteps` where it has them.
        sink: name -> tensor, in order.
        steps: whether single steps go to the sink, or only the latents after the last one (`latents`).
    """

    def __init__(self, scheduler: Any, sink: Callable[[str, Tensor], None], steps: bool) -> None:
        self.scheduler, self._sink, self._steps = scheduler, sink, steps
        kind = type(scheduler)
        self.result = Schedule(f"{kind.__module__}.{kind.__qualname__}")
        self._schedules, self._pending = 0, False

    @property
    def _number(self) -> str:
        return f" {self._schedules}" if self._schedules > 1 else ""

    def before_model(self) -> None:
        """The denoiser is about to run: the schedule is what it is now, whoever changed it after `set_timesteps`."""
        if self._pending or not self._schedules:
            self._schedules = max(1, self._schedules)
            self._pending = False
            for name in ("sigmas", "timesteps"):
                if (held := numbers_of(getattr(self.scheduler, name, None))) is not None:
                    self._sink(f"{name}{self._number}", held)
            self.result.states[f"first step{self._number}"] = state_of(self.scheduler)

    @contextmanager
    def watching(self) -> Iterator[Schedule]:
        """Look on inside the block; the scheduler is as before afterwards."""
        wrapped = {"step": self._step, "set_timesteps": self._set_timesteps}
        wrapped = {name: wrap for name, wrap in wrapped.items() if hasattr(self.scheduler, name)}
        for name, wrap in wrapped.items():
            setattr(self.scheduler, name, wrap(getattr(self.scheduler, name)))
        try:
            yield self.result
            self._close()
        finally:
            for name in wrapped:
                delattr(self.scheduler, name)

    def _close(self) -> None:
        if self._schedules:
            self.result.states[f"end{self._number}"] = state_of(self.scheduler)

    def _set_timesteps(self, original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)

        @functools.wraps(original)  # pipelines read its signature
        def call(*args: Any, **kwargs: Any) -> Any:
            self._close()
            self._schedules, self._pending = self._schedules + 1, True
            for name, value in signature.bind(*args, **kwargs).arguments.items():
                given = numbers_of(value) if name != "device" else None
                if given is not None and name != "num_inference_steps":  # implied where sigmas are given
                    self._sink(f"set_timesteps{self._number} {name}", given)
            return original(*args, **kwargs)

        return call

    def _step(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            self.before_model()
            given = dict(zip(("model_output", "timestep"), args, strict=False)) | kwargs  # whatever it calls them
            at = self.result.steps
            for name in ("model_output", "timestep") if self._steps else ():
                if (tensor := numbers_of(given.get(name))) is not None:
                    self._sink(f"step {at} scheduler {name}", tensor)
            out = original(*args, **kwargs)
            latents = out[0] if isinstance(out, tuple) else out.prev_sample
            self._sink(f"step {at} latents" if self._steps else "latents", latents.detach().clone())
            self.result.steps += 1
            return out

        return call


@dataclass(frozen=True)
class Growth:
    """The error of the latents from step to step, scaled by max(1, peak).

    Attributes:
        errors: one a step: in float64 where something fails, otherwise in the run's own precision.
        factor: growth a step, from the line through the logarithms, without the part before a jump.
        fit: share of the logarithms' variance that the line explains (1: exponential growth).
        jump: the step where it rises more than `JUMP` times at once; None where it does not.
        text: the same in words.
    """

    errors: tuple[float, ...]
    factor: float
    fit: float
    jump: int | None
    text: str

    def to_json(self) -> dict[str, Any]:
        """Plain data; numbers that are not finite become None."""
        numbers = {"factor": self.factor, "fit": self.fit}
        plain = {k: float(f"{v:.4g}") if math.isfinite(v) else None for k, v in numbers.items()}
        errors = [float(f"{e:.4g}") if math.isfinite(e) else None for e in self.errors]
        return {"errors": errors, **plain, "jump": self.jump, "text": self.text}


def growth(steps: Sequence[Verdict]) -> Growth | None:
    """How the error of the latents grows over the `step … latents` verdicts in order; None without any."""
    if not steps:
        return None
    exact = any(not v.passed for v in steps) and all(math.isfinite(v.max_abs64) for v in steps)
    errors = [(v.max_abs64 if exact else v.max_abs) / max(1.0, v.peak) for v in steps]
    known = [e if math.isfinite(e) else 1.0 for e in errors]
    noise = [SMALLEST if exact or not v.floor > 0 else v.floor / max(1.0, v.peak) for v in steps]
    logs = np.log(np.maximum(known, noise))
    rises = np.diff(logs)
    jump = int(rises.argmax()) + 1 if len(rises) and rises.max() > math.log(JUMP) else None
    tail = logs[jump or 0 :]
    slope, fit = _line(tail)
    factor = math.exp(slope)
    if not any(known):
        text = "no difference at any step"
    elif jump is not None:
        text = f"jumps at step {jump}, from {known[jump - 1]:.1e} to {known[jump]:.1e}"
    elif exact and len(known) > 1:
        text = f"is there at step 0 ({known[0]:.1e}) and grows by {factor:.2g} a step to {known[-1]:.1e}"
    else:
        text = f"{known[0]:.1e} at step 0, {known[-1]:.1e} after the last ({factor:.2g} a step)"
    return Growth(tuple(errors), factor, fit, jump, text)


def _line(logs: np.ndarray) -> tuple[float, float]:
    """Slope of the least-squares line, and the share of the variance that it explains."""
    if len(logs) < 2:
        return 0.0, math.nan
    at = np.arange(len(logs))
    slope, offset = np.polyfit(at, logs, 1)
    spread = float(((logs - logs.mean()) ** 2).sum())
    left = float(((logs - (slope * at + offset)) ** 2).sum())
    return float(slope), 1 - left / spread if spread else math.nan
