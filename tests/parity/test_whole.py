"""Modules that compute with weights which are not theirs, or with their children's and without calling them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from parity.case import Case, Draw, Side
from parity.outcome import reason_of
from parity.own import compare_case


class Joined(nn.Module):
    """x (B, L, 8) attends to itself, then to text (B, T, 8), with torch's own module."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)
        self.own = nn.MultiheadAttention(8, 2, batch_first=True)
        self.cross = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        y = self.norm(x)
        x = x + self.own(y, y, y)[0]
        x = x + self.cross(x, text, text, need_weights=False)[0]
        return F.linear(x, self.head.weight, self.head.bias)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, hidden: Tensor, context: Tensor | None = None) -> Tensor:
        context = hidden if context is None else context
        q, k, v = (
            t.unflatten(-1, (2, 4)).transpose(1, 2) for t in (self.to_q(hidden), self.to_k(context), self.to_v(context))
        )
        y: Tensor = self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return y


class Split(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)
        self.attn1, self.attn2 = Attention(), Attention()

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        x = x + self.attn1(self.norm(x))
        x = x + self.attn2(x, text)
        out: Tensor = self.head(x)
        return out


def split(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    made = {}
    for name, tensor in state.items():
        new = name.replace("own.", "attn1.").replace("cross.", "attn2.").replace("out_proj", "to_out")
        if "in_proj_" in new:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                made[new.replace("in_proj_", f"to_{letter}.")] = part
        else:
            made[new] = tensor
    return made


def inputs(config: Mapping[str, Any], draw: Draw) -> dict[str, Tensor]:
    return {"x": draw("x", 2, 5, 8), "text": draw("text", 2, 4, 8)}


def call(m: Any, given: Mapping[str, Tensor]) -> Any:
    return m(given["x"], given["text"])


case = Case(Side(lambda c: Joined(), call), Side(lambda c: Split(), call), inputs, split)


def test_torch_s_attention_is_one_module() -> None:
    result = compare_case(case)
    assert result.passed, reason_of(result)
    assert {t.module for t in result.taps} == {"norm", "own", "cross"}
    for path, part in (("own", "attn1.to_k"), ("cross", "attn2.to_out")):
        found = compare_case(case, edit=lambda m, part=part: m.get_submodule(part).weight.data.mul_(1.01))  # type: ignore[misc]
        assert found.faults[0].reference == path and found.guilty and found.guilty.reference == path
    assert compare_case(Case(case.reference, case.reference, inputs)).passed  # on both sides, with the same names


def test_a_weight_that_is_used_without_its_module_took_part() -> None:
    """`head` runs in the reference as a function; what no pass uses at all is no pass."""
    both = Case(case.candidate, case.reference, inputs, joined)
    result = compare_case(both, level="component")
    assert result.passed, reason_of(result)

    class More(Split):
        def __init__(self) -> None:
            super().__init__()
            self.temperature = nn.Parameter(torch.ones(()))

    side = Side(lambda c: More(), call)
    result = compare_case(Case(side, side, inputs))
    assert not result.passed and "never ran: temperature" in reason_of(result) and "`skip`" in reason_of(result)
    assert compare_case(Case(side, side, inputs, skip="temperature")).passed


def joined(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    made = {}
    for name, tensor in state.items():
        new = name.replace("attn1.", "own.").replace("attn2.", "cross.").replace("to_out", "out_proj")
        if ".to_q." in new:
            parts = [state[name.replace("to_q", f"to_{letter}")] for letter in "qkv"]
            made[new.replace("to_q.", "in_proj_")] = torch.cat(parts)
        elif ".to_k." not in new and ".to_v." not in new:
            made[new] = tensor
    return made


class Padded(nn.Module):
    """Two convolutions that are padded before, the second with what lies at the border; x (B, 3, 6, 5)."""

    def __init__(self, inside: bool) -> None:
        super().__init__()
        self.inside = inside
        self.first = nn.Conv2d(3, 4, 3, padding=1 if inside else 0)
        self.second = nn.Conv2d(4, 2, 3, padding=1 if inside else 0, padding_mode="replicate" if inside else "zeros")
        self.last = nn.Conv2d(2, 2, 3, stride=2)  # one more at the end

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x if self.inside else F.pad(x, (1, 1, 1, 1)))
        x = self.second(x if self.inside else F.pad(x, (1, 1, 1, 1), mode="replicate"))
        out: Tensor = self.last(F.pad(x, (0, 1, 0, 1)))
        return out


def test_padding_before_a_convolution_or_in_it() -> None:
    def picture(config: Mapping[str, Any], draw: Draw) -> dict[str, Tensor]:
        return {"x": draw("x", 1, 3, 6, 5)}

    for inside in (False, True):
        sides = [Side(lambda c, i=i: Padded(i)) for i in (inside, not inside)]  # type: ignore[misc]
        case = Case(sides[0], sides[1], picture)
        result = compare_case(case)
        assert result.passed, reason_of(result)
        assert all(tap.reset is not None and tap.reset.passed for tap in result.taps)
        fault = compare_case(case, edit=lambda m: m.second.weight.data[0, 1].mul_(1.01))
        assert [f.reference for f in fault.faults] == ["second"]


class Last(nn.Module):
    """Three projections of channels that come last, and a norm of them; x (B, 4, 4, 4) with channels first."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.q, self.k = nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.out = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x.movedim(1, -1))
        out: Tensor = self.out((self.q(y) * self.k(y)).movedim(-1, 1))
        return out


class First(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qk, self.out = nn.GroupNorm(1, 4), nn.Conv2d(4, 8, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        mean, spread = x.mean(1, keepdim=True), x.var(1, unbiased=False, keepdim=True)
        y = (x - mean) / (spread + 1e-5).sqrt() * self.norm.weight[:, None, None] + self.norm.bias[:, None, None]
        q, k = self.qk(y).chunk(2, 1)
        out: Tensor = self.out(q * k)
        return out


def test_channels_first_or_last_where_shapes_do_not_say() -> None:
    def parted(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        made = {n: t for n, t in state.items() if not n.startswith("qk")}
        for kind in ("weight", "bias"):
            q, k = state[f"qk.{kind}"].flatten(1).chunk(2) if kind == "weight" else state["qk.bias"].chunk(2)
            made |= {f"q.{kind}": q, f"k.{kind}": k}
        return made

    for places in ((3, 4), (5, 3)):
        cube = lambda c, d, p=places: {"x": d("x", 1, 4, *p)}  # type: ignore[misc] # noqa: E731
        case = Case(Side(lambda c: First()), Side(lambda c: Last()), cube, parted)
        result = compare_case(case)
        assert result.passed, reason_of(result)
        assert {t.module for t in result.taps} >= {"qk", "out"}
        fault = compare_case(case, edit=lambda m: m.k.weight.data[1].mul_(1.01))
        assert [f.reference for f in fault.faults] == ["qk"]


class Mixed(nn.Module):
    """One projection, of channels that come first or last; x (B, 4, 4, 4)."""

    def __init__(self, last: bool) -> None:
        super().__init__()
        self.last, self.out = last, nn.Conv2d(4, 2, 1)
        self.mix: nn.Module = nn.Linear(4, 4) if last else nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.mix(x.movedim(1, -1)).movedim(-1, 1) if self.last else self.mix(x))
        return out


def test_as_many_channels_as_places() -> None:
    flat = lambda s: {n: t.flatten(1) if n == "mix.weight" else t for n, t in s.items()}  # noqa: E731
    cube = lambda c, d: {"x": d("x", 1, 4, 4, 4)}  # noqa: E731
    case = Case(Side(lambda c: Mixed(False)), Side(lambda c: Mixed(True)), cube, flat)
    result = compare_case(case)
    assert result.passed and all(tap.reset is not None for tap in result.taps), reason_of(result)
    fault = compare_case(case, edit=lambda m: m.mix.weight.data[1].mul_(1.01))
    assert [f.reference for f in fault.faults] == ["mix"]
    swapped = compare_case(case, edit=lambda m: m.register_forward_pre_hook(lambda _, a: (a[0].transpose(2, 3),)))
    assert not swapped.passed
