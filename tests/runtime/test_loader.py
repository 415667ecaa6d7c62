"""Loading: strict, from real files, with the damaged thing's name in the message."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import porter
from porter.core.errors import BadInputError, CheckpointError, MissingError, PorterError
from runtime.loader import library_class, load_components, packed, without_videos
from runtime.registry import load

CPU = torch.device("cpu")
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
BIAS = "transformer_blocks.1.attn.to_q.bias"


def test_every_parameter_is_filled_and_nothing_trains(bare_port: Path) -> None:
    pipeline = load(bare_port, dtype=torch.float32, device="cpu")
    stored = load_file(bare_port / WEIGHTS)
    transformer = pipeline.modules["transformer"]
    config = json.loads((bare_port / "transformer/config.json").read_text())
    expected = packed(type(transformer), config, stored)
    assert {name for name, _ in transformer.named_parameters()} == set(expected)
    for name, parameter in transformer.named_parameters():
        assert torch.equal(parameter, expected[name])
    at = "transformer_blocks.1.attn"
    stacked = torch.cat([stored[f"{at}.to_{n}.weight"] for n in "qkv"])
    assert torch.equal(transformer.get_parameter(f"{at}.to_qkv.weight"), stacked)
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        assert not pipeline.modules[name].training, name
        assert {p.dtype for p in pipeline.modules[name].parameters()} == {torch.float32}, name
    assert not any(p.requires_grad for p in transformer.parameters())


def test_dtype_is_the_one_asked_for(bare_port: Path) -> None:
    pipeline = load(bare_port, dtype=torch.bfloat16, device="cpu")
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        assert {p.dtype for p in pipeline.modules[name].parameters()} == {torch.bfloat16}, name
    batch = pipeline.generate("a red circle", num_inference_steps=1)
    assert batch.output is not None
    assert batch.output.isfinite().all()


def test_sharded_weights_load_the_same(own_bare_port: Path) -> None:
    stored = load_file(own_bare_port / WEIGHTS)
    (own_bare_port / WEIGHTS).unlink()
    names = sorted(stored)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, keys in shards.items():
        save_file({k: stored[k] for k in keys}, own_bare_port / "transformer" / file)
    index = {"metadata": {}, "weight_map": {key: file for file, keys in shards.items() for key in keys}}
    (own_bare_port / "transformer" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    transformer = load(own_bare_port, dtype=torch.float32, device="cpu").modules["transformer"]
    config = json.loads((own_bare_port / "transformer/config.json").read_text())
    expected = packed(type(transformer), config, stored)
    for name, parameter in transformer.named_parameters():
        assert torch.equal(parameter, expected[name])


def _tensors(change: Callable[[dict[str, torch.Tensor]], object], file: str = WEIGHTS) -> Callable[[Path], None]:
    def damage(port: Path) -> None:
        stored = load_file(port / file)
        change(stored)
        save_file(stored, port / file, metadata={"format": "pt"})

    return damage


def _truncate(port: Path) -> None:
    data = (port / WEIGHTS).read_bytes()
    (port / WEIGHTS).write_bytes(data[:-1000])


def _garbage(port: Path) -> None:
    (port / "vae/diffusion_pytorch_model.safetensors").write_bytes(b"\xff" * 4096)


def _index(change: Callable[[dict[str, object]], object]) -> Callable[[Path], None]:
    def damage(port: Path) -> None:
        index = json.loads((port / "model_index.json").read_text())
        change(index)
        (port / "model_index.json").write_text(json.dumps(index))

    return damage


def _no_weights(port: Path) -> None:
    (port / WEIGHTS).unlink()


def _original(port: Path) -> None:
    shutil.move(port / WEIGHTS, port / "flux1-dev.safetensors")


def _config(change: dict[str, object]) -> Callable[[Path], None]:
    def damage(port: Path) -> None:
        path = port / "transformer" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))

    return damage


def _broken_tokenizer(port: Path) -> None:
    (port / "tokenizer_2" / "tokenizer.json").write_text("{")


DAMAGE: dict[str, tuple[Callable[[Path], None], type[PorterError], str]] = {
    "missing tensor": (_tensors(lambda t: t.pop(BIAS)), CheckpointError, f"1 missing: {BIAS}"),
    "extra tensor": (_tensors(lambda t: t.update(surplus=torch.ones(2))), CheckpointError, "1 unexpected: surplus"),
    "wrong shape": (_tensors(lambda t: t.update({BIAS: torch.ones(47)})), CheckpointError, rf"{BIAS} is \(47,\), not"),
    "truncated": (_truncate, CheckpointError, "diffusion_pytorch_model.safetensors"),
    "garbage": (_garbage, CheckpointError, "vae"),
    "more layers in config": (_config({"num_layers": 3}), CheckpointError, r"transformer_blocks\.2\."),
    "unknown config key": (_config({"flavour": 1}), BadInputError, "flavour"),
    "text encoder lacks a tensor": (
        _tensors(lambda t: t.pop("shared.weight"), "text_encoder_2/model.safetensors"),
        CheckpointError,
        "shared.weight",
    ),
    "unknown class": (_index(lambda i: i.update(vae=["diffusers", "AutoencoderXYZ"])), BadInputError, "AutoencoderXYZ"),
    "code of the repository": (_index(lambda i: i.update(vae=["my_vae", "Vae"])), BadInputError, "never runs"),
    "class of another kind": (
        _index(lambda i: i.update(vae=["diffusers", "FluxPipeline"])),
        BadInputError,
        "not a model",
    ),
    "no such component": (_index(lambda i: i.pop("vae")), BadInputError, "no component 'vae'"),
    "unknown pipeline": (_index(lambda i: i.update(_class_name="NoPipeline")), BadInputError, "NoPipeline"),
    "index names nothing": (_index(lambda i: i.pop("_class_name")), BadInputError, "names no pipeline"),
    "index is no JSON": (lambda p: (p / "model_index.json").write_text("{"), BadInputError, "model_index.json"),  # type: ignore[dict-item,return-value]
    "no weights": (_no_weights, BadInputError, "holds no weights"),
    "original layout": (_original, BadInputError, "original layout"),
    "no config": (lambda p: (p / "transformer/config.json").unlink(), MissingError, "config.json"),
    "broken tokenizer": (_broken_tokenizer, BadInputError, "tokenizer_2"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_port_is_refused_by_name(own_bare_port: Path, kind: str) -> None:
    damage, error, named = DAMAGE[kind]
    damage(own_bare_port)
    with pytest.raises(error, match=named) as caught:
        load(own_bare_port, dtype=torch.float32, device="cpu")
    assert caught.value.hint


def test_no_such_port(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="nowhere"):
        load(tmp_path / "nowhere")
    with pytest.raises(BadInputError, match="not a pipeline folder"):
        load(tmp_path)


def test_the_class_list_is_closed() -> None:
    named = (("os", "system"), ("diffusers.utils", "logging"), ("transformers", "__version__"), ("flux", "NoSuchModel"))
    for library, name in named:
        with pytest.raises(BadInputError):
            library_class(library, name)


def test_a_class_is_found_by_the_module_of_diffusers_pipelines_that_hands_it_on() -> None:
    """diffusers writes such a module's name into model_index.json where it cannot tell the library."""
    import transformers

    found = library_class("glm_image", "GlmImageForConditionalGeneration")
    assert found is transformers.GlmImageForConditionalGeneration
    checker = library_class("stable_diffusion", "StableDiffusionSafetyChecker")
    assert checker.__module__ == "diffusers.pipelines.stable_diffusion.safety_checker"


def test_the_public_api_loads_a_pipeline_that_generates(bare_port: Path) -> None:
    pipeline = porter.load(bare_port, dtype=torch.float32, device="cpu")
    assert pipeline.generate("a red circle", num_inference_steps=1).output.shape == (1, 3, 64, 64)


def test_only_the_asked_components_are_loaded(bare_port: Path) -> None:
    loaded = load_components(bare_port, ["vae"], native_models={}, dtype=torch.float32, device=CPU)
    assert list(loaded.modules) == ["vae"]


def test_a_processor_loads_without_its_part_for_videos() -> None:
    """That part takes another library; what stays is called and written as before."""
    from transformers import CLIPImageProcessor, Qwen2VLProcessor

    cls = without_videos(Qwen2VLProcessor)
    assert cls.get_attributes() == ["image_processor", "tokenizer"] and issubclass(cls, Qwen2VLProcessor)
    assert (cls.__module__, cls.__name__) == (Qwen2VLProcessor.__module__, "Qwen2VLProcessor")
    assert without_videos(CLIPImageProcessor) is CLIPImageProcessor
