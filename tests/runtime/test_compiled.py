"""Regional compilation: which blocks, and that they compute what they computed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from porter.core.errors import UsageError
from runtime.compiled import blocks_of, compile_blocks
from runtime.registry import load


def test_blocks_are_the_outermost_repeated_modules() -> None:
    inner = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    block = nn.Module()
    block.parts = inner
    other = nn.Module()
    other.parts = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    model = nn.Module()
    model.blocks, model.mixed = nn.ModuleList([block, other]), nn.ModuleList([nn.Linear(2, 2), nn.ReLU()])
    model.alone = nn.ModuleList([nn.Linear(2, 2)])
    assert blocks_of(model) == [block, other]


def test_a_cpu_without_a_compiler_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UsageError, match="compiler"):
        compile_blocks(nn.Linear(2, 2))


def test_native_blocks_have_no_graph_breaks(bare_port: Path) -> None:
    """What breaks a graph costs more than compilation wins; backend eager needs no compiler."""
    pipeline = load(bare_port, dtype=torch.float32, device="cpu")
    plain = pipeline.generate("a", num_inference_steps=2).output
    for block in blocks_of(pipeline.denoiser):
        block.compile(fullgraph=True, backend="eager")
    found = pipeline.generate("a", num_inference_steps=2).output
    assert plain is not None and found is not None and torch.equal(plain, found)
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler about itself
def test_compiled_blocks_differ_by_rounding(bare_port: Path) -> None:
    plain = load(bare_port, dtype=torch.float32, device="cpu").generate("a", num_inference_steps=2).output
    found = (
        load(bare_port, dtype=torch.float32, device="cpu", compiled=True).generate("a", num_inference_steps=2).output
    )
    assert plain is not None and found is not None
    assert (plain - found).abs().max() < 1e-5
