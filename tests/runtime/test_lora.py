"""LoRAs on a native pipeline: equal to diffusers and PEFT in every form of file, gone without a trace."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import porter
from porter.core.errors import BadInputError, PorterError, UsageError
from runtime.layers.lowrank import attach, detach, takes_lora
from runtime.pipeline import ComposedPipelineBase
from runtime.quality import at_quality
from runtime.registry import load

RANK = 4
Tensors = dict[str, Tensor]
D, S = "transformer_blocks.1", "single_transformer_blocks.0"
# The original code's modules → diffusers' that they stand for, written down by hand: names, parts of the outputs.
HIDDEN = 48
ORIGINAL = {
    "double_blocks.1.img_attn.qkv": [f"{D}.attn.to_q", f"{D}.attn.to_k", f"{D}.attn.to_v"],
    "double_blocks.1.txt_attn.qkv": [f"{D}.attn.add_q_proj", f"{D}.attn.add_k_proj", f"{D}.attn.add_v_proj"],
    "double_blocks.1.img_attn.proj": [f"{D}.attn.to_out.0"],
    "double_blocks.1.txt_mlp.0": [f"{D}.ff_context.net.0.proj"],
    "double_blocks.1.img_mlp.2": [f"{D}.ff.net.2"],
    "double_blocks.1.txt_mod.lin": [f"{D}.norm1_context.linear"],
    "single_blocks.0.linear2": [f"{S}.proj_out"],
    "single_blocks.0.modulation.lin": [f"{S}.norm.linear"],
}
LINEAR1 = {"single_blocks.0.linear1": [f"{S}.attn.to_q", f"{S}.attn.to_k", f"{S}.attn.to_v", f"{S}.proj_mlp"]}
FINAL = {"final_layer.adaLN_modulation.1": ["norm_out.linear"], "txt_in": ["context_embedder"]}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():  # what other libraries say of themselves
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module")
def pipeline(bare_port: Path) -> ComposedPipelineBase:
    return porter.load(bare_port, dtype=torch.float32, device="cpu")


@pytest.fixture
def stacked(pipeline: ComposedPipelineBase) -> Iterator[ComposedPipelineBase]:
    """The shared pipeline; the test leaves it as it was, which is checked."""
    before = weights(pipeline)
    yield pipeline
    pipeline.loras.clear()
    check_base(pipeline, before)


def weights(pipeline: ComposedPipelineBase) -> Tensors:
    models = {name: module for name, module in pipeline.modules.items() if isinstance(module, nn.Module)}
    return {f"{name}.{key}": t.clone() for name, model in models.items() for key, t in model.state_dict().items()}


def check_base(pipeline: ComposedPipelineBase, before: Tensors) -> None:
    """Every weight in every bit, every class, no tensor more."""
    after = weights(pipeline)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    for model in pipeline.modules.values():
        if isinstance(model, nn.Module):
            assert not any("LowRank" in type(layer).__name__ for layer in model.modules())
            assert not any("lora" in name for name, _ in model.named_buffers())


@pytest.fixture(scope="module")
def diffusers_pipeline(bare_port: Path) -> Callable[[], Any]:
    pytest.importorskip("peft")
    import diffusers

    from runtime.loader import quiet_libraries

    def load() -> Any:
        with quiet_libraries():
            made = diffusers.FluxPipeline.from_pretrained(bare_port, torch_dtype=torch.float32)
        made.text_encoder.float()
        made.text_encoder_2.float()
        return made

    return load


def linears(model: nn.Module) -> list[str]:
    return [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]


def factors(shapes: Mapping[str, tuple[int, ...]], seed: int, a: str, b: str, *, rank: int = RANK) -> Tensors:
    """Drawn factors: `shapes` by stem; `a` and `b` end the names."""
    draw, found = torch.Generator().manual_seed(seed), {}
    for stem, (outputs, inputs) in shapes.items():
        found[stem + a] = torch.randn(rank, inputs, generator=draw) * 0.1
        found[stem + b] = torch.randn(outputs, rank, generator=draw) * 0.1
    return found


def shapes_of(model: nn.Module, prefix: str = "") -> dict[str, tuple[int, ...]]:
    return {prefix + name: tuple(model.get_submodule(name).weight.shape) for name in linears(model)}


def example(transformer: nn.Module, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Inputs of one call; B: 2, S: 6, T: 5."""
    draw = torch.Generator().manual_seed(5)
    config = transformer.config
    inputs = {
        "hidden_states": torch.randn(2, 6, config.in_channels, generator=draw),
        "encoder_hidden_states": torch.randn(2, 5, config.joint_attention_dim, generator=draw),
        "pooled_projections": torch.randn(2, config.pooled_projection_dim, generator=draw),
        "timestep": torch.tensor([0.3, 0.9]), "guidance": torch.tensor([3.5, 2.0]),
        "img_ids": torch.randint(0, 9, (6, 3), generator=draw).float(), "txt_ids": torch.zeros(5, 3),
    }  # fmt: skip
    return {name: value.to(dtype) if "ids" not in name else value for name, value in inputs.items()}


