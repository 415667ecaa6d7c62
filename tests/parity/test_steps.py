"""The code between modules with weights: whose it is, and that one fault there does not hide, or blame, another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor, nn
from torch.nn import functional as F

from parity.case import Case, Draw, Side
from parity.compare import PASSING
from parity.component import ComponentResult
from parity.own import compare_case

pytestmark = pytest.mark.slow


class Block(nn.Module):
    """Modulated attention-like step and a feed-forward, each around a residual; x (B, L, 8), c (B, 1, 8)."""

    affine = False

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(8, eps=1e-6, elementwise_affine=self.affine)
        self.norm2 = nn.LayerNorm(8, eps=1e-6, elementwise_affine=self.affine)
        self.modulation, self.mix, self.proj = nn.Linear(8, 16), nn.Linear(8, 8), nn.Linear(8, 8)
        self.up, self.act, self.down = nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        scale, shift = self.modulation(F.silu(c)).chunk(2, -1)
        x = self.first(x, self.proj(self.mix(self.norm1(x) * (1 + scale) + shift).sin()))
        return self.second(x, self.down(self.act(self.up(self.norm2(x) * (1 + shift)))))

    def first(self, x: Tensor, made: Tensor) -> Tensor:
        return x + made

    def second(self, x: Tensor, made: Tensor) -> Tensor:
        return x + made


class Affine(Block):
    affine = True


def without(where: str) -> Callable[[type[Block]], Block]:
    """A block that forgets a residual: around its first half, its second, or after its own code."""

    def make(base: type[Block]) -> Block:
        class Forgetful(base):  # type: ignore[misc, valid-type]
            def first(self, x: Tensor, made: Tensor) -> Tensor:
                return made if where == "first" else x + made

            def second(self, x: Tensor, made: Tensor) -> Tensor:
                return made if where == "second" else x + made

            def forward(self, x: Tensor, c: Tensor) -> Tensor:
                before = x.clone()
                out: Tensor = super().forward(x, c)
                return out - before if where == "whole" else out

        return Forgetful()

    return make


class Net(nn.Module):
    """x (B, L, 4) -> (B, L, 4) through three blocks and a norm without weights."""

    def __init__(self, blocks: list[Block]) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Linear(4, 8), nn.ModuleList(blocks)
        self.norm, self.out = nn.LayerNorm(8, eps=1e-6, elementwise_affine=False), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        c = x.mean(1, keepdim=True)
        for block in self.blocks:
            x = block(x, c)
        out: Tensor = self.out(self.norm(x))
        return out


def given(config: Any, draw: Draw) -> dict[str, Tensor]:
    return {"x": draw("x", 2, 5, 4)}


def planted(base: type[Block], at: int, make: Callable[[type[Block]], Block]) -> ComponentResult:
    return compare_case(
        Case(
            Side(lambda c: Net([base() for _ in range(3)])),
            Side(lambda c: Net([make(base) if i == at else base() for i in range(3)])),
            given,
        )
    )


@pytest.mark.parametrize("base", [Block, Affine])
@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize(
    ("where", "code"),
    [
        ("whole", "its code after blocks.{at}.down"),
        ("second", "its code after blocks.{at}.down"),
        ("first", "its code between blocks.{at}.proj and blocks.{at}.{next}"),
    ],
)
def test_a_lost_residual_is_the_block_s_that_lost_it(base: type[Block], at: int, where: str, code: str) -> None:
    result = planted(base, at, without(where))
    said = code.format(at=at, next="norm2" if base.affine else "up")
    assert not result.passed and result.guilty is not None
    assert (result.guilty.candidate, result.guilty.reference) == (f"blocks.{at}", f"blocks.{at}")
    assert result.guilty.code and said in result.guilty.why
    assert [fault.by for fault in result.faults] == [f"blocks.{at} ↔ blocks.{at} ({said})"]


def test_two_lost_residuals_are_two_faults() -> None:
    blocks = [without("second")(Block), Block(), without("whole")(Block)]
    result = compare_case(Case(Side(lambda c: Net([Block() for _ in range(3)])), Side(lambda c: Net(blocks)), given))
    assert [fault.by.partition(" ↔")[0] for fault in result.faults] == ["blocks.0", "blocks.2"]


class Series(nn.Module):
    """Norms without weights one after the other, before one layer."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.embed, self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.n1, self.n2, self.n3 = (
            kind(8, eps=eps, elementwise_affine=False) for kind in (nn.LayerNorm, nn.RMSNorm, nn.LayerNorm)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.a(self.n2(self.n1(x)))
        out: Tensor = self.b(self.n3(x))
        return out


