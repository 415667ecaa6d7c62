"""Tensors that one module holds under several names: embeddings that are tied, a part that two others share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from torch import Tensor, nn

from parity.case import Case, Draw, Named, Side
from parity.compare import PASSING
from parity.outcome import reason_of
from parity.own import compare_case
from porter.core.errors import BadInputError

WORDS, WIDTH = 12, 8


class Codec(nn.Module):
    """ids (B, L) -> logits (B, L, WORDS). Its two halves share a norm, the head is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.embed.weight
        self.first, self.second = nn.Module(), nn.Module()
        self.first.norm = self.second.norm = nn.LayerNorm(WIDTH)
        self.first.up, self.second.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.first.up(self.first.norm(self.embed(ids)))
        logits: Tensor = self.head(self.second.down(self.second.norm(x)))
        return logits


class Port(nn.Module):
    """The same with one norm, and a table `shared` that holds the embedding and is itself never called."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.tokens = nn.Embedding(WORDS, WIDTH), nn.Embedding(WORDS, WIDTH)
        self.logits = nn.Linear(WIDTH, WORDS, bias=False)
        self.logits.weight = self.tokens.weight = self.shared.weight
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.logits(self.down(self.norm(self.up(self.norm(self.tokens(ids))))))
        return logits


def convert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One name of each: the second of the norm, the head's of the embedding."""
    return {
        "shared.weight": state["head.weight"],
        **{f"norm.{kind}": state[f"second.norm.{kind}"] for kind in ("weight", "bias")},
        **{f"up.{kind}": state[f"first.up.{kind}"] for kind in ("weight", "bias")},
        **{f"down.{kind}": state[f"second.down.{kind}"] for kind in ("weight", "bias")},
    }


def _ids(m: Any, x: Named) -> Any:
    return m(x["ids"])


def _inputs(config: Mapping[str, Any], draw: Draw) -> dict[str, Tensor]:
    return {"ids": draw.integers("ids", WORDS, 2, 5)}


def _case(convert: Any = convert, weights: Path | None = None) -> Case:
    return Case(
        Side(lambda c: Codec(), _ids), Side(lambda c: Port(), _ids), _inputs, convert, weights=weights
    )  # fmt: skip


def test_all_names_of_one_tensor_are_drawn_and_filled_as_one() -> None:
    result = compare_case(_case())
    assert result.status in PASSING, reason_of(result)
    assert not result.warnings and not result.unused and not result.unwatched
    assert {"first.norm", "first.up", "second.down", "embed"} <= {t.module for t in result.taps}


def test_what_runs_is_compared_and_not_what_holds_the_name() -> None:
    def both(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {**convert(state), "tokens.weight": state["embed.weight"], "logits.weight": state["head.weight"]}

    def planted(m: Any) -> None:
        m.tokens.weight = nn.Parameter(m.tokens.weight.detach().clone())
        m.tokens.weight.data[3:9] *= 1.01

    result = compare_case(_case(both), edit=planted)
    assert result.guilty is not None and result.guilty.candidate == "tokens", reason_of(result)


def test_a_conversion_that_fills_one_tensor_twice_is_refused() -> None:
    def torn(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {**convert(state), "tokens.weight": state["head.weight"] * 2}

    result = compare_case(_case(torn))
    assert result.status not in PASSING and "as one tensor, the conversion makes two" in result.reason


def test_a_file_may_hold_a_tied_tensor_once_but_not_two_of_it(tmp_path: Path) -> None:
    state = {name: tensor.clone() for name, tensor in Codec().state_dict().items()}
    del state["embed.weight"], state["first.norm.weight"]
    save_file(state, once := tmp_path / "once.safetensors")
    result = compare_case(_case(weights=once))
    assert result.status in PASSING, reason_of(result)
    save_file(state | {"embed.weight": state["head.weight"] + 1}, twice := tmp_path / "twice.safetensors")
    with pytest.raises(BadInputError, match="as one tensor, the file two"):
        compare_case(_case(weights=twice))
