"""The executor `diffusers` against diffusers itself on the same folders, bit by bit; refusals by name."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import porter
from porter.cli import main
from porter.core.errors import BadInputError, CheckFailed, PorterError, UsageError
from porter.core.weights import STANDARD
from runtime.calls import as_declared, describe_call, fits, pipeline_class
from runtime.loader import component_header, load_components, load_module, quiet_libraries
from runtime.registry import describe
from runtime.request import Req
from tests.runtime.pipelines import PICTURE, PIPELINES, write

# of diffusers' schedulers and numpy
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """name -> the pipeline's folder, to read."""
    made: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in made:
            made[name] = write(name, tmp_path_factory.mktemp("pipelines") / name)
        return made[name]

    return of


def load(folder: Path, **options: Any) -> Any:
    return porter.load(folder, executor="diffusers", **({"dtype": torch.float32, "device": "cpu"} | options))


def theirs_of(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """diffusers' own pipeline. Nothing trains: torch's linear layers on the CPU round otherwise for weights that do."""
    with quiet_libraries():
        pipe = diffusers.DiffusionPipeline.from_pretrained(folder, dtype=dtype, **options)
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False)
    return pipe


def run_theirs(pipe: Any, name: str, seeds: list[int], **changes: Any) -> Tensor:
    """What diffusers makes, (B, 3, H, W) or (B, 3, F, H, W)."""
    made = PIPELINES[name]
    asked = {**made.fields, **made.extra}
    asked |= {"frame_rate": asked.pop("fps")} if name == "ltx" else {}
    asked |= {"prompt": made.prompt} if made.prompt else {}
    asked |= {"image": made.images[0]} if made.images else {}
    asked |= {"original_size": tuple(asked["original_size"])} if "original_size" in asked else {}
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    with quiet_libraries():
        found = pipe(
            **asked | changes, output_type="pt", generator=generators if len(generators) > 1 else generators[0]
        )
    shown = found.frames if made.video else found.images
    if isinstance(shown, np.ndarray):  # pipelines that know only two types of output
        shown = torch.from_numpy(shown).movedim(-1, 1)
    return torch.as_tensor(shown.transpose(1, 2) if made.video else shown)


def run_ours(pipeline: Any, name: str, **changes: Any) -> Req:
    made = PIPELINES[name]
    fields = {**made.fields, "extra": dict(made.extra), "image": list(made.images) or None, "seed": 3} | changes
    return pipeline.generate(fields.pop("prompt", made.prompt), **fields)  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", PIPELINES)
def test_every_bit_is_that_of_diffusers(name: str, folder: Any) -> None:
    """The result, and every tensor of every component in half precision: tables and what stays in float32 too."""
    steps: list[str] = []
    batch = run_ours(load(folder(name)), name, taps=[lambda tap, tensors: steps.append(tap)])
    theirs = run_theirs(theirs_of(folder(name)), name, [3])
    assert batch.output is not None and torch.equal(batch.output, theirs)
    assert float(theirs.std()) > 1e-2  # no comparison of two grey pictures
    assert not any("made" in line for line in batch.warnings)
    assert steps[:2] == ["denoising.step.0", "denoising.step.1"] and steps[-1] == "denoising"

    half = torch.float16 if name in ("ltx", "pixart-sigma") else torch.bfloat16  # T5 keeps more of the former
    same_tensors(load(folder(name), dtype=half).modules, theirs_of(folder(name), half).components)


def same_tensors(ours: Any, other: Any) -> None:
    assert ours.keys() == other.keys()
    for part, module in other.items():
        if isinstance(module, torch.nn.Module):
            expected = dict([*module.named_parameters(), *module.named_buffers()])
            found = dict([*ours[part].named_parameters(), *ours[part].named_buffers()])
            assert found.keys() == expected.keys(), part
            for key, tensor in expected.items():
                assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor), f"{part}.{key}"
        else:
            assert type(ours[part]) is type(module), part


