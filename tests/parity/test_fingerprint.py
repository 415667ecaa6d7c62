"""Faults in a conversion: aligned all the same, and named where they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from parity.fingerprint import Moved, moved
from parity.own import compare_case
from tests.parity.pair import case, convert

State = dict[str, Tensor]
HALVES = "layers.1.scale_shift.weight"


def one_row(w: Tensor) -> Tensor:
    return torch.cat((w[:1], torch.ones_like(w[1:2]), w[2:]))


def interleaved(w: Tensor) -> Tensor:
    return w.unflatten(0, (2, 8)).transpose(0, 1).flatten(0, 1)


FAULTS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "a row left at one": ("layers.1.attention.norm_q.weight", one_row),
    "a row of a part left at one": ("layers.1.attention.to_q.weight", one_row),
    "the first row left at one": ("layers.1.attention.to_v.weight", lambda w: one_row(w.flip(0)).flip(0)),
    "rounded": ("layers.1.attention.to_q.weight", lambda w: w.bfloat16().float()),
    "half precision": ("layers.1.down.weight", lambda w: w.to(torch.float16)),
    "scaled": ("layers.1.attention.to_out.weight", lambda w: w * 1.01),
    "one added": ("layers.1.attention.norm_q.weight", lambda w: w + 1),
    "negative": ("layers.2.norm_a.weight", lambda w: -w),
    "transposed": ("layers.1.attention.to_out.weight", lambda w: w.t()),
    "heads interleaved": ("layers.1.attention.to_k.weight", interleaved),
    "halves": (HALVES, lambda w: torch.cat(w.chunk(2)[::-1])),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_the_conversion_is_named(name: str) -> None:
    target, change = FAULTS[name]

    def faulty(state: State) -> State:
        made = convert(state)
        return {**made, target: change(made[target])}

    result = compare_case(replace(case, convert=faulty))
    assert not result.passed and result.counts["skipped"] == 0
    at = target.rpartition(".")[0]
    assert result.faults[0].candidate in (at, "layers.1.attention.{to_q,to_k,to_v}") and not result.faults[0].step
    if name != "halves":  # of which the weight says one thing and the bias another
        assert result.guilty is not None and result.guilty.candidate == at


def test_places_survive_what_is_computed() -> None:
    state = {"a.weight": torch.zeros(4, 3), "b.weight": torch.zeros(2, 3), "n.weight": torch.zeros(6)}

    def computed(given: State) -> State:
        return {
            "joined.weight": torch.cat((given["b.weight"], 0.5 * given["a.weight"])).half(),
            "norm.weight": 1 + given["n.weight"],
            "new.weight": torch.ones(3, 3),
            "squared.weight": given["n.weight"] ** 2,
        }

    assert moved(state, computed) == [
        Moved("b.weight", "joined.weight", None, (0, 2)),
        Moved("a.weight", "joined.weight", None, (2, 6)),
        Moved("n.weight", "norm.weight", None, None),
        Moved("n.weight", "squared.weight", None, None),
    ]
