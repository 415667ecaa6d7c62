"""Conversions that put weights into the wrong rows: named with what they would have to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from parity.compare import DIFFERS, OVER
from parity.own import compare_case
from tests.parity.pair import case, convert

State = dict[str, Tensor]
AT = "layers.1.attention."


def exchanged(a: str, b: str) -> Callable[[State], None]:
    def change(state: State) -> None:
        for kind in ("weight", "bias"):
            one, two = f"{AT}{a}.{kind}", f"{AT}{b}.{kind}"
            state[one], state[two] = state[two], state[one]

    return change


def turned(name: str, turn: Callable[[Tensor], Tensor]) -> Callable[[State], None]:
    def change(state: State) -> None:
        for kind in ("weight", "bias"):
            state[f"{name}.{kind}"] = turn(state[f"{name}.{kind}"])

    return change


def pairs_for_halves(t: Tensor) -> Tensor:
    """Of two heads, 8 wide each: 0 1 2 3 4 5 6 7 -> 0 2 4 6 1 3 5 7."""
    return t.unflatten(0, (2, 4, 2)).transpose(1, 2).flatten(0, 2)  # type: ignore[no-untyped-call, no-any-return]


def halves(t: Tensor) -> Tensor:
    return torch.cat(t.chunk(2)[::-1])


@pytest.mark.parametrize(
    ("change", "guilty", "reference", "words"),
    [
        (exchanged("to_q", "to_k"), f"{AT}to_q, {AT}to_k", "blocks.1.attn.qkv", f"exchanges {AT}to_q and {AT}to_k"),
        (exchanged("to_k", "to_v"), f"{AT}to_k, {AT}to_v", "blocks.1.attn.qkv", f"exchanges {AT}to_k and {AT}to_v"),
        (
            turned(f"{AT}to_q", pairs_for_halves), f"{AT}to_q", "blocks.1.attn.qkv",
            f"puts the rows of {AT}to_q in another order: within each of 2 groups 2 times 4 transposed",
        ),
        (
            turned("layers.2.scale_shift", halves), "layers.2.scale_shift", "blocks.2.modulation",
            "puts the rows of layers.2.scale_shift in another order: halves 1 and 2 exchanged",
        ),
    ],
)  # fmt: skip
def test_wrong_rows_are_named(change: Callable[[State], None], guilty: str, reference: str, words: str) -> None:
    def wrong(state: State) -> State:
        made = convert(state)
        change(made)
        return made

    result = compare_case(replace(case, convert=wrong))
    assert result.status in (DIFFERS, OVER) and result.guilty is not None
    assert (result.guilty.candidate, result.guilty.reference) == (guilty, reference)
    assert words in result.guilty.why and result.guilty.rule and not result.guilty.code
    assert {fault.by for fault in result.faults} == {f"{guilty} ↔ {reference} (all matches if the conversion {words})"}


def test_code_is_not_taken_for_rows() -> None:
    def scaled(model: object) -> None:
        model.layers[1].attention.scale *= 1.01  # type: ignore[attr-defined]

    guilty = compare_case(case, edit=scaled).guilty
    assert guilty is not None and guilty.code and guilty.candidate == "layers.1.attention"