def test_what_a_class_keeps_in_float32_stays_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a package that diffusers takes for granted is asked for by name."""
    from diffusers.pipelines.wan import pipeline_wan_i2v

    from tests.conversions.wan.ports import write_port

    write_port(tmp_path / "wan", "i2v")
    ours = load(tmp_path / "wan", dtype=torch.bfloat16)
    kinds = {tensor.dtype for tensor in ours.denoiser.state_dict().values()}
    assert kinds == {torch.float32, torch.bfloat16}
    same_tensors(ours.modules, theirs_of(tmp_path / "wan", torch.bfloat16).components)
    monkeypatch.delattr(pipeline_wan_i2v, "ftfy", raising=False)  # where it is installed
    with pytest.raises(UsageError, match="WanImageToVideoPipeline needs a package that is not installed") as caught:
        ours.generate("a", image=[PICTURE], num_inference_steps=1, height=32, width=32, num_frames=5)
    assert caught.value.hint == "pip install ftfy"


def test_settings_are_of_the_kinds_that_the_call_says() -> None:
    call = inspect.signature(diffusers.StableDiffusionXLPipeline.__call__).parameters
    assert as_declared(call["original_size"], [4, 8]) == (4, 8)
    assert as_declared(call["sigmas"], [1.0, 0.5]) == [1.0, 0.5]
    assert fits(call["denoising_end"], 0.5) and fits(call["denoising_end"], 1) and fits(call["denoising_end"], None)
    assert not fits(call["denoising_end"], "half") and not fits(call["ip_adapter_image"], "<Image>")
    assert fits(call["ip_adapter_image"], PICTURE) and not fits(call["prompt_2"], PICTURE)
    kind = inspect.signature(diffusers.HunyuanVideoFramepackPipeline.__call__).parameters["sampling_type"]
    assert fits(kind, "vanilla") and not fits(kind, "chocolate")
    assert as_declared(kind, "vanilla") is type(kind.default).VANILLA


def test_computed_tables_have_the_type_that_diffusers_gives_them(tmp_path: Path) -> None:
    """A mask that names no type: half precision where the weights are."""
    cls = diffusers.PriorTransformer
    cls(
        num_attention_heads=2, attention_head_dim=4, embedding_dim=8, num_layers=1, num_embeddings=7
    ).save_pretrained(tmp_path)  # fmt: skip
    config = json.loads((tmp_path / "config.json").read_text())
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        ours = load_module(cls, config, tmp_path, dtype=dtype, device=CPU)
        theirs = cls.from_pretrained(tmp_path, dtype=dtype)
        assert theirs.get_buffer("causal_attention_mask").dtype == dtype
        same_tensors({"": ours}, {"": theirs})


@pytest.mark.slow
def test_every_pipeline_of_diffusers_is_described_or_refused() -> None:
    names = sorted({name for names in diffusers._import_structure.values() for name in names})
    kinds = [found for name in names if name.endswith("Pipeline") and (found := getattr(diffusers, name, None))]
    runs = 0
    for cls in kinds:
        parts = getattr(cls, "_backends", None) or inspect.signature(cls.__init__).parameters
        index: dict[str, Any] = {name: ["diffusers", "AutoencoderKL"] for name in parts}
        try:
            config, params = describe_call(pipeline_class(cls.__name__), index)
        except PorterError as error:
            assert error.hint
            continue
        runs += 1
        assert config.call.keys() >= params.extra.keys()
        plain = {name: value for name, value in params.extra.items() if isinstance(value, int | float | str)}
        assert all(fits(config.call[name], getattr(value, "value", value)) for name, value in plain.items()), cls
        assert not {"generator", "output_type", "return_dict", "latents"} & params.extra.keys(), cls
    assert len(kinds) > 280 and runs > 250


@pytest.mark.parametrize("name", ["sd", "sdxl", "ltx", "aura-flow", "pixart-sigma", "text-to-video"])
def test_several_prompts_and_pictures_have_seeds_of_their_own(name: str, folder: Any) -> None:
    ours, prompts = load(folder(name)), ["a red circle", "two blue squares"]
    given = {**PIPELINES[name].fields, "negative_prompt": "green", "guidance_scale": 3.0}
    batch = run_ours(ours, name, prompt=prompts, num_images=2, **given)
    more: dict[str, Any] = {"negative_prompt": ["green"] * 2, "guidance_scale": 3.0}
    more |= {"prompt_2": ["a blue square"] * 2} if name == "sdxl" else {}
    more |= {"prompt": prompts, "num_videos_per_prompt" if name == "ltx" else "num_images_per_prompt": 2}
    if name == "text-to-video":  # it has no such number
        more = {"prompt": [each for each in prompts for _ in range(2)], "negative_prompt": ["green"] * 4}
        more["guidance_scale"] = 3.0
    theirs = run_theirs(theirs_of(folder(name)), name, [3, 4, 5, 6], **more)
    assert batch.output is not None and torch.equal(batch.output, theirs)
    alone = run_ours(ours, name, prompt=prompts[1], seed=6, **given).output
    assert alone is not None and (batch.output[3:] - alone).abs().max() < 1e-4
    assert (batch.output[2:3] - alone).abs().max() > 1e-2


def test_a_pipeline_that_makes_no_batches_says_how_it_runs(folder: Any) -> None:
    """diffusers' own fault: noise of the steps is drawn for each frame, from generators of the videos."""
    with pytest.raises(UsageError, match="does not make 2 at once") as caught:
        run_ours(load(folder("text-to-video")), "text-to-video", num_images=2, extra={"eta": 0.5})
    assert "--batch-size 1" in str(caught.value.hint)