@torch.no_grad()
def compare(ours: ComposedPipelineBase, theirs: nn.Module, base: nn.Module | None = None) -> None:
    """Equal up to rounding, and far from the base model."""
    inputs = example(theirs)
    want = theirs(**inputs, return_dict=False)[0]
    got = ours.modules["transformer"](**inputs)
    assert float((got - want).abs().max()) < 5e-6
    if base is not None:
        assert float((base(**inputs, return_dict=False)[0] - want).abs().max()) > 0.05


def test_diffusers_own_files_several_at_once_with_scales(
    stacked: ComposedPipelineBase, diffusers_pipeline: Callable[[], Any], tmp_path: Path
) -> None:
    reference, base = diffusers_pipeline(), diffusers_pipeline().transformer
    shapes = shapes_of(reference.transformer, "transformer.")
    first = factors(shapes, 1, ".lora_A.weight", ".lora_B.weight")
    first |= {f"{stem}.alpha": torch.tensor(2.0) for stem in shapes}
    some = {stem: shape for number, (stem, shape) in enumerate(shapes.items()) if number % 3}  # q and k without v
    second = factors(some, 2, ".lora.down.weight", ".lora.up.weight", rank=2)
    save_file(first, tmp_path / "first.safetensors")
    save_file(second, tmp_path / "second.safetensors")
    loras = stacked.loras
    for name, scale in (("first", 0.8), ("second", -0.5)):
        reference.load_lora_weights(load_file(tmp_path / f"{name}.safetensors"), adapter_name=name)
        assert loras.add(tmp_path / f"{name}.safetensors", scale=scale) == name
    reference.set_adapters(["first"], [0.8])
    loras.set_scales({"second": 0})
    compare(stacked, reference.transformer, base)
    reference.set_adapters(["first", "second"], [0.8, -0.5])
    loras.set_scales({"second": -0.5})
    compare(stacked, reference.transformer, base)
    reference.set_adapters(["second"], [1.5])
    loras.remove("first")
    loras.set_scales({"second": 1.5})
    compare(stacked, reference.transformer, base)
    loras.remove("second")
    compare(stacked, base)


def test_a_whole_picture(stacked: ComposedPipelineBase, diffusers_pipeline: Callable[[], Any], tmp_path: Path) -> None:
    reference = diffusers_pipeline()
    parts = shapes_of(reference.transformer, "transformer.") | shapes_of(
        reference.text_encoder, "text_encoder.text_model."
    )
    save_file(factors(parts, 3, ".lora_A.weight", ".lora_B.weight"), tmp_path / "style.safetensors")
    reference.load_lora_weights(tmp_path / "style.safetensors", adapter_name="style")
    reference.set_adapters(["style"], [0.7])
    reference.set_progress_bar_config(disable=True)
    asked = {"num_inference_steps": 2, "guidance_scale": 3.0, "height": 64, "width": 64}
    given = {"prompt": "a red circle", "max_sequence_length": 32, "output_type": "pt"}
    want = reference(**given, **asked, generator=torch.Generator().manual_seed(1)).images
    plain = stacked.generate("a red circle", seed=1, **asked).output
    stacked.loras.add(tmp_path / "style.safetensors")
    got = stacked.generate("a red circle", seed=1, loras=[("style", 0.7)], **asked).output
    assert got is not None and plain is not None
    assert float((got - want).abs().max()) < 2e-5
    assert float((got - plain).abs().max()) > 0.01


