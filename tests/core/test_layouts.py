"""How models really lie around: shards and indexes, nested and modular pipelines, original repositories, LFS clones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy
import pytest
from safetensors.numpy import save_file

from porter.core.architectures import architectures
from porter.core.errors import BadInputError, CheckpointError, MissingError
from porter.core.family import families
from porter.core.libraries import pipeline_components, pipeline_module_has, pipeline_optional
from porter.core.planning import make_plan, plan
from porter.core.source import open_source
from tests.sparse_models import names_of, sparse

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 5678\n"
UNREAD = "only as onnx; in no format that porter reads"
ONE = numpy.zeros((2, 2), "float16")


def write(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def weights(path: Path, *names: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(dict.fromkeys(names or ("a.weight",), ONE), path)
    return path


def original(folder: Path, file: str, family: str | None, component: str, layout: str = "original", **kw: Any) -> None:
    known = next(
        k for k in architectures()
        if (k.family, k.component, k.layout) == (family, component, layout) and kw.get("model") in (None, k.model)
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    sparse(folder / file, names_of(known))


@pytest.fixture
def sharded(tiny_flux: Path, tmp_path: Path) -> Path:
    """The embedded model with a transformer in three shards and their index."""
    model = Path(shutil.copytree(tiny_flux, tmp_path / "model"))
    folder = model / "transformer"
    places = {}
    for i in (1, 2, 3):
        name = f"diffusion_pytorch_model-0000{i}-of-00003.safetensors"
        weights(folder / name, f"t{i}.weight")
        places[f"t{i}.weight"] = name
    write(folder / "diffusion_pytorch_model.safetensors.index.json", {"metadata": {}, "weight_map": places})
    return model


def index_of(model: Path) -> Path:
    return model / "transformer" / "diffusion_pytorch_model.safetensors.index.json"


def test_shards_with_an_index_are_one_component(sharded: Path) -> None:
    part = plan(sharded).component("transformer")
    assert part and len(part.files) == 3 and part.parameters == 12


@pytest.mark.parametrize(
    "shard", ["../../secret.safetensors", "/etc/passwd", "a\\b.safetensors", "", "c:x.safetensors"]
)
def test_an_index_may_not_leave_its_folder(sharded: Path, shard: str) -> None:
    document = json.loads(index_of(sharded).read_text())
    document["weight_map"]["t1.weight"] = shard
    write(index_of(sharded), document)
    with pytest.raises(BadInputError, match="outside its folder"):
        plan(sharded)


def test_index_and_shards_must_agree(sharded: Path) -> None:
    good = json.loads(index_of(sharded).read_text())
    for change, words in (
        ({"t2.weight": good["weight_map"]["t1.weight"]}, "lies in"),
        ({"t9.weight": good["weight_map"]["t1.weight"]}, "is in no shard"),
    ):
        write(index_of(sharded), {"weight_map": {**good["weight_map"], **change}})
        with pytest.raises(CheckpointError, match=words):
            plan(sharded)
    for broken in ([], {"weight_map": []}, {"weight_map": {"a": 3}}):
        write(index_of(sharded), broken)
        with pytest.raises(BadInputError, match="no index of shards"):
            plan(sharded)
    write(index_of(sharded), good)
    weights(sharded / "transformer" / "diffusion_pytorch_model-00003-of-00003.safetensors", "t1.weight")
    with pytest.raises(CheckpointError, match="another shard too"):
        plan(sharded)


def test_a_modular_pipeline_lives_in_other_repositories(tmp_path: Path) -> None:
    entry = {"type_hint": ["diffusers", "UNet2DConditionModel"], "subfolder": "unet", "revision": "abc"}
    write(tmp_path / "m" / "modular_model_index.json", {
        "_class_name": "StableDiffusionXLModularPipeline", "_blocks_class_name": "StableDiffusionXLAutoBlocks",
        "unet": [None, None, {**entry, "pretrained_model_name_or_path": "owner/base"}],
        "vae": ["diffusers", "AutoencoderKL", {"repo": "owner/vae", "subfolder": ""}],
        "scheduler": ["diffusers", "EulerDiscreteScheduler", {"subfolder": "scheduler"}],
        "force_zeros_for_empty_prompt": True,
    })  # fmt: skip
    write(tmp_path / "m" / "scheduler" / "scheduler_config.json", {"_class_name": "EulerDiscreteScheduler"})
    found = plan(tmp_path / "m")
    unet, vae, scheduler = (found.component(name) for name in ("unet", "vae", "scheduler"))
    assert unet and vae and scheduler
    assert (unet.class_name, unet.layout, unet.location) == ("UNet2DConditionModel", "elsewhere", "owner/base/unet@abc")
    assert (vae.location, vae.status) == ("owner/vae", "reuse") and scheduler.location is None
    assert found.settings == {"force_zeros_for_empty_prompt": True} and found.next == ("porter plan owner/base",)


def test_several_pipelines_in_one_folder(tiny_flux: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        shutil.copytree(tiny_flux, tmp_path / "m" / name)
    both = plan(tmp_path / "m")
    part = both.component("b/transformer")
    assert part and part.files == ("b/flux1-tiny.safetensors",) and both.component("a/vae")
    assert both.family == "flux1" and both.pipeline_class is None and both.memory is None
    assert both.next == tuple(f"porter plan {tmp_path / 'm'} --subfolder {name}" for name in "ab")
    found = plan(tmp_path / "m", subfolder="b")
    assert found.pipeline_class == "FluxPipeline" and found.subfolder == "b"
    assert found.components[0].files == ("scheduler/scheduler_config.json",)
    with pytest.raises(MissingError, match="holds no folder c"):
        plan(tmp_path / "m", subfolder="c")


def test_a_pipeline_as_a_component(tiny_flux: Path, tmp_path: Path) -> None:
    write(tmp_path / "m" / "model_index.json", {"_class_name": "OuterPipeline", "prior": ["diffusers", "FluxPipeline"]})
    shutil.copytree(tiny_flux, tmp_path / "m" / "prior")
    found = plan(tmp_path / "m")
    part = found.component("prior/transformer")
    assert part and part.files == ("prior/flux1-tiny.safetensors",) and part.status == "convert"
    assert found.component("prior/text_encoder")


def test_an_original_repository_with_shards_configs_and_pickles(tmp_path: Path) -> None:
    """As Wan's own: a sharded transformer with its class in config.json, and torch files beside it."""
    model = tmp_path / "Wan2.1-T2V-14B"
    known = next(k for k in architectures() if (k.family, k.layout, k.class_name) == ("wan", "original", "WanModel"))
    names = list(names_of(known).items())
    cut = len(names) // 2
    model.mkdir()
    places = {}
    for i, part in enumerate((names[:cut], names[cut:]), 1):
        file = f"diffusion_pytorch_model-0000{i}-of-00002.safetensors"
        sparse(model / file, dict(part))
        places |= {name: file for name, _ in part}
    write(model / "diffusion_pytorch_model.safetensors.index.json", {"weight_map": places})
    write(model / "config.json", {"_class_name": "WanModel", "dim": 1536, "model_type": "t2v"})
    write(model / "models_t5_umt5-xxl-enc-bf16.pth", POINTER)
    write(model / "Wan2.1_VAE.pth", POINTER)
    write(model / "google" / "umt5-xxl" / "tokenizer.json", {})
    found = plan(model)
    by_name = {part.name: part for part in found.components}
    assert found.family == "wan" and set(by_name) == {"transformer", "text_encoder", "vae"}
    assert by_name["transformer"].layout == "original" and len(by_name["transformer"].files) == 2
    assert by_name["transformer"].config["dim"] == 1536 and by_name["transformer"].status == "convert"
    assert "file name alone" in by_name["vae"].note and by_name["vae"].bytes == 5678
    assert any("also has" in line and "scheduler" in line for line in found.warnings)
    for file in model.glob("*.safetensors"):
        write(file, POINTER)
    clone = plan(model).component("transformer")
    assert clone and "told by its config (WanModel)" in clone.note and clone.class_name == "WanTransformer3DModel"