def test_a_call_without_prompts_makes_as_many_as_asked(folder: Any) -> None:
    """Through `batch_size` where the call has it, otherwise one after the other."""
    for name in ("ddpm", "dit"):
        ours = load(folder(name))
        batch = run_ours(ours, name, num_images=2)
        assert batch.output is not None and batch.output.shape[0] == 2
        second = run_ours(ours, name, seed=4).output
        assert second is not None and (batch.output[1:] - second).abs().max() < 1e-5
        assert (batch.output[:1] - second).abs().max() > 1e-2


def test_defaults_of_the_call_stand_in_the_request(folder: Any) -> None:
    batch = load(folder("sd")).generate("a", height=32, width=32, num_inference_steps=1)
    assert (batch.guidance_scale, batch.extra["eta"], batch.negative_prompt) == (7.5, 0.0, None)
    batch = load(folder("ltx")).generate("a", height=32, width=32, num_frames=1, num_inference_steps=1)
    assert (batch.fps, batch.guidance_scale) == (25, 3)


def test_what_was_made_otherwise_than_asked_is_said(folder: Any) -> None:
    batch = run_ours(load(folder("ltx")), "ltx", num_frames=11, num_inference_steps=1)
    assert batch.output is not None and batch.output.shape[2] == 9
    assert "num_frames 11 was asked for; LTXPipeline made 9" in batch.warnings
    long = run_ours(load(folder("sd")), "sd", prompt="a red circle " * 40, num_inference_steps=1)
    assert any("truncated because CLIP" in line for line in long.warnings)
    weak = run_ours(load(folder("sd")), "sd", guidance_scale=1.0, num_inference_steps=1)
    assert any("heed a negative prompt only where guidance_scale is above 1" in line for line in weak.warnings)


