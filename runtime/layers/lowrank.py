"""LoRA beside a frozen layer: y + B (s · A x).  R: ranks of all active LoRAs together, O: outputs.

The layer stays the object that it is, with its weight untouched: its class is exchanged for one that adds the low-rank
path, and exchanged back. What changes from request to request are tensors, never the code that runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from runtime.quality import quality

Span = tuple[slice, slice, float]  # of one term: rows of B, ranks, scale
_BUFFERS = ("lora_a", "lora_b", "lora_scale")


class _LowRank(nn.Module):
    """What both kinds of layers share. `lora_a`: (R, inputs, …), `lora_b`: (O, R), `lora_scale`: (R,)."""

    lora_a: Tensor
    lora_b: Tensor
    lora_scale: Tensor
    lora_spans: tuple[Span, ...]


class _LowRankLinear(_LowRank):
    def forward(self, input: Tensor) -> Tensor:
        """(…, D) -> (…, O). At quality `exact` term by term, in the order of operations of PEFT."""
        y: Tensor = super().forward(input)
        x = input.to(self.lora_a.dtype)
        if quality() != "exact":
            h = (F.linear(x, self.lora_a) * self.lora_scale).to(x.dtype)  # (…, R)
            return y + F.linear(h, self.lora_b).to(y.dtype)
        y = y.clone()
        for rows, ranks, scale in self.lora_spans:
            h = F.linear(x, self.lora_a[ranks].contiguous())
            y[..., rows] = (y[..., rows] + F.linear(h, self.lora_b[rows, ranks].contiguous()) * scale).to(y.dtype)
        return y


class _LowRankConvolution(_LowRank):
    def forward(self, input: Tensor) -> Tensor:
        """(B, C, …) -> (B, O, …): A with the layer's own kernel, B at each position."""
        y: Tensor = super().forward(input)
        h = self._conv_forward(input.to(self.lora_a.dtype), self.lora_a, None).movedim(1, -1)  # type: ignore[operator]
        delta = F.linear((h * self.lora_scale).to(h.dtype), self.lora_b)
        return y + delta.movedim(-1, 1).to(y.dtype)


@cache
def _with_lora(kind: Any) -> Any:
    way = _LowRankLinear if issubclass(kind, nn.Linear) else _LowRankConvolution
    return type(f"LowRank{kind.__name__}", (way, kind), {"__module__": kind.__module__})


def takes_lora(layer: nn.Module) -> bool:
    """Whether the layer can have a low-rank path: a linear layer, or a convolution over whole channels."""
    whole = isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) and layer.groups == 1
    return isinstance(layer, nn.Linear) or whole


def attach(layer: Any, pairs: Sequence[tuple[Tensor, Tensor]], spans: Sequence[Sequence[Span]]) -> None:
    """Give a layer the low-rank paths of these (A, B), one for each LoRA, in place of those that it has.

    Args:
        spans: of each pair, with scales.
    """
    detach(layer)
    a = pairs[0][0] if len(pairs) == 1 else torch.cat([a for a, _ in pairs])
    b = pairs[0][1] if len(pairs) == 1 else torch.cat([b for _, b in pairs], dim=1)
    found: list[Span] = []
    rank = 0
    for (part, _), each in zip(pairs, spans, strict=True):
        for rows, ranks, scale in each:
            found.append((rows, slice(ranks.start + rank, ranks.stop + rank), scale))
        rank += part.shape[0]
    scales = torch.empty(rank, dtype=torch.promote_types(a.dtype, torch.float32))
    for _, ranks, scale in found:
        scales[ranks] = scale
    kind: Any = type(layer)
    layer.__class__ = _with_lora(kind)
    for name, tensor in zip(_BUFFERS, _shared(layer.weight, a, b, scales.to(a.device)), strict=True):
        layer.register_buffer(name, tensor, persistent=False)
    layer.lora_spans = tuple(found)


def _shared(weight: Tensor, a: Tensor, b: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A rank's factors beside a weight whose outputs (then B) or inputs (then A) tensor-parallel ranks share."""
    if not isinstance(weight, DTensor):
        return a, b, scale
    whole: Placement = Replicate()
    shared = weight.placements[0]
    places = (shared, whole, whole) if shared == Shard(1) else (whole, shared, whole)
    made = [DTensor.from_local(tensor, weight.device_mesh, [place], run_check=False)
            for tensor, place in zip((a, b, scale), places, strict=True)]  # fmt: skip
    return made[0], made[1], made[2]


def detach(layer: Any) -> None:
    """Take a layer's low-rank paths away; without any it stays as it is."""
    if not isinstance(layer, _LowRank):
        return
    for name in _BUFFERS:
        delattr(layer, name)
    del layer.lora_spans
    layer.__class__ = type(layer).__bases__[1]