def test_checkpoints_in_folders_of_their_own(tmp_path: Path) -> None:
    """As files repackaged for a node-based interface: no config, one folder a kind."""
    model = tmp_path / "split_files"
    original(model / "diffusion_models", "x_bf16.safetensors", "flux1", "transformer")
    original(model / "vae", "y.safetensors", None, "vae", model="FLUX.1")
    original(
        model / "text_encoders",
        "t5xxl_fp16.safetensors",
        None,
        "text_encoder",
        "diffusers",
        model="T5 v1.1 XXL encoder",
    )
    found = plan(model)
    assert [(part.name, part.status, part.class_name) for part in found.components] == [
        ("transformer", "convert", "FluxTransformer2DModel"), ("text_encoder_2", "reuse", "T5EncoderModel"),
        ("vae", "convert", "AutoencoderKL"),
    ]  # fmt: skip
    assert found.family == "flux1" and found.pipeline_class is None


def test_families_that_share_a_pipeline_class_are_told_by_a_config(tmp_path: Path) -> None:
    for width, family in ((768, "sd1"), (1024, "sd2")):
        model = tmp_path / family
        write(model / "model_index.json", {
            "_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"],
            "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        })  # fmt: skip
        write(model / "unet" / "config.json", {"_class_name": "UNet2DConditionModel", "cross_attention_dim": width})
        weights(model / "unet" / "diffusion_pytorch_model.safetensors")
        weights(model / "safety_checker" / "model.safetensors")
        found = plan(model)
        assert found.family == family
        checker = found.component("safety_checker")
        assert checker and checker.custom_code is None and checker.status == "reuse"


def test_a_pipeline_module_may_hand_on_a_class_of_transformers() -> None:
    """diffusers writes such a module's name where the class is another library's."""
    assert pipeline_module_has("glm_image", "GlmImageForConditionalGeneration")
    assert not pipeline_module_has("glm_image", "T5EncoderModel")  # a file of the module imports it for itself
    assert not pipeline_module_has("glm_image", "NoSuchModel")


def test_code_of_a_repository_is_flagged_and_never_imported(tmp_path: Path) -> None:
    model = tmp_path / "m"
    write(model / "model_index.json", {
        "_class_name": ["pipeline_own", "OwnPipeline"], "transformer": ["own_model", "OwnTransformer"],
        "text_encoder": ["transformers", "NoSuchModel"], "vae": ["somewhere.else", "VAE"],
    })  # fmt: skip
    bomb = "raise SystemExit('ran')"
    write(model / "pipeline_own.py", bomb)
    write(model / "transformer" / "own_model.py", bomb)
    write(model / "text_encoder" / "modeling_own.py", bomb)
    write(model / "text_encoder" / "config.json", {"auto_map": {"AutoModel": "modeling_own.NoSuchModel"}})
    for name in ("transformer", "text_encoder", "vae"):
        weights(model / name / "model.safetensors")
    found = plan(model)
    assert found.pipeline_class == "OwnPipeline"
    code = {part.name: part.custom_code for part in found.components}
    assert code == {
        "transformer": "transformer/own_model.py", "text_encoder": "text_encoder/modeling_own.py",
        "vae": "module somewhere.else, not in the repository",
    }  # fmt: skip
    assert {part.status for part in found.components} == {"port"}
    assert any("OwnPipeline is code of the repository" in line for line in found.warnings)
    assert found.style == "Hybrid"


def test_tied_tensors(tmp_path: Path) -> None:
    model = tmp_path / "m"
    entries = {
        "text_encoder": "T5EncoderModel",
        "text_encoder_2": "Qwen3ForCausalLM",
        "text_encoder_3": "LlamaForCausalLM",
    }
    write(model / "model_index.json", {"_class_name": "P", **{k: ["transformers", v] for k, v in entries.items()}})
    write(model / "text_encoder" / "config.json", {"model_type": "t5", "tie_word_embeddings": False})
    weights(model / "text_encoder" / "model.safetensors", "shared.weight", "encoder.final_layer_norm.weight")
    write(model / "text_encoder_2" / "config.json", {"model_type": "qwen3", "tie_word_embeddings": True})
    weights(model / "text_encoder_2" / "model.safetensors", "model.embed_tokens.weight", "model.norm.weight")
    write(model / "text_encoder_3" / "config.json", {"model_type": "llama", "tie_word_embeddings": False})
    save_file(
        {"model.embed_tokens.weight": ONE},
        model / "text_encoder_3" / "model.safetensors",
        {"x.weight": "model.embed_tokens.weight"},
    )
    found = plan(model)
    assert {part.name: part.shared for part in found.components} == {
        "text_encoder": ("encoder.embed_tokens.weight = shared.weight",),
        "text_encoder_2": ("lm_head.weight = model.embed_tokens.weight",),
        "text_encoder_3": ("x.weight = model.embed_tokens.weight",),  # as safetensors' save_model notes it
    }


def test_whole_configs_and_what_differs_from_the_class(sharded: Path) -> None:
    part = plan(sharded).component("transformer")
    assert part and part.config == json.loads((sharded / "transformer" / "config.json").read_text())
    assert part.unusual and part.unusual["guidance_embeds"] == [True, False]
    assert "patch_size" not in part.unusual


def test_the_closest_family_and_what_differs(sharded: Path) -> None:
    kin = plan(sharded).closest
    assert kin and (kin.family, kin.score, kin.reusable) == ("flux1", 1.0, True)
    index = json.loads((sharded / "model_index.json").read_text())
    write(
        sharded / "model_index.json",
        {**index, "_class_name": "NewPipeline", "text_encoder_2": ["transformers", "UMT5EncoderModel"]},
    )
    weights(sharded / "text_encoder_2" / "model.safetensors", "x.weight")
    kin = plan(sharded).closest
    assert kin and kin.family == "flux1" and kin.reusable and 0.8 < kin.score < 1
    assert any(line.startswith("text_encoder_2: UMT5EncoderModel, where FLUX.1 has T5") for line in kin.differences)
    write(sharded / "model_index.json", {"_class_name": "NewPipeline", "unet": ["diffusers", "UNet1DModel"]})
    weights(sharded / "unet" / "diffusion_pytorch_model.safetensors", "x.weight")
    kin = plan(sharded).closest
    assert kin is None  # a class that no family has, and nothing else


def test_a_model_saved_under_another_family_s_pipeline(tmp_path: Path) -> None:
    write(tmp_path / "m" / "model_index.json", {
        "_class_name": "FluxPipeline", "transformer": ["diffusers", "ChromaTransformer2DModel"],
        "text_encoder": ["kolors", "ChatGLMModel"], "vae_decoder": ["diffusers", "OnnxRuntimeModel"],
    })  # fmt: skip
    write(tmp_path / "m" / "text_encoder" / "config.json", {"auto_map": {"AutoModel": "modeling.ChatGLMModel"}})
    for name in ("transformer", "text_encoder"):
        weights(tmp_path / "m" / name / "model.safetensors")
    write(tmp_path / "m" / "vae_decoder" / "model.onnx", "x")
    found = plan(tmp_path / "m")
    assert found.pipeline_class == "FluxPipeline" and found.family == "chroma"
    encoder, decoder = found.component("text_encoder"), found.component("vae_decoder")
    assert encoder and encoder.custom_code is None  # a module of diffusers' own pipelines
    assert decoder and (decoder.layout, decoder.status, decoder.note) == (
        "unread",
        "port",
        "only as onnx; in no format that porter reads",
    )


def test_two_denoisers_of_an_original_repository(tmp_path: Path) -> None:
    """As Wan2.2-T2V-A14B: one folder for each, and the family has a second transformer."""
    model = tmp_path / "Wan2.2-T2V-A14B"
    for folder in ("high_noise_model", "low_noise_model"):
        original(model / folder, "diffusion_pytorch_model.safetensors", "wan", "transformer")
        write(model / folder / "config.json", {"_class_name": "WanModel"})
    found = plan(model)
    assert [(part.name, part.files[0].split("/")[0]) for part in found.components] == [
        ("transformer", "high_noise_model"), ("transformer_2", "low_noise_model"),
    ]  # fmt: skip


def test_the_same_component_several_times_counts_once_in_memory(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        original(tmp_path / "m", f"{name}.safetensors", "flux1", "transformer")
    found = plan(tmp_path / "m")
    assert len(found.components) == 3 and found.memory
    assert len(found.memory["components"]) == 1 and "the first transformer of 3" in found.memory["assumed"]


def test_a_class_that_families_share_is_told_by_its_tensors(tmp_path: Path) -> None:
    for family in ("sd1", "sd2", "sdxl"):
        original(tmp_path / family, "diffusion_pytorch_model.safetensors", family, "unet", "diffusers")
        write(tmp_path / family / "config.json", {"_class_name": "UNet2DConditionModel"})
        assert plan(tmp_path / family).family == family


@pytest.mark.parametrize("family", sorted(families()))
def test_every_family_is_told_by_pipeline_class_and_by_component_class(family: str, tmp_path: Path) -> None:
    record = families()[family]
    for class_name in record.pipeline_classes:
        entry = {part.name: [part.library, part.class_names[0]] for part in record.components[-1:]}
        write(tmp_path / class_name / "model_index.json", {"_class_name": class_name, **entry})
        assert plan(tmp_path / class_name).family == family
    own = {known.class_name for known in architectures() if known.family == family and known.layout == "diffusers"}
    others = {known.class_name for known in architectures() if known.family != family}
    others |= {
        name for f in families().values() if f is not record for part in f.components for name in part.class_names
    }
    for class_name in own - others:
        weights(tmp_path / class_name / "diffusion_pytorch_model.safetensors")
        write(tmp_path / class_name / "config.json", {"_class_name": class_name})
        assert plan(tmp_path / class_name).family == family


def test_a_pointer_s_size_tells_the_parameters_of_a_released_model(tmp_path: Path) -> None:
    """stable-diffusion-v1-5's U-Net as its repository has it, its inpainting sibling's, and a size that fits none."""
    for size, parameters, channels in (
        (3_438_167_540, 859_520_964, 4), (3_438_225_232, 859_535_364, 9), (3_438_225_232, None, None),
        (3_400_000_000, None, 4),
    ):  # fmt: skip
        model = tmp_path / f"{size}-{channels}"
        write(model / "unet" / "config.json", {"in_channels": channels} if channels else {})
        entries = {"unet": ["diffusers", "UNet2DConditionModel"]}
        write(model / "model_index.json", {"_class_name": "StableDiffusionPipeline", **entries})
        write(model / "unet" / "diffusion_pytorch_model.safetensors", POINTER.replace("5678", str(size)))
        part = plan(model).component("unet")
        assert part and part.parameters == parameters
        assert ("by its size" in part.note) == (parameters is not None)


def test_a_config_tells_the_parameters_of_the_class_that_a_recipe_makes_and_of_no_other(tmp_path: Path) -> None:
    config = {
        "patch_size": [1, 2, 2], "num_attention_heads": 2, "attention_head_dim": 6, "in_channels": 4,
        "out_channels": 4, "text_dim": 8, "freq_dim": 6, "ffn_dim": 16, "num_layers": 1, "cross_attn_norm": True,
    }  # fmt: skip
    for class_name, parameters in (("WanTransformer3DModel", 3680), ("WanVACETransformer3DModel", None)):
        model = tmp_path / class_name
        write(model / "model_index.json", {"_class_name": "WanPipeline", "transformer": ["diffusers", class_name]})
        write(model / "transformer" / "config.json", {"_class_name": class_name, **config})
        write(model / "transformer" / "diffusion_pytorch_model.safetensors", POINTER)
        part = plan(model).component("transformer")
        assert part and part.parameters == parameters


def test_what_a_component_s_folder_says_and_holds_must_agree(sharded: Path) -> None:
    """Zero-based shards, an index with names of its own, other classes, LoRA factors and scales: nothing is silent."""
    folder = sharded / "transformer"
    for file in folder.glob("*"):
        if file.name != "config.json":
            file.unlink()
    for i in range(3):
        weights(folder / f"diffusion_pytorch_model-0000{i}-of-00003.safetensors", f"t{i}.weight")
    part = plan(sharded).component("transformer")
    assert part and len(part.files) == 3 and part.parameters == 12
    for file in folder.glob("*.safetensors"):
        file.unlink()
    weights(folder / "part_x.safetensors", "x.weight")
    weights(folder / "part_y.safetensors", "y.weight")
    found = plan(sharded)
    assert any("other weights in its folder, not counted: transformer/part_y" in line for line in found.warnings)
    places = {"x.weight": "part_x.safetensors", "y.weight": "part_y.safetensors"}
    write(folder / "diffusion_pytorch_model.safetensors.index.json", {"weight_map": places})
    found = plan(sharded)
    part = found.component("transformer")
    assert part and part.parameters == 8 and not any("not counted" in line for line in found.warnings)
    config = json.loads((folder / "config.json").read_text())
    write(folder / "config.json", {**config, "_class_name": "SD3Transformer2DModel"})
    text = "\n".join(plan(sharded).warnings)
    assert "its config says SD3Transformer2DModel" in text and "are not those of FluxTransformer2DModel: 0%" in text
    (folder / "diffusion_pytorch_model.safetensors.index.json").unlink()
    (folder / "part_y.safetensors").unlink()
    weights(folder / "part_x.safetensors", "a.lora_A.weight", "a.lora_B.weight")
    part = plan(sharded).component("transformer")
    assert part and part.status == "port"
    weights(folder / "part_x.safetensors", "a.weight", "a.weight.absmax", "a.weight.quant_map")
    part = plan(sharded).component("transformer")
    assert part and part.quantised and "bitsandbytes" in part.quantised and part.status == "reuse"


@pytest.mark.parametrize(
    "entry", [["/abs/path", "T"], ["diffusers", "../../x"], ["diffusers", "A" * 300], ["a b", "T"]]
)
def test_paths_are_no_class_names(entry: list[str], tmp_path: Path) -> None:
    write(tmp_path / "m" / "model_index.json", {"_class_name": "P", "transformer": entry})
    with pytest.raises(BadInputError, match="that is none"):
        plan(tmp_path / "m")


def test_the_next_command_quotes_a_hostile_name(tiny_flux: Path, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    weights(tmp_path / "m" / "$(touch PWNED).safetensors", "odd.name")
    shutil.copy(tiny_flux / "flux1-tiny.safetensors", tmp_path / "m")
    (command,) = plan(tmp_path / "m").next
    assert "PWNED" not in command and "--component transformer" in command


@pytest.mark.parametrize("family", sorted(families()))
def test_a_family_s_own_pipeline_is_like_itself(family: str, tmp_path: Path) -> None:
    """Its plainest pipeline, with what diffusers' constructor asks for and without what it calls optional."""
    class_name = families()[family].pipeline_classes[0]
    asked = pipeline_components(class_name)
    if asked is None:
        pytest.skip(f"the installed diffusers has no {class_name}")
    roles = {role: names for role, names in asked.items() if role not in pipeline_optional(class_name)}
    every = {part.name: part.class_names[0] for part in families()[family].components}
    named = {
        role: every.get(role, names[0]) if names[0].endswith("Schedulers") else names[0]
        for role, names in roles.items()
    }
    entries = {role: ["diffusers", name] for role, name in named.items()}
    write(tmp_path / "m" / "model_index.json", {"_class_name": class_name, **entries})
    kin = plan(tmp_path / "m").closest
    assert kin and kin.family == family and kin.score >= 0.95, kin


def test_a_class_of_several_families_is_proof_of_none(tmp_path: Path) -> None:
    entries = {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}
    write(tmp_path / "m" / "model_index.json", {"_class_name": "StrangePipeline", **entries})
    kin = plan(tmp_path / "m").closest
    assert kin and not kin.reusable
    original(tmp_path / "m" / "unet", "diffusion_pytorch_model.safetensors", "sdxl", "unet", "diffusers")
    kin = plan(tmp_path / "m").closest
    assert kin and kin.family == "sdxl"


@pytest.mark.parametrize("config", [
    {"model_type": "a" * 300}, {"model_type": "a" * 20_000}, {"model_type": "../x"}, {"model_type": 5},
    {"architectures": 5}, {"architectures": True}, {"architectures": [[1]]}, {"_class_name": 1.5},
    {"model_type": "t5", "text_config": 3, "quantization_config": [1], "auto_map": {"AutoModel": None}},
], ids=lambda config: str(config)[:40])  # fmt: skip
def test_configs_of_wrong_types_are_planned_or_refused(config: dict[str, object], tmp_path: Path) -> None:
    write(tmp_path / "m" / "model_index.json", {"_class_name": "P", "text_encoder": ["transformers", "T5EncoderModel"]})
    write(tmp_path / "m" / "text_encoder" / "config.json", config)
    weights(tmp_path / "m" / "text_encoder" / "model.safetensors")
    assert plan(tmp_path / "m").component("text_encoder")
    assert plan(tmp_path / "m" / "text_encoder").components


def test_a_config_of_many_thousand_entries_is_none(tmp_path: Path) -> None:
    write(tmp_path / "m" / "config.json", {"_class_name": "T", **dict.fromkeys(map(str, range(6000)), 1)})
    weights(tmp_path / "m" / "model.safetensors")
    with pytest.raises(BadInputError, match="config is none of a model"):
        plan(tmp_path / "m")


def test_files_that_a_note_names_are_not_named_as_unused(tmp_path: Path) -> None:
    folder = tmp_path / "m" / "transformer"
    for variant in ("", ".bf16"):
        weights(folder / f"diffusion_pytorch_model{variant}.safetensors")
    write(folder / "config.json", {"_class_name": "MochiTransformer3DModel"})
    found = plan(tmp_path / "m", subfolder="transformer")
    assert "also as bf16" in found.components[0].note
    assert not any("no component uses" in line for line in found.warnings)


def test_several_pipelines_are_told_once_each(tiny_flux: Path, tmp_path: Path) -> None:
    for number in range(5):
        shutil.copytree(tiny_flux, tmp_path / "m" / f"p{number}")
    write(tmp_path / "m" / "p1" / "spare.ckpt", "x")
    write(tmp_path / "m" / "p1" / "vae" / "diffusion_pytorch_model.safetensors", POINTER)
    (tmp_path / "m" / "p1" / "text_encoder" / "model.safetensors").unlink()
    found = make_plan(open_source(tmp_path / "m"), device_memory=10**10)
    assert len(found.next) == 5 and found.style is None and "several pipelines" in found.style_reason
    assert found.memory and found.memory["fits"] == "unknown" and "--subfolder" in found.memory["reason"]
    told = [line for line in found.warnings if "p1" in line]
    assert sum("spare.ckpt" in line for line in told) == sum("pointer" in line for line in found.warnings) == 1
    heads = {line.partition(":")[0] for line in told}
    assert heads == {"p1", "p1/vae", "p1/text_encoder", "a pipeline of its own"}


@pytest.mark.parametrize("joined", [False, True])
def test_a_lora_is_told_by_the_names_that_it_changes(joined: bool, tmp_path: Path) -> None:
    layout, prefix = ("original", "lora_unet_") if joined else ("diffusers", "transformer.")
    known = next(k for k in architectures() if (k.family, k.layout, k.component) == ("sd3", layout, "transformer"))
    names = [name.removesuffix(".weight").replace("{}", "3") for name in known.templates if name.endswith(".weight")]
    names = [prefix + (name.replace(".", "_") if joined else name) for name in names]
    ends = ("lora_down.weight", "lora_up.weight", "alpha") if joined else ("lora_A.weight", "lora_B.weight")
    weights(tmp_path / "x.safetensors", *(f"{name}.{end}" for name in names for end in ends))
    found = plan(tmp_path / "x.safetensors")
    assert found.style is None and "LoRA" in found.style_reason
    assert f"{families()['sd3'].title} ({known.class_name})" in found.components[0].note
    repos = [variant.repo for variant in known.variants]
    assert any(line.removeprefix("porter plan ") in repos for line in found.next)
    other = tmp_path / "y.safetensors"
    weights(other, "nowhere.lora_A.weight", "nowhere.lora_B.weight")
    assert "fuse them" in plan(other).components[0].note and plan(other).next == (
        f"porter plan {other} --target porter",
    )


def test_a_port_says_why(tmp_path: Path) -> None:
    weights(tmp_path / "nonsense.safetensors", "a.b.c")
    part = plan(tmp_path / "nonsense.safetensors").components[0]
    assert part.status == "port" and "no layout of the catalogue" in part.note
    model = tmp_path / "m"
    write(model / "model_index.json", {"_class_name": "FluxPipeline", "vae": ["diffusers", "AutoencoderKL"]})
    original(model, "ae.safetensors", None, "vae", model="FLUX.1")
    write(model / "vae" / "config.json", {"quantization_config": {"quant_method": "bitsandbytes"}})
    part = plan(model).components[0]
    assert part.status == "port" and "quantised (bitsandbytes): no recipe takes it" in part.note


@pytest.mark.parametrize(
    ("name", "class_name", "real"),
    [("text_encoder", "CLIPTextModel", "CLIP ViT-L/14"), ("text_encoder_2", "T5EncoderModel", "T5 v1.1 XXL")],
)
def test_a_file_is_what_it_is_in_its_folder_and_called_by_its_sizes(
    name: str, class_name: str, real: str, tiny_flux: Path, tmp_path: Path
) -> None:
    tiny = plan(tiny_flux / name / "model.safetensors").components[0]
    inside = plan(tiny_flux).component(name)
    assert inside and (tiny.class_name, tiny.status) == (inside.class_name, inside.status) == (class_name, "reuse")
    assert tiny.model is None and inside.model is None and f"of {class_name}, which families share" in tiny.note
    known = next(k for k in architectures() if k.class_name == class_name and k.layout == "diffusers")
    sparse(tmp_path / "whole.safetensors", names_of(known))
    whole = plan(tmp_path / "whole.safetensors").components[0]
    assert whole.model and whole.model.startswith(real)
    assert plan(tiny_flux / "ae.safetensors").components[0].model is None