def test_a_safety_checker_withholds_aloud(folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = load(folder("sd-checked"))
    assert not any("withheld" in line for line in run_ours(ours, "sd-checked").warnings)
    checker = ours.modules["safety_checker"]
    monkeypatch.setattr(checker, "concept_embeds_weights", torch.nn.Parameter(checker.concept_embeds_weights - 9.0))
    batch = run_ours(ours, "sd-checked")
    assert batch.output is not None and not batch.output.any()
    assert "result 1: the port's safety checker found it unsafe and withheld it" in batch.warnings


@pytest.mark.parametrize("name", ["sd", "consistency", "ddpm"])
def test_not_a_number_stops_at_its_step(name: str, folder: Any) -> None:
    """Through either kind of callback, or the scheduler where a call has none."""
    ours, count = load(folder(name)), [0]

    def spoiled(module: Any, given: Any, made: Any) -> Any:
        count[0] += 1
        if count[0] != 2:
            return None
        return (made[0] * float("nan"),) if isinstance(made, tuple) else type(made)(sample=made.sample * float("nan"))

    ours.denoiser.register_forward_hook(spoiled)
    with pytest.raises(CheckFailed, match=r"denoising: the latents are not finite after step 1"):
        run_ours(ours, name)


def test_another_scheduler_is_the_one_of_diffusers(folder: Any) -> None:
    ours, theirs = load(folder("sd"), scheduler="EulerDiscreteScheduler"), theirs_of(folder("sd"))
    theirs.scheduler = diffusers.EulerDiscreteScheduler.from_config(theirs.scheduler.config)
    found = run_ours(ours, "sd").output
    assert found is not None and torch.equal(found, run_theirs(theirs, "sd", [3]))
    with pytest.raises(UsageError, match="unknown scheduler Eule") as caught:
        load(folder("sd"), scheduler="EulerDiscreteScheduller")
    assert "--scheduler EulerDiscreteScheduler" in str(caught.value.hint)


def test_attention_backends_are_chosen_around_the_call(folder: Any) -> None:
    plain = run_ours(load(folder("sd")), "sd").output
    found = run_ours(load(folder("sd"), attention="math"), "sd").output
    assert plain is not None and found is not None and 0 < (found - plain).abs().max() < 1e-5
    with pytest.raises(UsageError, match="'flex' is not supported by this model"):
        run_ours(load(folder("sd"), attention="flex"), "sd")
    with pytest.raises(UsageError, match="'cudnn' does not run this model on this device"):
        run_ours(load(folder("sd"), attention="cudnn"), "sd")


def test_a_pipeline_with_a_native_port_runs_in_both_executors(bare_port: Path) -> None:
    native = porter.load(bare_port, dtype=torch.float32, device="cpu", quality="exact")
    theirs = load(bare_port)
    assert (native.executor, theirs.executor) == ("native", "diffusers")
    asked = {"num_inference_steps": 2, "height": 64, "width": 64, "guidance_scale": 2.0, "max_sequence_length": 32}
    first, second = (each.generate("a red circle", **asked).output for each in (native, theirs))
    assert torch.equal(first, second)


def test_tiling_and_slicing_reach_the_autoencoder(folder: Any) -> None:
    ours = load(folder("sd"), vae_tiling=True, vae_slicing=True)
    run_ours(ours, "sd", num_inference_steps=1)
    assert ours.modules["vae"].use_tiling and ours.modules["vae"].use_slicing
    with pytest.raises(UsageError, match="has no tiling"):
        run_ours(load(folder("ddpm"), vae_tiling=True), "ddpm")


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("sd", {"extra": {"strength": 0.5}}, "strength"),
    ("sd", {"extra": {"guidance_rescale": "much"}}, r"guidance_rescale.*float"),
    ("sd", {"extra": {"guidance_rescale": True}}, "guidance_rescale"),
    ("sd", {"extra": {"latents": [1]}}, "latents"),
    ("sd", {"extra": {"output_type": "pil"}}, "output_type"),
    ("sd", {"extra": {"height": 64}}, "height"),
    ("sd", {"image": [PICTURE]}, "image"),
    ("sd", {"mask_image": PICTURE}, "mask_image"),
    ("sd", {"true_cfg_scale": 2.0}, r"true_cfg_scale.*StableDiffusionPipeline does not take it"),
    ("sd", {"max_sequence_length": 9}, "max_sequence_length"),
    ("sd", {"num_frames": 9}, "num_frames"),
    ("sd", {"fps": 9}, "fps"),
    ("sd", {"guidance_scale": -1.0}, "guidance_scale"),
    ("sd", {"negative_prompt": "x", "guidance_scale": 0.0}, "guidance_scale"),
    ("sd-img2img", {"image": [PICTURE], "extra": {"strength": "@no"}}, "strength"),
    ("dit", {"prompt": ""}, r"class_labels.*--set class_labels="),
    ("dit", {"extra": {"class_labels": [1]}}, r"prompt.*DiTPipeline does not take it"),
    ("ddpm", {"prompt": "", "guidance_scale": 2.0}, "guidance_scale"),
    ("ddpm", {"prompt": "", "height": 64}, "height"),
]


