"""What no output depends on is not judged, and everything else is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from parity.case import Case, Draw, Side
from parity.own import compare_case
from parity.reach import reachable


class Reader(nn.Module):
    """x (B, L, 8) reads text (B, T, 8) through mask (B, T); what stands in the text's padding is its own affair."""

    padding = 0.0

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.embed, self.text, self.mix = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        text = torch.where(mask[..., None], self.text(text), torch.full_like(text, self.padding))
        text = text + self.mix(F.silu(text))
        x = self.embed(x)
        seen = mask[:, None].expand(-1, x.shape[1], -1)
        read = F.scaled_dot_product_attention(self.q(x), self.k(text), self.v(text), attn_mask=seen)
        made: Tensor = self.out(x + read)
        return made


class Other(Reader):
    padding = 3.0


def inputs(config: Mapping[str, Any], draw: Draw) -> dict[str, Tensor]:
    mask = torch.arange(5) < torch.tensor([[5], [3]])
    return {"x": draw("x", 2, 4, 8), "text": draw("text", 2, 5, 8), "mask": mask}


case = Case(Side(Reader), Side(Other), inputs)


def test_what_stands_in_padding_is_no_difference() -> None:
    result = compare_case(case)
    assert result.passed and not result.faults and result.counts["skipped"] == 0
    (note,) = (note for note in result.notes if "reaches no output" in note)
    assert all(name in note for name in ("mix", "k", "v")) and "embed" not in note and "out" not in note.split(":")[-1]


def test_faults_beside_it_are_found() -> None:
    def spoil(module: Any) -> None:
        module.mix.weight.data[3] *= 1 + 2**-9

    result = compare_case(case, edit=spoil)
    assert [str(fault) for fault in result.faults] == ["mix ↔ mix, call 0"]

    class Deaf(Other):
        def forward(self, x: Tensor, text: Tensor, mask: Tensor) -> Tensor:
            return super().forward(x, text, torch.ones_like(mask))

    deaf = compare_case(Case(Side(Reader), Side(Deaf), inputs))
    assert not deaf.passed and str(deaf.faults[0]) == "the code before mix ↔ mix, call 0"


def test_no_gradient_is_no_proof() -> None:
    """Behind a ReLU an element has none where it is negative, and reaches the output all the same."""

    class Clipped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.unused = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            self.unused(x)
            made: Tensor = self.b(F.relu(self.a(x)))
            return made

    torch.manual_seed(0)
    given = {"x": torch.randn(8, 4)}
    found = reachable(Clipped(), lambda m, i: m(i["x"]), given, {"a", "b", "unused"}, 0, double=True)
    assert found is not None and set(found.tensors) == {"unused#0.out.0"}
    assert not found.tensors["unused#0.out.0"].any()
