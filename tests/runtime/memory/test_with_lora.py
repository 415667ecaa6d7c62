"""LoRAs beside weights that are offloaded, and beside 8-bit weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from porter.core.errors import UsageError
from runtime.pipeline import ComposedPipelineBase
from runtime.registry import load
from tests.runtime.memory.test_offload import SMALL

MODULES = ("transformer_blocks.1.attn.to_q", "transformer_blocks.1.attn.to_v", "single_transformer_blocks.0.proj_out")


@pytest.fixture
def lora(bare_port: Path, tmp_path: Path) -> Path:
    stored = load_file(bare_port / "transformer" / "diffusion_pytorch_model.safetensors")
    torch.manual_seed(3)
    tensors = {}
    for module in MODULES:
        outputs, inputs = stored[f"{module}.weight"].shape
        tensors[f"transformer.{module}.lora_A.weight"] = torch.randn(4, inputs) * 0.3
        tensors[f"transformer.{module}.lora_B.weight"] = torch.randn(outputs, 4) * 0.3
    save_file(tensors, tmp_path / "style.safetensors")
    return tmp_path / "style.safetensors"


def picture(pipeline: ComposedPipelineBase) -> Tensor:
    output = pipeline.generate("a red circle", **SMALL).output
    assert output is not None
    return output


@pytest.mark.parametrize("weights", [None, "fp8"])
@pytest.mark.parametrize("offload", ["component", "layer"])
def test_a_lora_runs_beside_offloaded_weights(bare_port: Path, lora: Path, offload: str, weights: str | None) -> None:
    options = {"dtype": torch.float32, "device": "cpu", "quality": "lossy", "weights": weights}
    expected = load(bare_port, **options)
    plain = picture(expected)
    expected.loras.add(lora, scale=0.7)
    pipeline = load(bare_port, **options, offload=offload)
    pipeline.loras.add(lora, scale=0.7)
    assert torch.equal(picture(pipeline), picture(expected))
    assert not torch.allclose(picture(expected), plain, atol=1e-4)
    pipeline.loras.clear()
    assert torch.equal(picture(pipeline), plain)


@pytest.mark.parametrize(
    ("options", "words"), [({"offload": "layer"}, "offloaded"), ({"weights": "fp8"}, "is quantised")]
)
def test_merging_into_such_weights_is_refused(bare_port: Path, lora: Path, options: dict[str, str], words: str) -> None:
    pipeline = load(bare_port, dtype=torch.float32, device="cpu", quality="lossy", **options)
    pipeline.loras.add(lora)
    with pytest.raises(UsageError, match=words):
        pipeline.loras.fuse()
