"""GGUF weights: exactly the numbers that the format's own package reads, from diffusers' and from original names."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from porter.core.checkpoint import specs
from porter.core.described import full_config
from porter.core.errors import BadInputError, CheckpointError, MissingError, UsageError
from porter.core.execute import apply
from porter.core.recipe import compile_recipe
from runtime.loader import load_module
from runtime.memory.gguf import dequantise
from runtime.registry import load
from tests.runtime.memory.test_offload import SMALL, here, write_wan
from tests.runtime.ports import write_port

gguf = pytest.importorskip("gguf")
KINDS = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q6_K", "BF16")


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A port whose widths are multiples of a block's 32 numbers."""
    return write_port(tmp_path_factory.mktemp("ports") / "port", heads=4)


def stored(port: Path) -> dict[str, Tensor]:
    return load_file(port / "transformer" / "diffusion_pytorch_model.safetensors")


def write_gguf(path: Path, tensors: dict[str, Tensor], kinds: Any) -> dict[str, Tensor]:
    """Write a GGUF file, and return what its own package reads of it; `kinds(name)`: type of a matrix, or None."""
    writer, back = gguf.GGUFWriter(str(path), "flux"), {}
    for name, tensor in tensors.items():
        kind = kinds(name) if tensor.ndim == 2 and tensor.shape[1] % 32 == 0 else None
        if kind is None:
            writer.add_tensor(name, tensor.float().numpy())
            back[name] = tensor.float()
            continue
        number = gguf.GGMLQuantizationType[kind]
        data = gguf.quants.quantize(tensor.float().numpy(), number)
        writer.add_tensor(name, data, raw_dtype=number)
        back[name] = torch.from_numpy(gguf.quants.dequantize(data, number).copy()).view(tensor.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return back


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_are_those_of_the_package(kind: str) -> None:
    number = gguf.GGMLQuantizationType[kind]
    torch.manual_seed(1)
    weights = torch.randn(6, 512)
    try:
        data = gguf.quants.quantize(weights.numpy(), number)
    except NotImplementedError:  # some types are only read: blocks of random bytes, with finite scales
        block, width = gguf.GGML_QUANT_SIZES[number]
        blocks = torch.randint(0, 256, (6 * 512 // block, width), dtype=torch.uint8)
        small = torch.rand(len(blocks), 2).half().view(torch.uint8)
        blocks[:, :4] = small
        if kind == "Q6_K":
            blocks[:, -2:] = small[:, :2]
        data = blocks.view(6, -1).numpy()
    expected = torch.from_numpy(gguf.quants.dequantize(data, number).copy()).flatten()
    found = dequantise(torch.from_numpy(data.copy()).view(torch.uint8).flatten(), kind)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected.float())


@pytest.mark.parametrize("offload", ["none", "layer"])
@pytest.mark.parametrize("names", ["diffusers", "original", "original with a prefix"])
def test_pictures_are_those_of_the_dequantised_weights(port: Path, tmp_path: Path, names: str, offload: str) -> None:
    tensors = stored(port)
    inverse: Any = None
    if names != "diffusers":
        recipe = importlib.import_module("conversions.flux1.recipe").TRANSFORMER
        told = json.loads((port / "transformer" / "config.json").read_text())
        config = full_config("diffusers", "FluxTransformer2DModel", told)
        ours = specs({name: tuple(tensor.shape) for name, tensor in tensors.items()})
        plan = compile_recipe(recipe, config, recipe.source_headers(config), ours)
        inverse = plan.inverse()
        tensors = apply(inverse, tensors)
    prefix = "model.diffusion_model." if "prefix" in names else ""
    mixed = lambda name: "Q8_0" if "to_v" in name or "img_attn" in name else "Q4_0"  # noqa: E731
    file = tmp_path / "model.gguf"
    back = write_gguf(file, {prefix + name: tensor for name, tensor in tensors.items()}, mixed)
    back = {name.removeprefix(prefix): tensor for name, tensor in back.items()}
    if inverse is not None:
        back = apply(plan, back)
    reference = load(port, dtype=torch.float32, device="cpu", quality="lossy")
    model: Any = reference.denoiser
    fresh = {name: tensor.clone().contiguous() for name, tensor in back.items()}
    (tmp_path / "dense").mkdir()
    save_file(fresh, tmp_path / "dense" / "diffusion_pytorch_model.safetensors")
    config_of = json.loads((port / "transformer/config.json").read_text())
    dense = load_module(type(model), config_of, tmp_path / "dense", dtype=torch.float32, device=torch.device("cpu"))
    with torch.no_grad():
        for name, layer in model.named_modules():  # laid out as dequantised weights are
            for leaf in list(layer._parameters):
                if layer._parameters[leaf] is not None:
                    value = dense.get_parameter(f"{name}.{leaf}".removeprefix("."))
                    setattr(layer, leaf, nn.Parameter(value.clone(), False))
    pipeline = load(port, dtype=torch.float32, device="cpu", quality="lossy", weights=f"gguf:{file}", offload=offload)
    kinds = {type(part).__name__ for part in pipeline.denoiser.modules()}
    assert {"GgufPackedLinear", "GgufLinear"} <= kinds
    for seed in (0, 1):
        found = pipeline.generate("a red circle", seed=seed, **SMALL).output
        expected = reference.generate("a red circle", seed=seed, **SMALL).output
        assert found is not None
        assert expected is not None
        assert torch.equal(found, expected)
    if offload == "none":
        assert here(pipeline.denoiser) < 0.6 * here(model)


def test_files_that_do_not_fit_are_refused(port: Path, tmp_path: Path) -> None:
    tensors = stored(port)
    file = tmp_path / "model.gguf"
    lossy = {"dtype": torch.float32, "device": "cpu", "quality": "lossy", "weights": f"gguf:{file}"}
    with pytest.raises(MissingError):
        load(port, **lossy)
    file.write_bytes(b"no GGUF")
    with pytest.raises(CheckpointError):
        load(port, **lossy)
    first = next(iter(tensors))
    write_gguf(file, {name: tensor for name, tensor in tensors.items() if name != first}, lambda _: "Q8_0")
    with pytest.raises(BadInputError, match="in any layout"):
        load(port, **lossy)
    write_gguf(file, tensors | {first: tensors[first].new_zeros(3, 3)}, lambda _: None)
    with pytest.raises(BadInputError, match=first.replace(".", r"\.")):
        load(port, **lossy)
    write_gguf(file, tensors, lambda _: "Q8_0")
    with pytest.raises(UsageError, match="rounds the weights"):
        load(port, **lossy | {"quality": "lossless"})


def test_two_denoisers_are_refused(tmp_path: Path) -> None:
    write_wan(tmp_path / "port", "a14b")
    (tmp_path / "x.gguf").write_bytes(b"")
    with pytest.raises(UsageError, match="one denoiser"):
        load(tmp_path / "port", device="cpu", quality="lossy", weights=f"gguf:{tmp_path / 'x.gguf'}")