@pytest.mark.parametrize(("name", "change", "named"), BAD, ids=[f"{n} {next(iter(c), '-')}" for n, c, _ in BAD])
def test_what_the_call_does_not_take_is_refused_by_name(name: str, change: Any, named: str, folder: Any) -> None:
    """Before weights are read: the files of this folder are not there."""
    model = describe(folder(name), "diffusers")
    with pytest.raises(UsageError, match=f"(?s){named}"):
        model.validation().check_input(Req(**{"prompt": "a", **change}), model.config)


def test_what_the_pipeline_itself_refuses_is_a_usage_error(folder: Any) -> None:
    with pytest.raises(UsageError, match=r"(?s)StableDiffusionPipeline does not make this.*divisible by 8"):
        load(folder("sd")).generate("a", height=33, width=32, num_inference_steps=1)


INDEXES: dict[str, tuple[dict[str, Any], type[PorterError], str]] = {
    "audio": ({"_class_name": "StableAudioPipeline"}, UsageError, r"makes neither pictures nor videos.*audios"),
    "text": ({"_class_name": "LLaDA2Pipeline"}, UsageError, r"sequences, texts"),
    "depth": ({"_class_name": "MarigoldDepthPipeline"}, UsageError, r"prediction"),
    "embeddings": ({"_class_name": "KandinskyV22PriorPipeline"}, UsageError, r"image_embeds"),
    "takes embeddings": ({"_class_name": "KandinskyV22Pipeline"}, UsageError, r"takes image_embeds.*which no option"),
    "a base class": ({"_class_name": "DiffusionPipeline"}, BadInputError, r"nothing runs DiffusionPipeline"),
    "no pipeline": ({"_class_name": "AutoencoderKL"}, BadInputError, r"nothing runs AutoencoderKL"),
    "unknown": ({"_class_name": "NoSuchPipeline"}, BadInputError, r"nothing runs NoSuchPipeline"),
    "no name": ({"_class_name": "os.system"}, BadInputError, r"nothing runs os\.system"),
    "a package": ({"_class_name": "OnnxStableDiffusionPipeline"}, BadInputError, r"needs packages.*onnx"),
    "own code": ({"_class_name": ["my_pipeline", "MyPipeline"]}, BadInputError, r"code from a model repository never"),
    "null": ({"_class_name": "DDPMPipeline", "unet": [None, None]}, BadInputError, r"lacks unet.*null"),
    "missing": ({"_class_name": "DDPMPipeline"}, BadInputError, r"lacks scheduler, unet"),
}


@pytest.mark.parametrize("kind", INDEXES)
def test_a_pipeline_that_does_not_run_is_refused_by_its_index_alone(kind: str, tmp_path: Path) -> None:
    change, error, named = INDEXES[kind]
    index = {"scheduler": ["diffusers", "DDPMScheduler"], "unet": ["diffusers", "UNet2DModel"]}
    index = change if kind == "missing" else index | change
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(error, match=f"(?s){named}") as caught:
        describe(tmp_path, "diffusers")
    assert caught.value.hint


