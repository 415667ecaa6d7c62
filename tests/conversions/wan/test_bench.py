"""Wan's benchmark cases: released sizes, and both sides do the same work."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel

from conversions.wan.bench import CASES
from conversions.wan.model import WanTransformer
from runtime.bench.case import drawn
from runtime.bench.run import count_flops
from runtime.loader import packed
from tests.conversions.proofs.wan import TRANSFORMERS

REAL = {real.name: real.config for proof in TRANSFORMERS for real in proof.real}


@pytest.mark.parametrize(
    ("case", "model", "tflop"),
    [(CASES[0], "Wan2.1 T2V 1.3B", 283), (CASES[1], "Wan2.2 TI2V 5B", 517)],
)
def test_the_sizes_are_the_released_models(case: Any, model: str, tflop: int) -> None:
    assert {k: tuple(v) if isinstance(v, list) else v for k, v in case.config.items()} == REAL[model]
    assert round(count_flops(case, WanTransformer, torch.bfloat16) / case.passes / 1e12) == tflop


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@torch.no_grad()
def test_both_sides_answer_the_same(case: Any) -> None:
    small = case.shrunk()
    torch.manual_seed(0)
    theirs = WanTransformer3DModel.from_config(dict(small.config)).eval()
    ours = WanTransformer.from_config(small.config).eval()
    ours.load_state_dict(packed(WanTransformer, small.config, theirs.state_dict()))
    given = small.inputs(small.config, small.sizes, drawn(torch.device("cpu"), torch.float32))
    expected = theirs(**given, return_dict=False)[0]
    native = small.native_inputs(ours, given)
    for _ in range(2):  # the second time with the text's keys that the first left
        assert (ours(**native) - expected).abs().max() < 1e-5