def test_files_of_peft_itself(stacked: ComposedPipelineBase, bare_port: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel.from_pretrained(bare_port / "transformer", torch_dtype=torch.float32)
    for number, more in enumerate(({}, {"use_rslora": True}, {"alpha_pattern": {"attn.to_k": 3, "proj_out": 1}})):
        config = peft.LoraConfig(
            r=RANK, lora_alpha=6, target_modules=["to_q", "to_k", "to_out.0", "net.0.proj", "proj_mlp", "linear_1"],
            rank_pattern={"to_out.0": 2}, init_lora_weights=False, **more,
        )  # fmt: skip
        torch.manual_seed(number)
        wrapped = peft.get_peft_model(FluxTransformer2DModel.from_pretrained(bare_port / "transformer"), config)
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if "lora_" in name:
                    parameter.mul_(0.3)
        wrapped.save_pretrained(tmp_path / str(number))
        stacked.loras.add(tmp_path / str(number), name="peft")
        compare(stacked, wrapped.base_model.model, model)
        stacked.loras.remove("peft")


def named(modules: Mapping[str, list[str]], reference: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of the original code's weights: the outputs of its parts one after the other."""
    found = {}
    for name, parts in modules.items():
        sizes = [tuple(reference.get_submodule(part).weight.shape) for part in parts]
        found[name] = (sum(size[0] for size in sizes), sizes[0][1])
    return found


def test_kohyas_files_as_diffusers_loads_them(
    stacked: ComposedPipelineBase, diffusers_pipeline: Callable[[], Any], tmp_path: Path
) -> None:
    reference, base = diffusers_pipeline(), diffusers_pipeline().transformer
    shapes = named(ORIGINAL, base)
    flat = {"lora_unet_" + name.replace(".", "_"): shape for name, shape in shapes.items()}
    dotted = {f"diffusion_model.{name}": shape for name, shape in shapes.items()}
    for name, stems in (("kohya", flat), ("comfy", dotted)):
        tensors = factors(stems, 4, ".lora_down.weight", ".lora_up.weight")
        tensors |= {f"{stem}.alpha": torch.tensor(3.0) for stem in stems}
        save_file(tensors, tmp_path / f"{name}.safetensors")
        reference.load_lora_weights(load_file(tmp_path / f"{name}.safetensors"), adapter_name=name)
        reference.set_adapters([name], [1.2])
        stacked.loras.add(tmp_path / f"{name}.safetensors", scale=1.2)
        compare(stacked, reference.transformer, base)
        stacked.loras.remove(name)


def merged(reference: nn.Module, modules: Mapping[str, list[str]], tensors: Tensors, scale: float) -> nn.Module:
    """diffusers' model with the original code's LoRA in its weights, put there by hand."""
    for name, parts in modules.items():
        whole = tensors[f"diffusion_model.{name}.lora_B.weight"] @ tensors[f"diffusion_model.{name}.lora_A.weight"]
        if name.startswith("final_layer.adaLN"):  # (shift, scale) there, (scale, shift) here
            whole = torch.cat(whole.chunk(2)[::-1])
        begin = 0
        for part in parts:
            weight = reference.get_submodule(part).weight
            with torch.no_grad():
                weight += scale * whole[begin : begin + weight.shape[0]]
            begin += weight.shape[0]
    return reference


def test_original_names_of_layers_that_diffusers_skips(
    stacked: ComposedPipelineBase, diffusers_pipeline: Callable[[], Any], tmp_path: Path
) -> None:
    base = diffusers_pipeline().transformer
    modules = ORIGINAL | LINEAR1 | FINAL
    stems = {f"diffusion_model.{name}": shape for name, shape in named(modules, base).items()}
    tensors = factors(stems, 6, ".lora_A.weight", ".lora_B.weight")
    save_file(tensors, tmp_path / "it.safetensors")
    stacked.loras.add(tmp_path / "it.safetensors", scale=0.9)
    compare(stacked, merged(diffusers_pipeline().transformer, modules, tensors, 0.9), base)
    packed = stacked.modules["transformer"].get_submodule(f"{S}.to_qkv_mlp")
    assert packed.lora_a.shape == (RANK, HIDDEN)  # q, k, v and the MLP still share their A
    # The same names behind `transformer.`, as some tools write them.
    other = {name.replace("diffusion_model.", "transformer."): value for name, value in tensors.items()}
    save_file(other, tmp_path / "other.safetensors")
    stacked.loras.add(tmp_path / "other.safetensors", scale=0.9)
    compare(stacked, merged(diffusers_pipeline().transformer, modules, tensors, 1.8), base)


def style(pipeline: ComposedPipelineBase, folder: Path, name: str = "style", seed: int = 7) -> Path:
    """A LoRA of every layer of the transformer, in diffusers' names."""
    from diffusers import FluxTransformer2DModel

    config = dict(pipeline.config.configs["transformer"])
    with torch.device("meta"):
        shapes = shapes_of(FluxTransformer2DModel.from_config(config), "transformer.")
    file = folder / f"{name}.safetensors"
    save_file(factors(shapes, seed, ".lora_A.weight", ".lora_B.weight"), file)
    return file


def picture(pipeline: ComposedPipelineBase, **fields: Any) -> Tensor:
    made = pipeline.generate("a red circle", seed=1, num_inference_steps=1, height=64, width=64, **fields).output
    assert made is not None
    return made


def test_each_request_has_its_own(stacked: ComposedPipelineBase, tmp_path: Path) -> None:
    loras, before = stacked.loras, weights(stacked)
    plain = picture(stacked)
    loras.add(style(stacked, tmp_path, "one", 1))
    loras.add(style(stacked, tmp_path, "two", 2), scale=0.5)
    both = picture(stacked)
    assert not torch.equal(both, plain)
    assert torch.equal(picture(stacked, loras=[]), plain)
    assert torch.equal(picture(stacked, loras=[("one", 1.0), ("two", 0.5)]), both)
    one = picture(stacked, loras=[("one", 1.0)])
    assert not torch.equal(one, both)
    assert torch.equal(picture(stacked, loras=[("one", 1.0), ("two", 0)]), one)
    assert torch.equal(picture(stacked), both)  # the pipeline's own choice is back
    stacked.loras.set_scales({"two": 0})
    assert torch.equal(picture(stacked), one)
    assert [entry["name"] for entry in loras.provenance()] == ["one"]
    assert len(loras.provenance([("one", 1.0), ("two", 0.5)])[1]["sha256"]) == 64
    after = weights(stacked)
    assert after.keys() == before.keys() and all(torch.equal(after[n], before[n]) for n in before)  # beside, not in
    loras.clear()
    assert torch.equal(picture(stacked), plain)


def test_a_request_that_fails_leaves_the_pipelines_own(stacked: ComposedPipelineBase, tmp_path: Path) -> None:
    stacked.loras.add(style(stacked, tmp_path))
    want = picture(stacked)

    def stop(name: str, tensors: Mapping[str, Tensor]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        picture(stacked, loras=[], taps=[stop])
    assert torch.equal(picture(stacked), want)


def test_fused_and_back(stacked: ComposedPipelineBase, tmp_path: Path) -> None:
    loras, before = stacked.loras, weights(stacked)
    loras.add(style(stacked, tmp_path, "one", 1), scale=0.6)
    beside = picture(stacked)
    loras.fuse()
    check_class = type(stacked.modules["transformer"].x_embedder)
    assert check_class is nn.Linear
    assert float((picture(stacked) - beside).abs().max()) < 1e-5
    assert any(not torch.equal(value, before[name]) for name, value in weights(stacked).items())
    loras.add(style(stacked, tmp_path, "two", 2), scale=0.3)  # merged anew, from the originals
    both = picture(stacked)
    with pytest.raises(UsageError, match="fused"):
        picture(stacked, loras=[("one", 1.0)])
    loras.unfuse()
    after = weights(stacked)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert float((picture(stacked) - both).abs().max()) < 1e-5
    loras.fuse()
    loras.clear()  # the fixture checks every bit


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(bare_port: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    pytest.importorskip("peft")
    from diffusers import FluxTransformer2DModel

    pipeline = porter.load(bare_port, dtype=dtype, device="cpu")
    before = weights(pipeline)
    file = style(pipeline, tmp_path)
    pipeline.loras.add(file, scale=0.7)
    reference = FluxTransformer2DModel.from_pretrained(bare_port / "transformer", torch_dtype=dtype)
    reference.load_lora_adapter(load_file(file), prefix="transformer", adapter_name="style")
    reference.to(dtype)
    reference.set_adapters(["style"], [0.7])
    with torch.no_grad():
        inputs = example(reference, dtype)
        want = reference(**inputs, return_dict=False)[0]
        got = pipeline.modules["transformer"](**inputs)
        assert got.dtype == dtype
        error = float((got - want).abs().max() / want.abs().max())
        assert error < (1e-13 if dtype == torch.float64 else 0.03)
        if dtype == torch.float64:  # float64 leaves a thousandth of float32's difference: rounding alone
            assert pipeline.modules["transformer"].x_embedder.lora_scale.dtype == torch.float64
        with at_quality("exact"):
            assert torch.equal(pipeline.modules["transformer"](**inputs), want)
    pipeline.loras.clear()
    check_base(pipeline, before)


def test_a_layer_kept_in_float32_has_its_factors_so(bare_port: Path, tmp_path: Path) -> None:
    pipeline = porter.load(bare_port, dtype=torch.bfloat16, device="cpu")
    transformer = pipeline.modules["transformer"]
    transformer.proj_out.float()
    pipeline.loras.add(style(pipeline, tmp_path))
    assert transformer.proj_out.lora_a.dtype == transformer.proj_out.lora_b.dtype == torch.float32
    assert transformer.x_embedder.lora_a.dtype == torch.bfloat16
    assert transformer.x_embedder(torch.ones(1, 16, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_a_compiled_block_follows_its_stack(stacked: ComposedPipelineBase, tmp_path: Path) -> None:
    transformer = stacked.modules["transformer"]
    block = transformer.single_transformer_blocks[0]
    draw = torch.Generator().manual_seed(9)
    x, vec = torch.randn(2, 11, HIDDEN, generator=draw), torch.randn(2, HIDDEN, generator=draw)
    rope = transformer.rotary(torch.zeros(5, 3), torch.ones(6, 3))
    torch._dynamo.reset()
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    with torch.no_grad():
        base = compiled(x, vec, rope, 5)
        stacked.loras.add(style(stacked, tmp_path), scale=0.7)
        got = compiled(x, vec, rope, 5)
        assert torch.allclose(got, block(x, vec, rope, 5), atol=1e-6)
        assert float((got - base).abs().max()) > 0.05
        with torch._dynamo.config.patch(error_on_recompile=True):  # another scale is other data, not other code
            stacked.loras.set_scales({"style": 0.2})
            assert torch.allclose(compiled(x, vec, rope, 5), block(x, vec, rope, 5), atol=1e-6)
            stacked.loras.clear()
            assert torch.equal(compiled(x, vec, rope, 5), base)


def test_a_convolution_as_peft_runs_it() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(2)
    layers = nn.Sequential(nn.Conv2d(3, 5, 3, stride=2, padding=1), nn.Conv2d(5, 4, 1))
    x = torch.randn(2, 3, 8, 6)
    want = layers(x)
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["0", "1"], init_lora_weights=False)
    reference = peft.get_peft_model(copy.deepcopy(layers), config)
    for name, layer in layers.named_children():
        theirs = reference.base_model.model.get_submodule(name)
        a, b = theirs.lora_A["default"].weight.detach(), theirs.lora_B["default"].weight.detach().flatten(1)
        assert takes_lora(layer)
        attach(layer, [(a, b)], [[(slice(0, b.shape[0]), slice(0, 2), 1.5)]])
    with torch.no_grad():
        assert torch.allclose(layers(x), reference(x), atol=1e-6)
        assert not torch.allclose(layers(x), want, atol=1e-2)
        for layer in layers:
            detach(layer)
        assert torch.equal(layers(x), want)
    assert [type(layer) for layer in layers] == [nn.Conv2d, nn.Conv2d]
    assert not takes_lora(nn.Conv2d(4, 4, 3, groups=2)) and not takes_lora(nn.LayerNorm(3))


def test_a_convolution_pads_as_the_merged_weight_does() -> None:
    """Circular padding too, which PEFT's own path leaves out."""
    torch.manual_seed(3)
    layer = nn.Conv2d(3, 5, 3, padding=1, padding_mode="circular")
    a, b, x = torch.randn(2, 3, 3, 3), torch.randn(5, 2), torch.randn(2, 3, 8, 6)
    whole = copy.deepcopy(layer)
    attach(layer, [(a, b)], [[(slice(0, 5), slice(0, 2), 0.4)]])
    with torch.no_grad():
        whole.weight += 0.4 * (b @ a.flatten(1)).view_as(whole.weight)
        assert torch.allclose(layer(x), whole(x), atol=1e-5)


def test_the_executor_of_diffusers_takes_them_too(
    bare_port: Path, stacked: ComposedPipelineBase, tmp_path: Path
) -> None:
    other = load(bare_port, dtype=torch.float32, device="cpu", executor="diffusers")
    file = style(stacked, tmp_path)
    asked: dict[str, Any] = {"guidance_scale": 3.0, "max_sequence_length": 32}
    plain = picture(other, **asked)
    stacked.loras.add(file, scale=0.5)
    other.loras.add(file, scale=0.5)
    want = picture(stacked, guidance_scale=3.0)
    assert float((picture(other, **asked) - want).abs().max()) < 2e-5
    assert float((plain - want).abs().max()) > 0.01
    other.loras.clear()
    assert torch.equal(picture(other, **asked), plain)


def _change(name: str, value: Tensor | None) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(name) if value is None else tensors.update({name: value})


X = "transformer.x_embedder.lora_A.weight"
OTHER = {
    f"transformer.blocks.{i}.{a}.{p}.lora_{end}.weight": torch.ones(4, 4)
    for i in range(3) for a, parts in {"attn1": ("to_q", "to_k", "to_out.0"), "ffn": ("net.0.proj", "net.2")}.items()
    for p in parts for end in "AB"
}  # fmt: skip
BAD: dict[str, tuple[Callable[[Tensors], object], type[PorterError], str]] = {
    "NaN": (_change(X, torch.full((RANK, 16), float("nan"))), BadInputError, r"x_embedder.lora_A.weight holds NaN"),
    "another width": (
        _change(X, torch.ones(RANK, 64)),
        BadInputError,
        r"x_embedder.lora_A.weight does not fit.*\[48, 16\](.*\n)+.*\[4, 16\](.*\n)+.*\[4, 64\]",
    ),
    "unknown module": (
        lambda t: t.update(factors({"transformer.x_embeder": (48, 16)}, 1, ".lora_A.weight", ".lora_B.weight")),
        BadInputError,
        r"1 key of 51 fit no module: transformer.x_embeder \(nearest: x_embedder",
    ),
    "a norm": (
        lambda t: t.update(factors({f"transformer.{D}.attn.norm_q": (16, 1)}, 1, ".lora_A.weight", ".lora_B.weight")),
        BadInputError,
        "norm_q",
    ),
    "one weight twice": (
        lambda t: t.update(factors({"diffusion_model.x_embedder": (48, 16)}, 1, ".lora_A.weight", ".lora_B.weight")),
        BadInputError,
        "x_embedder and .*x_embedder change the same weight",
    ),
    "another family": (
        lambda t: (t.clear(), t.update(OTHER)),
        BadInputError,
        r"for .*\(WanTransformer3DModel\)(.*\n)+.*\(Flux",
    ),
    "a text encoder's": (
        lambda t: t.update(factors({"text_encoder.no.such": (4, 4)}, 1, ".lora_A.weight", ".lora_B.weight")),
        BadInputError,
        "text_encoder.no.such",
    ),
    "a component that is not there": (
        lambda t: t.update(factors({"text_encoder_3.x": (4, 4)}, 1, ".lora_A.weight", ".lora_B.weight")),
        BadInputError,
        "text_encoder_3.x",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_does_not_fit_is_refused_by_name(kind: str, stacked: ComposedPipelineBase, tmp_path: Path) -> None:
    change, error, named = BAD[kind]
    file = style(stacked, tmp_path)
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(error, match=named) as caught:
        stacked.loras.add(file)
    assert caught.value.hint
    assert stacked.loras.scales == {}


def test_wrong_use(stacked: ComposedPipelineBase, tmp_path: Path) -> None:
    loras, file = stacked.loras, style(stacked, tmp_path)
    loras.add(file)
    for call, named in (
        (lambda: loras.add(file), "loaded already"),
        (lambda: loras.add(file, "other", scale=float("nan")), "scale of other"),
        (lambda: loras.add(file, "other", component="unet"), "no unet that predicts"),
        (lambda: loras.set_scales({"style": True}), "scale of style"),
        (lambda: loras.set_scales({"none": 1.0}), "no LoRA 'none' is loaded"),
        (lambda: loras.remove("none"), "no LoRA 'none' is loaded"),
        (lambda: picture(stacked, loras=[("none", 1.0)]), "no LoRA 'none' is loaded"),
        (lambda: picture(stacked, loras=[("style", 1.0), ("style", 1.0)]), "named twice"),
        (lambda: picture(stacked, loras=["style"]), "no list of pairs"),
    ):
        with pytest.raises(UsageError, match=named):
            call()  # type: ignore[no-untyped-call]
    assert loras.scales == {"style": 1.0}


def test_what_is_taken_for_granted_is_said(stacked: ComposedPipelineBase, tmp_path: Path) -> None:
    stacked.loras.add(style(stacked, tmp_path, "without-alpha"))
    assert any("without-alpha.safetensors says no alpha" in line for line in stacked.warnings)
