"""Verdicts: what counts as rounding, what as a difference, and what is never a pass."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from parity.arbiter import cast_disagreement
from parity.compare import (
    DIFFERS,
    IDENTICAL,
    OVER,
    PRECISION,
    ROUNDING,
    SKIPPED,
    Verdict,
    judge,
    judge_lossy,
    skipped,
    worst,
)  # fmt: skip
from parity.precision import judge_low
from parity.recorder import Event
from parity.trace import Value

EXACT = torch.linspace(-2, 2, 50, dtype=torch.float64).sin()


def reference(noise: float = 1e-7, exact: Tensor = EXACT) -> Value:
    low = (exact + noise * torch.cos(torch.arange(50.0).double())).float()
    return Value(Event("p/m#0.out.0", (5, 10), "float32", 50), low, exact)


def candidate(fault: float = 0.0, noise: float = 1e-7) -> tuple[Tensor, Tensor]:
    high = EXACT + fault * torch.sin(7 * torch.arange(50.0).double())
    return (high + noise * torch.sin(torch.arange(50.0).double())).float(), high


def test_identical() -> None:
    value = reference()
    assert judge("x", value, value.low, value.high).status == IDENTICAL


def test_rounding_passes_and_carries_its_floor() -> None:
    verdict = judge("x", reference(), *candidate())
    assert verdict.status == ROUNDING and verdict.passed and 0 < verdict.floor < 1e-6 and 0 < verdict.ratio < 5


@pytest.mark.parametrize("fault", [1e-6, 3e-5, 6.8e-4])
def test_a_fault_far_under_the_gate_differs(fault: float) -> None:
    verdict = judge("x", reference(), *candidate(fault))
    assert verdict.status == DIFFERS and not verdict.passed and verdict.max_abs < 1e-3 and verdict.cosine > 0.999


def test_a_fault_below_the_float32_noise_still_differs() -> None:
    """Float32 alone could not see it: it is twenty times smaller than both sides' own noise."""
    verdict = judge("x", reference(1e-6), *candidate(5e-8, noise=1e-6))
    assert verdict.status == DIFFERS and verdict.max_abs64 < verdict.floor


def test_over_the_gate_names_the_worst_element() -> None:
    value = reference()
    low = value.low.clone()
    low[37] += 0.5
    verdict = judge("x", value, low, low.double())
    assert verdict.status == OVER and verdict.worst == (3, 7)


def test_the_gate_is_scaled_by_the_reference() -> None:
    value = reference(exact=EXACT * 1e4)
    high = value.high + 2e-2 * torch.ones(50).double()
    assert judge("x", value, high.float(), high).status == DIFFERS  # 2e-2 at 1e4: inside the fence, and still real


def test_lost_precision_needs_a_cast_and_more_noise() -> None:
    noisy = candidate(noise=5e-6)
    assert judge("x", reference(), *noisy, casts="float32 there, float64 here").status == PRECISION
    assert judge("x", reference(), *noisy).status == ROUNDING
    assert judge("x", reference(), *candidate(), casts="float32 there, float64 here").status == ROUNDING


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_not_finite_is_never_a_pass(bad: float) -> None:
    low, high = candidate()
    low[3] = bad
    assert judge("x", reference(), low, high).status == DIFFERS


def test_other_shapes_and_nothing_at_all_are_not_compared() -> None:
    low, high = candidate()
    assert judge("x", reference(), low[:-1], high[:-1]).status == SKIPPED
    empty = Value(Event("e", (0,), "float32", 0), torch.empty(0), torch.empty(0).double())
    assert judge("x", empty, torch.empty(0), torch.empty(0).double()).status == SKIPPED


def test_worst_prefers_what_fails() -> None:
    order = [judge("a", reference(), *candidate()), judge("b", reference(), *candidate(3e-5)), skipped("c", "why")]
    assert worst(order[:2]) is order[1] and worst(order) is order[2] and worst([]) is None
    assert not any(v.passed for v in order[1:])


def test_json_has_no_nan() -> None:
    data = skipped("c", "why").to_json()
    assert data["max_abs"] is None and data["passed"] is False and data["note"] == "why"
    assert Verdict("x", IDENTICAL, max_abs=0.0, noise_reference=0.0, noise_candidate=0.0).ratio == 0.0


