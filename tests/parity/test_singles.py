"""Tables that a case's call makes in float32, where no float64 run can see it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from parity.case import Case, Side
from parity.compare import DIFFERS, PRECISION, ROUNDING
from parity.outcome import reason_of
from parity.own import compare_case

pytestmark = pytest.mark.slow

STEPS = 1 / 10000 ** (np.arange(4) / 4)
IMPORTED = torch.outer(torch.arange(5, dtype=torch.float32), torch.from_numpy(STEPS).float())


class Turned(nn.Module):
    """x (B, 5, 4) by a table of angles (5, 4) -> (B, 5, 4)."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        y = self.a(x)
        cos, sin = angles.cos().to(y.dtype), angles.sin().to(y.dtype)
        one, two = y.chunk(2, -1)
        out: Tensor = self.b(torch.cat([one * cos - two * sin, one * sin + two * cos], -1))
        return out


def call(angles: Callable[[], Tensor]) -> Callable[[Any, Any], Any]:
    return lambda m, x: m(x["x"], angles())


def exact() -> Tensor:
    return torch.outer(torch.arange(5, dtype=torch.float64), torch.from_numpy(STEPS))


case = Case(Side(Turned, call(exact)), Side(Turned, call(exact)), lambda c, d: {"x": d("x", 2, 5, 4)})


@pytest.mark.parametrize(
    "angles",
    [
        lambda: torch.outer(torch.arange(5) * 1.0, 1 / 10000 ** (torch.arange(4) / 4)),
        lambda: torch.outer(torch.arange(5, dtype=torch.float32), torch.tensor(STEPS, dtype=torch.float32)),
        lambda: exact().float(),
    ],
)
def test_what_torch_computes_in_float32_follows_the_run(angles: Callable[[], Tensor]) -> None:
    assert compare_case(replace(case, candidate=Side(Turned, call(angles)))).status == ROUNDING


@pytest.mark.parametrize(
    "angles",
    [
        lambda: torch.from_numpy(np.outer(np.arange(5, dtype=np.float32), STEPS.astype(np.float32))),
        lambda: torch.FloatTensor(np.outer(np.arange(5), STEPS)),
        lambda: IMPORTED,
    ],
)
def test_what_was_made_in_float32_is_lost_precision_that_can_be_accepted(angles: Callable[[], Tensor]) -> None:
    for side in ("candidate", "reference"):
        low = replace(case, **{side: Side(Turned, call(angles))})
        result = compare_case(low)
        assert result.status == PRECISION, reason_of(result)
        assert f"the {side} computes with numbers that were made in float32" in reason_of(result)
        assert compare_case(replace(low, baseline=1e-6)).status == ROUNDING
        assert compare_case(replace(low, baseline=1e-10)).status == PRECISION


def test_a_fault_beside_such_a_table_stays_a_difference() -> None:
    def spoil(m: Any) -> None:
        m.b.bias.data[1] += 1e-4

    low = replace(case, candidate=Side(Turned, call(lambda: IMPORTED)), baseline=1e-6)
    result = compare_case(low, edit=spoil)
    assert result.status == DIFFERS and ("b", False) in {(f.candidate, f.step) for f in result.faults}

    def slightly(m: Any) -> None:
        m.b.bias.data[1] += 2e-7

    small = compare_case(low, edit=slightly)  # below the rounding of such a table, but in a module that stands alone
    assert small.status == DIFFERS, small.status
