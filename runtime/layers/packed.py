"""Several linear layers that read the same input, as one matrix product.  D: input width, O: all output widths."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runtime.quality import quality


class PackedLinear(nn.Linear):
    """Linear layers stacked along their outputs: (…, D) -> (…, O).

    An on-load recipe joins their weights (`Concat(0)`); `parts` cuts the output again. At quality `exact` each part is
    a product of its own, as in the reference: the same numbers in every bit.
    """

    def __init__(self, width: int, outputs: Sequence[int], bias: bool = True) -> None:
        """`outputs`: width of each part, in the order of the recipe's sources."""
        super().__init__(width, sum(outputs), bias)
        self.outputs = tuple(outputs)

    def sizes(self, held: int) -> list[int]:
        """Width of each part where `held` of all outputs are: a tensor-parallel rank has an equal share of each."""
        share = sum(self.outputs) // held
        return [size // share for size in self.outputs]

    def forward(self, input: Tensor) -> Tensor:
        if quality() != "exact":
            return super().forward(input)
        weights = torch.split(self.weight, list(self.outputs))
        biases = torch.split(self.bias, list(self.outputs)) if self.bias is not None else [None] * len(weights)
        return torch.cat([F.linear(input, w, b) for w, b in zip(weights, biases, strict=True)], dim=-1)

    def parts(self, input: Tensor) -> tuple[Tensor, ...]:
        """`forward`, cut into the parts."""
        y: Tensor = self(input)
        return torch.split(y, self.sizes(y.shape[-1]), dim=-1)
