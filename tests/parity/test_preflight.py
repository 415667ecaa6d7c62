"""What is said before anything runs: weights that do not arrive as they were, and dtypes that sides are built in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from parity.case import Side
from parity.own import compare_case
from tests.parity.pair import Original, Port, case, convert

State = dict[str, Tensor]


def rounded(state: State) -> State:
    made = convert(state)
    made["layers.1.up.weight"] = made["layers.1.up.weight"].bfloat16().float()
    return made


def left_out(state: State) -> State:
    made = convert(state)
    key = made["layers.0.attention.to_k.weight"]
    made["layers.0.attention.to_k.weight"] = torch.cat((key[:-2], torch.zeros(2, 16)))
    return made


def plus_one(state: State) -> State:
    made = convert(state)
    made["final_norm.weight"] = made["final_norm.weight"] + 1
    return made


@pytest.mark.parametrize(
    ("conversion", "words"),
    [
        (rounded, "changes the values of 1 tensors: layers.1.up.weight (by"),
        (left_out, "changes the values of 1 tensors: layers.0.attention.to_k.weight (by"),
        (plus_one, "changes the values of 1 tensors: final_norm.weight (by 1.0e+00)"),
    ],
)
def test_weights_that_do_not_arrive_as_they_were(conversion: Callable[[State], State], words: str) -> None:
    result = compare_case(replace(case, convert=conversion))
    assert not result.passed and any(words in note for note in result.notes), result.notes


def test_rows_that_are_left_behind() -> None:
    class Narrow(nn.Module):
        def __init__(self, rows: int) -> None:
            super().__init__()
            self.out = nn.Linear(4, rows)

        def forward(self, x: Tensor) -> Tensor:
            answer: Tensor = self.out(x)
            return answer[..., :6]

    sides = (Side(lambda config: Narrow(8)), Side(lambda config: Narrow(6)))
    short = replace(
        case, reference=sides[0], candidate=sides[1], inputs=lambda config, draw: {"x": draw("x", 2, 4)}, config={},
        convert=lambda state: {name: tensor[:6] for name, tensor in state.items()},
    )  # fmt: skip
    notes = compare_case(short).notes
    assert "the conversion leaves behind 2 rows of out.weight, 2 rows of out.bias" in notes


def test_a_right_conversion_is_not_spoken_of() -> None:
    notes = compare_case(case).notes
    assert not [note for note in notes if "the conversion" in note or "dtypes" in note]


def test_dtypes_that_one_side_is_built_in() -> None:
    half = replace(case, reference=Side(lambda config: Original(config).bfloat16()))
    count = len(Port(case.config).state_dict())
    found = [note for note in compare_case(half).notes if note.startswith("built in other dtypes")]
    assert found and f"the candidate {count} in float32" in found[0] and "in bfloat16" in found[0]
