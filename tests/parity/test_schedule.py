"""Schedulers are seen from outside: their calls, what they hold, and how an error grows over their steps."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import retrieve_timesteps
from torch import Tensor

from parity.compare import DIFFERS, ROUNDING, Verdict
from parity.schedule import Schedule, Watcher, differing, growth, numbers_of

# diffusers gives numpy 2 tensors as it wants no more
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def sampled(scheduler: Any, count: int = 4, prepare: bool = True, **options: Any) -> tuple[Schedule, dict[str, Tensor]]:
    """A loop as pipelines write it, with a denoiser that answers half of its input."""
    seen: dict[str, Tensor] = {}
    watcher = Watcher(scheduler, seen.__setitem__, steps=True)
    with watcher.watching() as schedule:
        if prepare:
            retrieve_timesteps(scheduler, count, "cpu", **options)
        x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        for t in scheduler.timesteps:
            watcher.before_model()
            x = scheduler.step(x / 2, t, x).prev_sample
    assert "step" not in vars(scheduler) and "set_timesteps" not in vars(scheduler)
    return schedule, seen


@pytest.mark.parametrize("kind", [DPMSolverMultistepScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler])
def test_the_same_loop_leaves_the_same_state(kind: Any) -> None:
    (a, seen), (b, _) = sampled(kind()), sampled(kind())
    assert a.kind.endswith(kind.__name__) and a.steps == b.steps == 4
    assert list(a.states) == ["first step", "end"] and a.states["first step"]["_step_index"] is None
    assert all(differing(a.states[point], b.states[point], 0.0) == [] for point in a.states)
    names = list(seen)
    assert names[:3] == ["sigmas", "timesteps", "step 0 scheduler model_output"] and names[-1] == "step 3 latents"


def test_what_a_scheduler_is_asked_is_seen() -> None:
    _, seen = sampled(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), None, sigmas=[1.0, 0.5], mu=0.7)
    assert seen["set_timesteps sigmas"].tolist() == [1.0, 0.5] and seen["set_timesteps mu"].item() == 0.7


class Renamed(FlowMatchEulerDiscreteScheduler):
    """A scheduler of one's own, whose arguments have other names."""

    def step(self, prediction: Tensor, t: Tensor, x: Tensor) -> Any:  # type: ignore[override]
        return super().step(prediction, t, x)


def test_a_step_is_seen_whatever_its_arguments_are_called() -> None:
    _, seen = sampled(Renamed(), 2)
    assert torch.equal(seen["step 1 scheduler model_output"], seen["step 0 latents"] / 2)
    assert seen["step 1 scheduler timestep"] == seen["timesteps"][1]


def test_what_changes_the_schedule_after_it_was_set_is_seen() -> None:
    plain, changed = FlowMatchEulerDiscreteScheduler(), FlowMatchEulerDiscreteScheduler()
    changed.set_timesteps(4)
    changed.sigmas = changed.sigmas**2
    known, held = sampled(plain)[1], sampled(changed, prepare=False)[1]
    assert torch.allclose(held["sigmas"], known["sigmas"] ** 2) and "set_timesteps sigmas" not in held


def test_memory_that_a_multistep_scheduler_keeps_is_found() -> None:
    fresh, used = DPMSolverMultistepScheduler(), DPMSolverMultistepScheduler()
    sampled(used)
    a = sampled(fresh)[0].states["first step"]
    kept = list(used.model_outputs)
    used.set_timesteps(4)
    used.model_outputs = kept
    b = sampled(used, prepare=False)[0].states["first step"]
    assert [d.partition(":")[0] for d in differing(a, b, 1e-6)] == ["model_outputs"]
    second = sampled(fresh)[0]  # asked again, it forgets
    assert differing(a, second.states["first step"], 1e-6) == []


def test_differing_attributes_are_named() -> None:
    a = {"n": 1, "x": torch.tensor([1.0, 2.0]), "f": 0.1, "s": "a", "none": None, "only": 1}
    b = {"n": 2, "x": torch.tensor([1.0, 2.1]), "f": 0.1 + 1e-15, "s": "b", "none": 0}
    assert differing(a, b, 1e-6) == ["n: 1 there, 2 here", "x: [1.0, 2.0] of 2 there, [1.0, 2.1] of 2 here",
                                     "s: 'a' there, 'b' here", "none: None there, 0 here"]  # fmt: skip
    assert differing(a, b, 0.2)[1:] == ["s: 'a' there, 'b' here", "none: None there, 0 here"]


@pytest.mark.parametrize(
    ("value", "expected"), [(True, None), (None, None), ("3", None), (2, [2.0]), ([1, 2.5], [1.0, 2.5])]
)
def test_numbers(value: Any, expected: list[float] | None) -> None:
    found = numbers_of(value)
    assert (None if found is None else found.reshape(-1).tolist()) == expected


def steps(status: str, *errors: float, floor: float = 1e-7) -> list[Verdict]:
    return [Verdict(f"step {i} latents", status, e, e, e, floor, floor, 1.0) for i, e in enumerate(errors)]


def test_growth_and_jumps_are_told_apart() -> None:
    grows = growth(steps(DIFFERS, *(1e-3 * 1.5**i for i in range(8))))
    assert grows is not None and grows.jump is None and grows.factor == pytest.approx(1.5) and grows.fit > 0.999
    assert grows.text == "is there at step 0 (1.0e-03) and grows by 1.5 a step to 1.7e-02"
    jumps = growth(steps(DIFFERS, 1e-15, 2e-15, 0.0, 3e-2, 4e-2))
    assert jumps is not None and jumps.jump == 3 and jumps.text == "jumps at step 3, from 0.0e+00 to 3.0e-02"
    assert jumps.factor == pytest.approx(4 / 3)
    passes = growth(steps(ROUNDING, 0.0, 2e-7, 3e-7))
    assert passes is not None and passes.jump is None  # from nothing to the floor is no jump
    none = growth(steps(ROUNDING, 0.0, 0.0))
    assert none is not None and none.text == "no difference at any step" and growth([]) is None
    broken = growth(steps(DIFFERS, 1e-9, math.nan))
    assert broken is not None and broken.jump == 1 and broken.to_json()["errors"] == [1e-9, None]
