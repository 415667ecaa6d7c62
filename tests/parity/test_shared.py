"""Modules that are registered at several places, and weights that several modules share."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from parity.case import Case, Draw, Side
from parity.compare import PASSING
from parity.outcome import reason_of
from parity.own import compare_case


class Shared(nn.Module):
    """One layer at its own place and in each block."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.embed, self.shared, self.out = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.blocks = nn.ModuleList(nn.ModuleDict({"own": nn.Linear(8, 8), "mix": self.shared}) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block["mix"](block["own"](x).sin())  # type: ignore[index]
        out: Tensor = self.out(self.shared(x))
        return out


class Elsewhere(Shared):
    """The same, where the block's place is the first."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        shared = self.shared
        del self.shared
        self.last = shared


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("shared.", "last."): tensor for name, tensor in state.items()}


def given(config: Any, draw: Draw) -> dict[str, Tensor]:
    return {"x": draw("x", 2, 3, 4)}


def test_one_module_at_several_places_is_compared_at_each_call() -> None:
    result = compare_case(Case(Side(Shared), Side(Shared), given))
    assert result.status in PASSING, reason_of(result)
    assert sum(tap.module == "shared" and tap.key.startswith("forward/") for tap in result.taps) == 6

    class Renamed(Elsewhere):
        def forward(self, x: Tensor) -> Tensor:
            object.__setattr__(self, "shared", self.last)
            return super().forward(x)

    case = Case(Side(Shared), Side(Renamed), given, renamed)
    assert compare_case(case).status in PASSING

    def spoil(m: Any) -> None:
        m.last.bias.data[1] += 0.01

    wrong = compare_case(case, edit=spoil)
    assert wrong.guilty is not None and wrong.guilty.reference == "shared"
    assert [(f.reference, f.call) for f in wrong.faults] == [("shared", call) for call in range(3)]


class Tied(nn.Module):
    """The last layer has the first's weight, and tells so by its state alone."""

    tie = True

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        if self.tie:
            self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.mix(self.embed(x)).sin())
        return out


class Untied(Tied):
    tie = False


def test_weights_that_two_modules_share_are_equal_on_both_sides() -> None:
    for candidate in (Tied, Untied):
        case = Case(Side(Tied), Side(candidate), lambda config, draw: {"x": draw("x", 2, 3, 8)})
        result = compare_case(case)
        assert result.status in PASSING, reason_of(result)
