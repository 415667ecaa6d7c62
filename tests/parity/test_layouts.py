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


class Grid(nn.Module):
    """A table for each axis; takes tokens (B, T, H, D) for their shape alone -> (B, T, H, D)."""

    def __init__(self, flat: bool) -> None:
        super().__init__()
        self.rows, self.columns, self.flat = nn.Parameter(torch.zeros(5, 6)), nn.Parameter(torch.zeros(5, 6)), flat

    def forward(self, x: Tensor) -> Tensor:
        t, h = x.shape[-3:-1] if not self.flat else x.shape[-2:]
        places = (self.rows[:t, None] + self.columns[:h]).expand(x.shape[0], -1, -1, -1)
        return places.flatten(1, 2) if self.flat else places


class Frames(nn.Module):
    """x (B, C, T, H) -> (B, T, H, 3), tokens (B, T, H, D), the last layer on frames (B * T, H, D)."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.up, self.grid, self.down = nn.Linear(4, 6), Grid(False), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x.movedim(1, -1))
        y = torch.sin(y + self.grid(y))
        return self.down(y.flatten(0, 1)).unflatten(0, x.shape[:1] + x.shape[2:3])


class Tokens(nn.Module):
    """The same with tokens (B, T * H, D); the tables get the picture itself."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.up, self.grid, self.down = nn.Linear(4, 6), Grid(True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x.movedim(1, -1).flatten(1, 2))
        return self.down(torch.sin(y + self.grid(x))).unflatten(1, x.shape[2:])


grid = Case(Side(Frames), Side(Tokens), lambda config, draw: {"x": draw("x", 2, 4, 3, 3)})


@pytest.mark.parametrize("seed", range(4))
def test_tables_that_take_a_shape_and_neighbours_cut_otherwise_are_compared(seed: int) -> None:
    result = compare_case(grid, seed=seed)
    assert result.passed and not result.faults, reason_of(result)
    assert any("grid ↔ grid gets something else" in note for note in result.notes)
    taps = {(t.module, t.kind): t.free for t in result.taps}
    assert taps["grid", "out"].elements == 2 * 9 * 6 and taps["down", "in"].elements == 2 * 9 * 6


def test_a_table_that_is_wrong_is_found_whatever_it_takes() -> None:
    def planted(m: Any) -> None:
        m.grid.columns.data[1] = m.grid.columns.data[2]

    result = compare_case(grid, edit=planted)
    assert result.guilty is not None and result.guilty.candidate == "grid", reason_of(result)


def test_an_input_of_another_shape_that_is_used_is_not_passed_over() -> None:
    class Mean(Grid):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1e-9 * x.mean()

    class Port(Tokens):
        def __init__(self, config: Mapping[str, Any]) -> None:
            super().__init__(config)
            self.grid = Mean(True)

    result = compare_case(Case(Side(Frames), Side(Port), grid.inputs))
    assert not result.passed


def test_what_could_not_be_compared_before_a_fault_is_named_with_it() -> None:
    class Modulated(nn.Module):
        """x (B, L, 4), t (B, L) -> (B, L, 4): each token has a time of its own."""

        def __init__(self, config: Mapping[str, Any]) -> None:
            super().__init__()
            self.time, self.out = nn.Linear(1, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.out(x * self.time(t.flatten()[:, None]).unflatten(0, t.shape))

    class Once(Modulated):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.out(x * self.time(t[:, :1])[:, None])

    result = compare_case(
        Case(Side(Modulated), Side(Once), lambda c, draw: {"x": draw("x", 2, 5, 4), "t": draw("t", 2, 5)})
    )
    assert not result.passed and result.guilty is not None
    assert "before it time could not be compared: shape (2, 1), reference (10, 1)" in result.guilty.why
