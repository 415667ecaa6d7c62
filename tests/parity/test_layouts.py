"""Activations that both sides lay out differently."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from parity.case import Case, Draw, Side
from parity.outcome import reason_of
from parity.own import compare_case


class Packed(nn.Module):
    """Tokens (B, L, 6) of which `mask` (B, 1, 1, L) shows some, one sequence behind the other -> (B, 8)."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(6, 8), nn.RMSNorm(4), nn.Linear(8, 8)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        shown = mask[:, 0, 0]
        y = self.norm(self.up(x[shown][None]).unflatten(-1, (2, 4))).flatten(2)  # (1, all shown, 8)
        parts = F.gelu(self.down(y))[0].split(shown.sum(1).tolist())
        return torch.stack([part.sum(0) for part in parts])


class Padded(Packed):
    """The same on all tokens; the hidden ones are left out at the end."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.norm(self.up(x).unflatten(-1, (2, 4)).transpose(1, 2)).transpose(1, 2).flatten(2)  # (B, L, 8)
        return (F.gelu(self.down(y)) * mask[:, 0, 0, :, None]).sum(1)


def inputs(config: Mapping[str, Any], draw: Draw) -> dict[str, Tensor]:
    shown = torch.arange(7) < torch.tensor([[7], [4]])
    return {"x": draw("x", 2, 7, 6), "mask": shown[:, None, None]}


case = Case(Side(Packed), Side(Padded), inputs)


def test_packed_tokens_are_compared_with_padded_ones() -> None:
    result = compare_case(case)
    assert result.passed, reason_of(result)
    assert result.counts["skipped"] == 0
    assert all(tap.reset is not None and tap.reset.passed for tap in result.taps)


@pytest.mark.parametrize("name", ["up", "norm", "down"])
def test_a_fault_behind_the_mask_is_found(name: str) -> None:
    result = compare_case(case, edit=lambda m: m.get_submodule(name).weight.data[1].mul_(1.01))
    assert not result.passed and [fault.reference for fault in result.faults] == [name]


def test_another_choice_of_tokens_is_found() -> None:
    class Other(Padded):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return super().forward(x.flip(1), mask)

    result = compare_case(Case(case.reference, Side(Other), inputs))
    assert not result.passed and result.faults[0].reference == "up" and result.faults[0].step


class Free(nn.Module):
    """Tokens (B, L, 6) -> (B, L, 8)."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(6, 8), nn.RMSNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(F.gelu(self.norm(self.up(x))))
        return out


class Filled(Free):
    """The same with tokens of its own around them."""

    before, behind = 0, 3

    def forward(self, x: Tensor) -> Tensor:
        filled = F.pad(x, (0, 0, self.before, self.behind), value=1.0)
        return super().forward(filled)[:, self.before : self.before + x.shape[1]]


class Led(Filled):
    before, behind = 4, 0


@pytest.mark.parametrize("padded", [Filled, Led])
def test_tokens_padded_to_a_fixed_number_are_compared(padded: type[Filled]) -> None:
    filled = Case(Side(Free), Side(padded), lambda c, draw: {"x": draw("x", 2, 5, 6)})
    result = compare_case(filled)
    assert result.passed and result.counts["skipped"] == 0, reason_of(result)
    assert all(tap.reset is not None and tap.reset.passed for tap in result.taps)
    result = compare_case(filled, edit=lambda m: m.norm.weight.data[1].mul_(1.01))
    assert not result.passed and [fault.reference for fault in result.faults] == ["norm"]
