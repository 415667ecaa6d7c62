"""Several modules that take what one of the reference takes: each of them is looked at."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from parity.case import Case, Draw, Side
from parity.own import compare_case


class Fused(nn.Module):
    """Attention over x (B, L, 8) with one projection, and a time embedding t (B, 8) that both halves use."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.out = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)
        self.qkv, self.time1, self.time2 = nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        c = self.time2(F.silu(self.time1(t)))[:, None]
        q, k, v = self.qkv(self.norm(self.embed(x + c))).chunk(3, -1)
        out: Tensor = self.out(F.scaled_dot_product_attention(q, k, v) + c)
        return out


class Time(nn.Module):
    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.a, self.act, self.b = nn.Linear(8, 8), act, nn.Linear(8, 8)

    def forward(self, t: Tensor) -> Tensor:
        out: Tensor = self.b(self.act(self.a(t)))[:, None]
        return out


class Split(nn.Module):
    """The same with three projections, and a copy of the time embedding for each half."""

    def __init__(self, act: nn.Module, wrong: str = "") -> None:
        super().__init__()
        self.embed, self.norm, self.out = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
        self.first, self.second, self.wrong = Time(nn.SiLU()), Time(act), wrong

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        embedded = self.embed(x + self.first(t))
        x = self.norm(embedded)
        taken = {name: embedded if name == self.wrong else x for name in "qkv"}
        q, k, v = self.q(taken["q"]), self.k(taken["k"]), self.v(taken["v"])
        out: Tensor = self.out(F.scaled_dot_product_attention(q, k, v) + self.second(t))
        return out


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    made = {name: tensor for name, tensor in state.items() if name[:3] not in ("qkv", "tim")}
    for kind in ("weight", "bias"):
        made |= {f"{n}.{kind}": t for n, t in zip("qkv", state[f"qkv.{kind}"].chunk(3), strict=True)}
        for half in ("first", "second"):
            made |= {f"{half}.a.{kind}": state[f"time1.{kind}"], f"{half}.b.{kind}": state[f"time2.{kind}"]}
    return made


def inputs(config: Any, draw: Draw) -> dict[str, Tensor]:
    return {"x": draw("x", 2, 5, 8), "t": draw("t", 2, 8)}


def compared(act: nn.Module, wrong: str = "") -> Any:
    return compare_case(Case(Side(lambda c: Fused()), Side(lambda c: Split(act, wrong)), inputs, convert))


def test_a_split_projection_and_copies_pass() -> None:
    result = compared(nn.SiLU())
    assert result.passed and result.counts["skipped"] == 0 and not result.faults


def test_one_of_three_projections_that_takes_something_else() -> None:
    for wrong in "qkv":
        result = compared(nn.SiLU(), wrong)
        assert not result.passed and result.guilty is not None
        assert [(f.candidate, f.reference, f.step) for f in result.faults] == [(wrong, "qkv", True)]
        assert f"hands to {wrong} (" in result.guilty.why


def test_the_code_inside_one_of_two_copies() -> None:
    result = compared(nn.GELU())
    assert not result.passed and result.guilty is not None
    assert [(f.candidate, f.reference, f.step) for f in result.faults] == [("second.b", "time2", True)]
    assert result.guilty.candidate == "second.act"


class Reader(nn.Module):
    """x (B, L, 8) reads text (B, T, 8) through mask (B, T); what stands in the text's padding reaches nothing."""

    def __init__(self, padding: float = 0.0, *, fused: bool = True) -> None:
        super().__init__()
        self.padding, self.text, self.x, self.out = padding, nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.kv = nn.Linear(8, 16) if fused else None
        self.k, self.v = (None, None) if fused else (nn.Linear(8, 8), nn.Linear(8, 8))

    def forward(self, x: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        text = self.text(text).masked_fill(~mask[..., None], self.padding)
        k, v = self.kv(text).chunk(2, -1) if self.kv is not None else (self.k(text), self.v(text))  # type: ignore[misc]
        seen = mask[:, None].expand(-1, x.shape[1], -1)
        out: Tensor = self.out(F.scaled_dot_product_attention(self.x(x), k, v, attn_mask=seen))
        return out


def test_of_a_split_projection_over_padding_the_part_that_differs_is_named() -> None:
    def split(state: dict[str, Tensor]) -> dict[str, Tensor]:
        made = {name: tensor for name, tensor in state.items() if name[:2] != "kv"}
        for kind in ("weight", "bias"):
            made |= {f"{n}.{kind}": t for n, t in zip("kv", state[f"kv.{kind}"].chunk(2), strict=True)}
        return made

    def text(config: Any, draw: Draw) -> dict[str, Tensor]:
        mask = torch.arange(5) < torch.tensor([[5], [3]])
        return {"x": draw("x", 2, 4, 8), "text": draw("text", 2, 5, 8), "mask": mask}

    def spoil(module: Any) -> None:
        module.v.weight.data *= 1.0001

    case = Case(Side(lambda c: Reader()), Side(lambda c: Reader(3.0, fused=False)), text, split)
    assert compare_case(case).passed
    result = compare_case(case, edit=spoil)
    assert not result.passed and result.guilty is not None and result.guilty.candidate == "v"