def test_what_a_call_cannot_do_without_is_asked_for(tmp_path: Path) -> None:
    """A picture, and the frames of a video as pictures."""
    parts = (
        "vae",
        "text_encoder",
        "tokenizer",
        "transformer",
        "unet",
        "scheduler",
        "image_encoder",
        "feature_extractor",
    )
    index: dict[str, Any] = {name: ["diffusers", "AutoencoderKL"] for name in parts}
    for name, wanted in (
        ("StableVideoDiffusionPipeline", r"image.*1 or more pictures"),
        ("PaintByExamplePipeline", r"(?s)image.*mask_image.*a picture.*example_image.*--set example_image=.*@FILE"),
    ):
        (tmp_path / "model_index.json").write_text(json.dumps(index | {"_class_name": name}))
        model = describe(tmp_path, "diffusers")
        with pytest.raises(UsageError, match=wanted):
            model.validation().check_input(Req(prompt=""), model.config)
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"_class_name": "VideoToVideoSDPipeline"}))
    model = describe(tmp_path, "diffusers")
    assert model.config.task_type.video and model.config.images() == (0, None)
    model.validation().check_input(Req(prompt="a", image=[PICTURE] * 3), model.config)


def test_code_of_the_repository_never_runs(folder: Any, tmp_path: Path) -> None:
    port = Path(shutil.copytree(folder("ddpm"), tmp_path / "port"))
    (port / "my_unet.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass UNet: pass\n")
    (port / "unet" / "my_unet.py").write_text((port / "my_unet.py").read_text())
    change_index(port, unet=["my_unet", "UNet"])
    with pytest.raises(BadInputError, match=r"my_unet\.UNet is not loaded: code from a model repository never runs"):
        load(port)
    assert not (tmp_path / "ran").exists()


def test_entries_that_the_pipeline_does_not_use_are_said(folder: Any, tmp_path: Path) -> None:
    port = Path(shutil.copytree(folder("ddpm"), tmp_path / "port"))
    change_index(port, vae=["diffusers", "AutoencoderKL"], flavour=3, image_encoder=[None, None], _note=[1, 2])
    assert load(port).warnings == ["DDPMPipeline does not use flavour, vae of model_index.json"]


def test_components_that_do_not_fit_are_refused(folder: Any, tmp_path: Path) -> None:
    port = Path(shutil.copytree(folder("sd"), tmp_path / "port"))
    change_index(port, vae=["diffusers", "PNDMScheduler"])
    shutil.copy(port / "scheduler" / "scheduler_config.json", port / "vae")
    with pytest.raises(BadInputError, match="does not build StableDiffusionPipeline"):
        load(port)


def change_index(port: Path, **entries: Any) -> None:
    index = json.loads((port / "model_index.json").read_text())
    (port / "model_index.json").write_text(json.dumps(index | entries))


def test_shards_and_variants_load_the_same(folder: Any, tmp_path: Path) -> None:
    """Shards; an fp16 variant alone (read) and beside plain weights (not read, as diffusers has it)."""
    expected = run_ours(load(folder("sd")), "sd").output
    pipe = theirs_of(folder("sd"))
    pipe.save_pretrained(tmp_path / "shards", max_shard_size="150KB")
    assert len(list((tmp_path / "shards" / "unet").glob("*-of-*.safetensors"))) > 1
    found = run_ours(load(tmp_path / "shards"), "sd").output
    assert expected is not None and found is not None and torch.equal(found, expected)

    half = theirs_of(folder("sd"), torch.float16)
    half.save_pretrained(tmp_path / "fp16", variant="fp16")
    half.save_pretrained(tmp_path / "fp16-shards", variant="fp16", max_shard_size="150KB")
    both = Path(shutil.copytree(folder("sd"), tmp_path / "both"))
    for file in (tmp_path / "fp16").glob("*/*.fp16.safetensors"):
        shutil.copy(file, both / file.parent.name)
    assert len(list(both.glob("*/*.safetensors"))) == 6
    rounded = run_theirs(theirs_of(tmp_path / "fp16", variant="fp16"), "sd", [3])
    for name, picture in (("fp16", rounded), ("fp16-shards", rounded), ("both", expected)):
        found = run_ours(load(tmp_path / name), "sd").output
        assert found is not None and torch.equal(found, picture), name
    assert not torch.equal(rounded, expected)


