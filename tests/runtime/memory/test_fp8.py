"""8-bit weights: exactly what a dequantised model computes, at half the size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from porter.core.errors import UsageError
from runtime.compiled import blocks_of
from runtime.layers import PackedLinear
from runtime.memory.fp8 import KIND, LARGEST, dequantise, linears, quantise
from runtime.registry import load
from tests.runtime.memory.test_offload import SMALL, here

LOSSY = {"dtype": torch.float32, "device": "cpu", "quality": "lossy", "weights": "fp8"}


def test_rows_keep_their_own_scale() -> None:
    torch.manual_seed(0)
    weight = torch.randn(12, 40) * torch.logspace(-6, 4, 12)[:, None]
    weight[3] = 0
    stored, scale = quantise(weight)
    assert stored.dtype == KIND
    assert scale.shape == (12, 1)
    back = dequantise(stored, scale, torch.float32)
    largest = weight.abs().amax(1, keepdim=True)
    assert ((back - weight).abs() <= largest / LARGEST * 16 + 1e-30).all()  # half a step between the largest numbers
    assert torch.equal(back[3], torch.zeros(40))
    assert not torch.allclose(back, weight, rtol=1e-3)  # or it would be no 8 bits


@pytest.mark.parametrize("offload", ["none", "component", "layer"])
def test_results_are_those_of_the_dequantised_weights(bare_port: Path, offload: str) -> None:
    pipeline = load(bare_port, **LOSSY, offload=offload)
    reference = load(bare_port, dtype=torch.float32, device="cpu", quality="lossy")
    changed = 0
    with torch.no_grad():
        for name, layer in reference.denoiser.named_modules():
            inside = any(part is layer for block in blocks_of(reference.denoiser) for part in block.modules())
            if inside and isinstance(layer, nn.Linear):
                layer.weight = nn.Parameter(dequantise(*quantise(layer.weight), torch.float32), False)
                assert isinstance(pipeline.denoiser.get_submodule(name), type(layer)), name
                changed += 1
    assert changed > 20
    expected = reference.generate("a red circle", **SMALL).output
    for _ in range(2):
        found = pipeline.generate("a red circle", **SMALL).output
        assert found is not None
        assert expected is not None
        assert torch.equal(found, expected)
    plain = load(bare_port, dtype=torch.float32, device="cpu").generate("a red circle", **SMALL).output
    assert plain is not None
    assert 1e-6 < (plain - expected).abs().max() < 0.2


def test_what_is_stored_in_8_bits(bare_port: Path) -> None:
    plain = load(bare_port, dtype=torch.bfloat16, device="cpu").denoiser
    model = load(bare_port, **{**LOSSY, "dtype": torch.bfloat16}).denoiser
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            assert (layer.weight.dtype == KIND) == ("transformer_blocks" in name), name
    packed = [layer for layer in model.modules() if isinstance(layer, PackedLinear)]
    assert packed
    assert plain.state_dict().keys() == model.state_dict().keys()
    assert here(model) < 0.65 * here(plain)


def test_it_must_be_allowed(bare_port: Path) -> None:
    for quality in ("exact", "lossless"):
        with pytest.raises(UsageError, match="rounds the weights") as caught:
            load(bare_port, **{**LOSSY, "quality": quality})
        assert caught.value.hint == "--weights fp8 --quality lossy"


def test_layers_that_stay_float32_are_left_alone() -> None:
    class Two(nn.Module):
        _keep_in_fp32_modules = ("time",)

        def __init__(self) -> None:
            super().__init__()
            block = [nn.ModuleDict({"time": nn.Linear(4, 4), "up": nn.Linear(4, 4)}) for _ in range(2)]
            self.blocks = nn.ModuleList(block)
            self.out = nn.Linear(4, 4)

    model = Two()
    assert linears(model, list(model.state_dict())) == ["blocks.0.up", "blocks.1.up"]
