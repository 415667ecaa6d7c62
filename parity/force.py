"""Blocks with their inputs reset to the reference's recorded ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from parity.align import Alignment, fit
from parity.case import Block, Candidate
from parity.trace import Trace


def forcings(trace: Trace, name: str, candidate: Candidate, alignment: Alignment) -> dict[str, Force]:
    """Blocks of a pass whose inputs were recorded in full: candidate module -> what replaces its arguments."""
    found = {}
    for path in trace.modules(name):
        ours = alignment.counterpart(path)
        keys = trace.keys(name, path, 0, "in")
        declared = next((b for b in candidate.blocks if b.matches(path)), None)
        whole = bool(keys) and all(trace.value(k).complete for k in keys)
        if ours and whole and path not in alignment.parts and (declared or len(keys) == 1):
            found[ours] = Force(trace, name, path, declared)
    return found


@dataclass(frozen=True)
class Force:
    """Replaces a block's inputs by the reference's recorded ones; a block with one input needs no declaration."""

    trace: Trace
    name: str
    path: str
    block: Block | None
    unfit: list[str] = field(default_factory=list)

    def __call__(self, call: int, own: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        prefix = f"{self.name}/{self.path}#{call}.in."
        double = torch.get_default_dtype() == torch.float64
        keys = self.trace.keys(self.name, self.path, call, "in")
        device = next((t.device for t in own.values()), torch.device("cpu"))
        recorded = {k.removeprefix(prefix): self.trace.value(k).tensor(double).to(device) for k in keys}
        if self.block:
            return self.block.force(recorded, own)
        argument, value = next(iter(own.items()))
        fitted = fit(next(iter(recorded.values())), tuple(value.shape))
        if isinstance(fitted, str):  # then nothing is reset, and no verdict may say so
            self.unfit.append(fitted)
            return {argument: value}
        return {argument: fitted}
