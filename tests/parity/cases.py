"""Small case files for tests of references that misbehave: written to disk, as a user's are."""

from __future__ import annotations

from pathlib import Path

HEAD = """
import dataclasses, os, signal, sys, time
import torch
from torch import nn
from parity.case import Case, Side

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
    def forward(self, x):
        return x + self.down(torch.nn.functional.gelu(self.up(x)))

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.blocks, self.head = nn.Linear(4, 8), nn.ModuleList([Block(), Block()]), nn.Linear(8, 4)
    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)

def inputs(config, draw):
    return {"x": draw("x", 2, 3, 4)}
"""
TAIL = """
case = Case(
    reference=Side(build=lambda config: Reference(), call=globals().get("call", lambda m, i: m(**i))),
    candidate=Side(build=lambda config: Net()), inputs=inputs, name="net", **globals().get("more", {}),
)
"""


def write_case(folder: Path, reference: str = "Reference = Net", name: str = "case.py") -> str:
    """A case file whose reference is what `reference` defines as `Reference` -> its path.

    `call` in it is how the reference is called, `more` further arguments of the case.
    """
    path = folder / name
    path.write_text(HEAD + reference + TAIL, encoding="utf-8")
    return str(path)