def test_cast_disagreement_looks_below_each_module() -> None:
    theirs = {"pe": ["float32"], "block": ["float32"]}
    ours = {"rope": ["float32"], "rope.table": ["float64"], "block": ["float32"]}
    found = cast_disagreement(theirs, ours, {"pe": "rope", "block": "block", "": ""})
    assert set(found) == {"pe", ""} and "float64" in found["pe"]


@pytest.mark.parametrize("where", ["everywhere", "in one place"])
def test_lossy_runs_of_modules_and_of_pipelines_are_judged_alike(where: str) -> None:
    """The same losses, from far below to far above the reference's own, give the same verdict."""
    truth = torch.randn(4096, generator=torch.Generator().manual_seed(0)).double()
    reference = truth.bfloat16()
    lost = (reference.double() - truth).abs()
    noise = torch.randn(4096, generator=torch.Generator().manual_seed(1))
    found = set()
    for factor in (0.1, 0.5, 1.0, 1.5, 1.9, 2.5, 4.0, 16.0, 256.0):
        error = noise * lost.square().mean().sqrt() * factor
        if where == "in one place":
            error = torch.where(torch.arange(4096) == 7, 16 * factor * lost.max(), 0.0)
        candidate = truth + error
        event = Event("x", (4096,), "float32", 4096)
        event.losses["bfloat16"] = [float(lost.max()), float(lost.square().mean().sqrt())]
        value = Value(event, truth.float(), truth)
        pair = (
            judge_lossy("x", value, candidate.float(), "bfloat16").status,
            judge_low("x", truth, reference, candidate.to(torch.float32)).status,
        )
        assert pair[0] == pair[1], (factor, pair)
        found.add(pair[0])
    assert found == {ROUNDING, PRECISION}


# --- lossy dtypes ----------------------------------------------------------------------------------------------------


NORMAL = torch.randn(50, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).reshape(-1)


def lossy(losses: list[float]) -> Value:
    event = Event("p/m#0.out.0", (50, 40), "float32", 2000)
    event.losses["bfloat16"] = losses
    return Value(event, NORMAL.float(), NORMAL)


def losing(times: float) -> Tensor:
    """`times` what storing the numbers in bfloat16 loses."""
    return NORMAL + times * (NORMAL.bfloat16().double() - NORMAL)


STORED = [float((losing(1) - NORMAL).abs().max()), float((losing(1) - NORMAL).square().mean().sqrt())]


@pytest.mark.parametrize(("losses", "times", "status"), [
    (STORED, 1.0, ROUNDING), (STORED, 1.9, ROUNDING), (STORED, 3.0, PRECISION), (STORED, 100.0, PRECISION),
    ([0.0, 0.0], 1.0, ROUNDING), ([0.0, 0.0], 0.0, IDENTICAL), ([0.0, 0.0], 3.0, PRECISION),
    ([x * 4 for x in STORED], 7.0, ROUNDING), ([x * 4 for x in STORED], 12.0, PRECISION),
])  # fmt: skip
def test_a_candidate_may_lose_twice_what_the_reference_loses(losses: list[float], times: float, status: str) -> None:
    verdict = judge_lossy("x", lossy(losses), losing(times), "bfloat16")
    assert verdict.status == status and verdict.passed == (status != PRECISION)


@pytest.mark.parametrize("losses", [STORED, [math.nan, math.nan], [math.inf, math.inf]])
def test_numbers_that_are_not_finite_in_a_lossy_run_of_any_side_differ(losses: list[float]) -> None:
    broken = losing(1)
    broken[3] = math.nan
    verdict = judge_lossy("x", lossy(losses), broken, "bfloat16")
    assert verdict.status == DIFFERS and "1 of 2000 elements of the candidate" in verdict.note
    alone = judge_lossy("x", lossy(losses), losing(1), "bfloat16")
    finite = math.isfinite(losses[0])
    assert (alone.status == ROUNDING) == finite and ("in the reference's run in bfloat16" in alone.note) != finite


def test_a_dtype_that_the_reference_never_ran_in_is_not_compared() -> None:
    assert judge_lossy("x", lossy(STORED), losing(1), "float16").status == SKIPPED
