"""What is computed and not stored: tables that a class makes, weights that are made of others, before or after."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from parity.case import Case, Draw, Side
from parity.fingerprint import moved
from parity.outcome import reason_of
from parity.own import compare_case


class Turned(nn.Module):
    """x (B, L, D) turned by its place, with frequencies in a buffer: (B, L, D)."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.fixed = nn.Parameter(torch.zeros(width), requires_grad=False)
        self.fixed.data.copy_(torch.linspace(0.1, 3, width))
        self.register_buffer("inv_freq", 1.0 / (1000 ** (torch.arange(0, width, 2).float() / width)))
        self.register_buffer("scale", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[1]).float()[:, None] * self.inv_freq  # (L, D / 2)
        a, b = (self.inner(x) * self.fixed * self.scale).chunk(2, -1)
        out: Tensor = self.out(
            torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], -1)
        )
        return out


class TurnedPort(Turned):
    """The same without what it can compute as it goes."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        del self.inv_freq
        del self.fixed

    @property
    def fixed(self) -> Tensor:
        return torch.linspace(0.1, 3, self.scale.numel())

    @property
    def inv_freq(self) -> Tensor:
        return 1.0 / (1000 ** (torch.arange(0, self.scale.numel(), 2, dtype=torch.float32) / self.scale.numel()))


def without(*names: str) -> Any:
    return lambda state: {name: t for name, t in state.items() if name not in names}


def one_input(config: Mapping[str, Any], draw: Draw) -> dict[str, Tensor]:
    return {"x": draw("x", 2, 5, 8)}


turned = Case(
    Side(lambda c: Turned()), Side(lambda c: TurnedPort()), one_input, without("inv_freq", "fixed"), name="turned"
)  # fmt: skip


def test_what_the_class_computes_is_not_drawn() -> None:
    result = compare_case(turned)
    assert result.passed, reason_of(result)
    assert any("inv_freq" in note and "fixed" in note and "scale" not in note for note in result.notes)
    twice = Side(lambda c: Turned(), {"a": lambda m, x: m(x["x"]), "b": lambda m, x: m(-x["x"])})
    passes = replace(turned, reference=twice, candidate=replace(turned.candidate, call=twice.call))
    assert compare_case(replace(passes, inputs=lambda c, d: {"a": one_input(c, d), "b": one_input(c, d)})).passed
    changed = compare_case(turned, edit=lambda m: m.scale.data.mul_(1.001))
    assert not changed.passed


class Normed(nn.Module):
    """Two convolutions with a weight norm; x (B, 4, L) -> (B, 2, L)."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.first, self.second = norm(nn.Conv1d(4, 6, 3, padding=1)), norm(nn.Conv1d(6, 2, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(torch.sin(self.first(x)))
        return out


def sequence(config: Mapping[str, Any], draw: Draw) -> dict[str, Tensor]:
    return {"x": draw("x", 2, 4, 9)}


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names = {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}
    return {n.replace(n.rpartition(".")[2], names.get(n.rpartition(".")[2], "bias")): t for n, t in state.items()}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_a_parametrization_is_part_of_its_module() -> None:
    old, new = torch.nn.utils.weight_norm, parametrizations.weight_norm
    back = {
        v: k for k, v in {"g": "parametrizations.weight.original0", "v": "parametrizations.weight.original1"}.items()
    }

    def restored(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        made = {}
        for name, tensor in state.items():
            for long, letter in back.items():
                name = name.replace(long, f"weight_{letter}")
            made[name] = tensor
        return made

    for norms, convert in (((old, new), renamed), ((new, old), restored)):
        sides = [Side(lambda c, norm=norm: Normed(norm)) for norm in norms]  # type: ignore[misc]
        case = Case(sides[0], sides[1], sequence, convert)
        result = compare_case(case)
        assert result.passed and {t.module for t in result.taps} == {"first", "second"}, reason_of(result)
        fault = compare_case(case, edit=lambda m: next(m.second.parameters()).data.mul_(1.01))
        assert [f.reference for f in fault.faults] == ["second"]


def test_a_table_of_one_side_that_the_other_computes_as_it_goes() -> None:
    """Kept in float32 it would differ in float64 by its rounding; a table that is wrong still does."""
    result = compare_case(turned)
    assert result.passed and result.headline is not None and result.headline.max_abs64 < 1e-12, reason_of(result)
    back = Case(turned.candidate, turned.reference, one_input, lambda s: s, name="turned", keep="inv_freq|fixed")
    assert compare_case(back).passed

    def other(m: Any) -> None:
        m.inv_freq.data[1] *= 1 + 2**-20

    assert not compare_case(back, edit=other).passed
    rough = replace(back, candidate=Side(lambda c: Rough()))
    assert not compare_case(rough).passed


class Rough(Turned):
    """A table in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.inv_freq.data = self.inv_freq.bfloat16().float()


def folded(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weight norms worked into the weights, as a converter does that keeps none."""
    made = {n: t for n, t in state.items() if n.endswith("bias")}
    for name, v in state.items():
        if name.endswith("weight_v"):
            made[name[:-2]] = state[f"{name[:-1]}g"] * v / v.norm(dim=(1, 2), keepdim=True)
    return made


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_a_conversion_that_computes_says_what_it_computed_from() -> None:
    reference = Side(lambda c: Normed(torch.nn.utils.weight_norm))
    case = Case(reference, Side(lambda c: Normed(lambda layer: layer)), sequence, folded)
    result = compare_case(case)
    assert result.passed and not result.warnings, (reason_of(result), result.warnings)
    assert {t.module for t in result.taps} == {"first", "second"}
    fault = compare_case(case, edit=lambda m: m.second.weight.data[1, 2].mul_(1 + 2**-18))
    assert [f.reference for f in fault.faults] == ["second"] and not fault.passed

    def careless(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {n: t.half().to(t) if n == "second.weight" else t for n, t in folded(state).items()}

    fault = compare_case(replace(case, convert=careless))
    assert [f.reference for f in fault.faults] == ["second"]


class Shifted(nn.Module):
    """A norm around one, a fused projection; x (B, 5, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(8), nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        out: Tensor = nn.functional.scaled_dot_product_attention(q, k, v)
        return out


class ShiftedPort(nn.Module):
    """Its norm's weight is what is added to one; three projections, the second with its scale in it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.layer_norm(x, (8,)) * (self.norm.weight + 1) + self.norm.bias
        self.norm(x)
        out: Tensor = (self.q(y) @ self.k(y).transpose(-2, -1)).softmax(-1) @ self.v(y)
        return out


def shifted(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    made = {"norm.weight": state["norm.weight"] - 1, "norm.bias": state["norm.bias"]}
    for kind in ("weight", "bias"):
        q, k, v = state[f"qkv.{kind}"].chunk(3)
        made |= {f"q.{kind}": q, f"k.{kind}": k / math.sqrt(8), f"v.{kind}": v}
    return made


def test_numbers_that_are_shifted_are_not_taken_for_others() -> None:
    """One more is the place of the next number; a row that was scaled still says which it was."""
    moves = {(m.source, m.target): m for m in moved(Shifted().state_dict(), shifted)}
    assert set(moves) == {
        ("norm.weight", "norm.weight"), ("norm.bias", "norm.bias"),
        *((f"qkv.{kind}", f"{letter}.{kind}") for kind in ("weight", "bias") for letter in "qkv"),
    }  # fmt: skip
    assert [moves["qkv.weight", f"{letter}.weight"].source_rows for letter in "qkv"] == [(0, 8), (8, 16), (16, 24)]
    assert moves["norm.weight", "norm.weight"].source_rows is None