def test_weights_that_nobody_can_choose_between_are_refused(folder: Any, tmp_path: Path) -> None:
    port = Path(shutil.copytree(folder("ddpm"), tmp_path / "port"))
    file = port / "unet" / f"{STANDARD[0]}.safetensors"
    for variant in ("fp16", "ema"):
        shutil.copy(file, file.with_name(f"{STANDARD[0]}.{variant}.safetensors"))
    assert load(port).modules["unet"] is not None
    file.unlink()
    with pytest.raises(BadInputError, match=r"(?s)more than once.*ema.*fp16"):
        load(port)
    theirs_of(folder("sd")).unet.save_pretrained(tmp_path / "shards", max_shard_size="150KB")
    next((tmp_path / "shards").glob("*.index.json")).unlink()
    with pytest.raises(BadInputError, match="holds shards without their index"):
        component_header(tmp_path / "shards")


def test_former_names_of_attention_are_read(folder: Any, tmp_path: Path) -> None:
    """Released autoencoders of Stable Diffusion have them; a name that is neither is refused as ever."""
    port = Path(shutil.copytree(folder("sd"), tmp_path / "port"))
    file = port / "vae" / "diffusion_pytorch_model.safetensors"
    former = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def before(name: str) -> str:
        for new, old in former.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        return name

    stored = load_file(file)
    save_file({before(name): tensor for name, tensor in stored.items()}, file)
    assert sum(before(name) != name for name in stored) == 16
    ours, expected = run_ours(load(port), "sd").output, run_theirs(theirs_of(port), "sd", [3])
    assert ours is not None and torch.equal(ours, expected)
    save_file({before(name).replace("query", "ask"): tensor for name, tensor in stored.items()}, file)
    with pytest.raises(BadInputError, match=r"(?s)ask\.bias|to_q"):
        load(port)


def test_a_former_class_that_was_divided_is_loaded_as_its_part(folder: Any, tmp_path: Path) -> None:
    port = Path(shutil.copytree(folder("dit"), tmp_path / "port"))
    change_index(port, transformer=["diffusers", "Transformer2DModel"])
    ours = load(port)
    assert type(ours.denoiser) is diffusers.DiTTransformer2DModel
    found = run_ours(ours, "dit").output
    assert found is not None and torch.equal(found, run_theirs(theirs_of(port), "dit", [3]))


def test_tied_and_former_tensors_of_text_encoders(folder: Any, tmp_path: Path) -> None:
    """Positions that old files hold are no surplus; a tensor that nobody knows is."""
    port = Path(shutil.copytree(folder("sd"), tmp_path / "port"))
    file = port / "text_encoder" / "model.safetensors"
    stored = load_file(file)
    save_file(stored | {"text_model.embeddings.position_ids": torch.arange(77)[None]}, file, {"format": "pt"})
    loaded = load_components(port, ["text_encoder"], native_models={}, dtype=torch.float32, device=CPU)
    assert torch.equal(
        next(loaded.modules["text_encoder"].parameters()), next(theirs_of(folder("sd")).text_encoder.parameters())
    )
    save_file(stored | {"text_model.embeddings.flavour": torch.ones(1)}, file, {"format": "pt"})
    with pytest.raises(BadInputError, match="flavour"):
        load(port)