def test_norms_without_weights_in_series_are_all_named() -> None:
    result = compare_case(Case(Side(lambda c: Series(1e-6)), Side(lambda c: Series(1e-5)), given))
    said = "(eps 1e-06 in the reference, 1e-05 in the candidate)"
    assert [fault.by for fault in result.faults] == [f"{n} ↔ {n} {said}" for n in ("n1", "n2", "n3")]
    assert [fault.candidate for fault in result.faults] == ["a", "a", "b"]
    assert result.guilty is not None and result.guilty.candidate == "n1" and not result.guilty.code


def test_a_norm_without_weights_behind_a_lost_residual_is_named_too() -> None:
    def both(base: type[Block]) -> Block:
        block = without("second")(base)
        block.norm1.eps = 1e-5
        return block

    result = planted(Block, 1, both)
    assert [fault.by.partition(" ↔")[0] for fault in result.faults] == ["blocks.1.norm1", "blocks.1"]


class Functional(Block):
    """Its norms are function calls, and its step adds something at the end."""

    eps, more = 1e-6, 0.0

    def __init__(self) -> None:
        super().__init__()
        del self.norm1, self.norm2

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        scale, shift = self.modulation(F.silu(c)).chunk(2, -1)
        x = x + self.proj(self.mix(F.rms_norm(x, (8,), eps=self.eps) * (1 + scale) + shift).sin())
        return x + self.down(self.act(self.up(F.rms_norm(x, (8,), eps=1e-6)))) + self.more


def test_functions_in_a_block_are_the_block_s() -> None:
    def otherwise(**settings: float) -> Callable[[type[Block]], Block]:
        def make(base: type[Block]) -> Block:
            block = base()
            for name, value in settings.items():
                setattr(block, name, value)
            return block

        return make

    for settings, code in (
        ({"eps": 1e-3}, "between blocks.1.modulation and blocks.1.mix"),
        ({"more": 0.1}, "after blocks.1.down"),
    ):
        result = planted(Functional, 1, otherwise(**settings))
        assert [fault.by for fault in result.faults] == [f"blocks.1 ↔ blocks.1 (its code {code})"]


class Attention(nn.Module):
    """What one side's module does, the other's caller does: the residual around it."""

    def __init__(self, inner: bool) -> None:
        super().__init__()
        self.inner = inner
        self.q, self.o = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.o(self.q(x).sin())
        return x + out if self.inner else out


class Cut(nn.Module):
    def __init__(self, inner: bool, lost: bool = False) -> None:
        super().__init__()
        self.inner, self.lost = inner, lost
        self.embed, self.attns = nn.Linear(4, 8), nn.ModuleList(Attention(inner) for _ in range(3))
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for i, (attn, norm) in enumerate(zip(self.attns, self.norms, strict=True)):
            y = attn(norm(x))
            x = y if self.inner or (self.lost and i == 1) else norm(x) + y
        return x


def test_blocks_that_are_cut_differently_are_not_blamed() -> None:
    same = compare_case(Case(Side(lambda c: Cut(True)), Side(lambda c: Cut(False)), given))
    assert same.status in PASSING and not same.faults
    lost = compare_case(Case(Side(lambda c: Cut(True)), Side(lambda c: Cut(False, True)), given))
    assert [f.candidate for f in lost.faults] == ["norms.2"], [str(f) for f in lost.faults]


class Fused(nn.Module):
    """One layer for two, of which the other side runs the second first."""

    def __init__(self, eps: float = 1e-6) -> None:
        super().__init__()
        self.embed, self.both, self.out = nn.Linear(4, 8), nn.Linear(8, 16), nn.Linear(8, 4)
        self.norm = nn.LayerNorm(8, eps=eps, elementwise_affine=False)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.both(self.norm(self.embed(x))).chunk(2, -1)
        out: Tensor = self.out(a * b.sin())
        return out


class Apart(Fused):
    def __init__(self, eps: float) -> None:
        super().__init__(eps)
        del self.both
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.embed(x))
        b = self.b(x).sin()
        out: Tensor = self.out(self.a(x) * b)
        return out


def test_what_the_first_to_run_takes_is_compared() -> None:
    def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
        for kind in ("weight", "bias"):
            state[f"a.{kind}"], state[f"b.{kind}"] = state.pop(f"both.{kind}").chunk(2)
        return state

    def compared(eps: float) -> ComponentResult:
        return compare_case(Case(Side(lambda c: Fused()), Side(lambda c: Apart(eps)), given, convert))

    assert compared(1e-6).passed
    (fault,) = compared(1e-5).faults
    assert fault.by == "norm ↔ norm (eps 1e-06 in the reference, 1e-05 in the candidate)"
