"""A LoRA on every native family: the packed model's pictures are those of diffusers' own classes with the same file."""

from __future__ import annotations

import importlib
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from runtime.pipeline import ComposedPipelineBase
from runtime.registry import load
from tests.conversions.sd3.ports import MEDIUM

SMALL = {"height": 32, "width": 32}
GUIDED = {"guidance_scale": 3.0, "guidance_scale_2": 2.0, "negative_prompt": "blue", "max_sequence_length": 16}
# family → what its ports.py is told, and what is asked for
FAMILIES: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "glm_image": ((), {"height": 64, "width": 64}),
    "qwen_image": ((), SMALL),
    "sd3": ((MEDIUM,), SMALL | {"guidance_scale": 1.0, "max_sequence_length": 32}),
    "wan": (("a14b",), SMALL | GUIDED | {"num_frames": 5}),  # two denoisers
    "z_image": ((), SMALL),
}


def write_lora(pipeline: ComposedPipelineBase, file: Path) -> None:
    """Factors of every linear layer and convolution of the denoisers, in diffusers' names."""
    draw, tensors = torch.Generator().manual_seed(1), {}
    for name in ("transformer", "transformer_2"):
        model = pipeline.modules.get(name)
        for module, layer in model.named_modules() if isinstance(model, nn.Module) else ():
            if isinstance(layer, nn.Linear | nn.Conv2d | nn.Conv3d):
                rows, *inputs = layer.weight.shape
                kernel = [1] * (len(inputs) - 1)
                tensors[f"{name}.{module}.lora_A.weight"] = 0.08 * torch.randn(3, *inputs, generator=draw)
                tensors[f"{name}.{module}.lora_B.weight"] = 0.08 * torch.randn(rows, 3, *kernel, generator=draw)
    save_file(tensors, file)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_layers_take_it_as_diffusers_layers_do(family: str, tmp_path: Path) -> None:
    words, asked = FAMILIES[family]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the libraries say while they write
        importlib.import_module(f"tests.conversions.{family}.ports").write_port(tmp_path / "port", *words)
        native, plain = (load(tmp_path / "port", dtype=torch.float32, device="cpu", executor=e)
                         for e in ("native", "diffusers"))  # fmt: skip

    def picture(pipeline: ComposedPipelineBase) -> Tensor:
        made = pipeline.generate("a red circle", seed=1, num_inference_steps=2, **asked).output
        assert made is not None
        return made

    before = picture(native)
    write_lora(plain, tmp_path / "it.safetensors")
    for pipeline in (native, plain):
        pipeline.loras.add(tmp_path / "it.safetensors", scale=0.6)
    with_lora = picture(native)
    assert float((with_lora - picture(plain)).abs().max()) < 2e-5
    assert float((with_lora - before).abs().max()) > 0.01
    native.loras.clear()
    assert torch.equal(picture(native), before)