def generate(*arguments: object) -> int:
    return main(["generate", *map(str, arguments), "--quiet"])


def as_options(name: str) -> list[object]:
    made = PIPELINES[name]
    options: list[object] = []
    for key, value in made.fields.items():
        options += [f"--{key.replace('_', '-')}", value]
    for key, value in made.extra.items():
        options += ["--set", f"{key}={json.dumps(value) if not isinstance(value, str) else value}"]
    return options


@pytest.mark.parametrize("name", ["sd", "dit", "sd-img2img", "ltx"])
def test_the_command_makes_the_same_and_can_repeat_it(name: str, folder: Any, tmp_path: Path) -> None:
    made, given = PIPELINES[name], []
    for i, picture in enumerate(made.images):
        picture.save(tmp_path / f"{i}.png")
        given += ["--image", tmp_path / f"{i}.png"]
    if made.video:
        given += ["--format", "png"]
    out = tmp_path / "out"
    assert (
        generate(folder(name), made.prompt, "--seed", 3, "--num-images", 2, *as_options(name), *given, "-o", out) == 0
    )
    sidecars = sorted(out.glob("*.json"))
    about = json.loads(sidecars[0].read_text())
    theirs = run_theirs(theirs_of(folder(name)), name, [3])
    frames = sorted(sidecars[0].with_suffix("").glob("*.png")) if made.video else [out / about["file"]]
    for number, frame in enumerate(frames):
        shown = theirs[0, :, number] if made.video else theirs[0]
        expected = np.round(shown.permute(1, 2, 0).numpy() * 255).astype(np.uint8)
        assert np.array_equal(np.asarray(Image.open(frame)), expected)
    assert len(frames) == (9 if made.video else 1)
    assert (about["pipeline"], about["executor"]) == (type(theirs_of(folder(name))).__name__, "diffusers")
    assert about["scheduler"] and about["seed"] == 3 and about["fps"] == made.fields.get("fps")
    assert all(about["settings"][key] == value for key, value in made.extra.items())

    again = tmp_path / "again"
    assert generate(folder(name), "--from-metadata", sidecars[1], *given, "-o", again) == 0
    repeated = json.loads(next(again.glob("*.json")).read_text())
    second = json.loads(sidecars[1].read_text())
    assert repeated["pixels_sha256"] == second["pixels_sha256"] != about["pixels_sha256"]
    assert {**repeated, "file": 0, "file_sha256": 0} == {**second, "file": 0, "file_sha256": 0}


def test_prompt_files_batches_and_refusals_of_the_command(
    folder: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    lines = [{"prompt": "a red circle", "seed": 3, "name": "one"}, {"prompt": "blue squares", "seed": 9, "name": "two"}]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    size = ("--height", 32, "--width", 32, "--steps", 2)
    command = (folder("sd"), "--prompts", tmp_path / "prompts.jsonl", *size)
    assert generate(*command, "--batch-size", 2, "-o", tmp_path / "both") == 0
    assert generate(*command, "-o", tmp_path / "single") == 0
    for name in ("one.png", "two.png"):
        both, single = (np.asarray(Image.open(tmp_path / d / name)).astype(int) for d in ("both", "single"))
        assert abs(both - single).max() <= 1
    capfd.readouterr()
    assert generate(folder("sd"), "a", "--preview", 1, *size, "-o", tmp_path / "p") == 0
    assert "no previews: StableDiffusionPipeline decodes by itself" in capfd.readouterr().err
    assert generate(folder("sd"), "a", "--set", "flavour=3", "-o", tmp_path / "x") == 2
    assert "flavour" in capfd.readouterr().err
    assert generate(folder("sd"), "a", "--executor", "native", "-o", tmp_path / "x") == 6
    assert "no family runs StableDiffusionPipeline" in capfd.readouterr().err
    assert not (tmp_path / "x").exists()
