"""Plans: statuses, sizes, styles and next commands, from names, JSON files and headers alone."""

from __future__ import annotations

import json
import shutil
import tomllib
from pathlib import Path

import numpy
import pytest
from safetensors.numpy import load_file, save_file

from porter import builtin
from porter.core.errors import BadInputError, CheckpointError
from porter.core.layout import weightless
from porter.core.libraries import library_has
from porter.core.plan import PortPlan
from porter.core.planning import make_plan, plan
from porter.core.port import Port
from porter.core.source import open_source
from porter.core.version import VERSION
from porter.core.weights import WeightSet, weight_sets

TINY = builtin.locate("tiny-flux")
assert TINY is not None
REAL = Path(__file__).parents[3] / "shared" / "real"
real = pytest.mark.skipif(not REAL.is_dir(), reason=f"metadata of real repositories is not at {REAL}")


def test_version_is_the_distributions() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["version"] == VERSION


def test_embedded_model() -> None:
    found = plan("builtin:tiny-flux")
    assert (found.pipeline_class, found.family, found.style) == ("FluxPipeline", "flux1", "Modular")
    status = {part.name: part.status for part in found.components}
    assert {name for name, value in status.items() if value == "convert"} == {"transformer", "vae"}
    assert {value for name, value in status.items() if name not in ("transformer", "vae")} == {"reuse"}
    transformer = found.component("transformer")
    assert transformer is not None and transformer.files == ("flux1-tiny.safetensors",)
    tensors = load_file_as_bits(TINY / "flux1-tiny.safetensors")
    assert transformer.parameters == sum(size // 2 for size in tensors.values())
    assert transformer.dtypes == {"BF16": sum(tensors.values())}
    assert transformer.config["axes_dims_rope"] == [8, 12, 12]
    assert found.bytes == sum(part.bytes for part in found.components)
    assert found.warnings == ()
    assert found.next == ("porter convert builtin:tiny-flux -o tiny-flux-port",)


def load_file_as_bits(path: Path) -> dict[str, int]:
    """Bytes of each tensor, read by the safetensors library."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name).nbytes for name in file.keys()}  # noqa: SIM118


def test_a_plan_survives_json_and_refuses_another() -> None:
    found = plan("builtin:tiny-flux")
    document = json.loads(json.dumps(found.to_json()))
    assert PortPlan.from_json(document) == found
    with pytest.raises(BadInputError, match="not a plan"):
        PortPlan.from_json({**document, "schema": "porter.plan/2"})
    for broken in ({**document, "more": 1}, {k: v for k, v in document.items() if k != "style"}):
        with pytest.raises(BadInputError, match="missing or unknown keys"):
            PortPlan.from_json(broken)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(TINY, tmp_path / "model"))


def edit(path: Path, **changes: object) -> None:
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, **changes}))


def test_original_files_without_model_index(copy: Path) -> None:
    (copy / "model_index.json").unlink()
    found = plan(copy)
    assert {part.name: part.status for part in found.components} == {
        "transformer": "convert", "vae": "convert", "text_encoder": "reuse", "text_encoder_2": "reuse",
    }  # fmt: skip
    assert found.family == "flux1" and found.pipeline_class is None
    assert any("not a whole pipeline" in line for line in found.warnings)


@pytest.mark.parametrize(("name", "component"), [("flux1-tiny.safetensors", "transformer"), ("ae.safetensors", "vae")])
def test_single_file_needs_a_config(tmp_path: Path, name: str, component: str) -> None:
    file = Path(shutil.copy(TINY / name, tmp_path / "a file.safetensors"))
    found = plan(file)
    (part,) = found.components
    assert (part.name, part.status, part.layout, found.family) == (component, "convert", "original", "flux1")
    assert found.next == (f"porter convert '{file}' --config {component.upper()}-CONFIG.json -o 'a file-port'",)
    missing = {"transformer": "axes_dims_rope", "vae": "scaling_factor"}[component]
    assert missing in part.note and "--config" in part.note


def test_original_file_is_found_by_its_tensors_and_not_by_its_name_alone(copy: Path) -> None:
    shutil.copy(copy / "ae.safetensors", copy / "flux1-aaa.safetensors")
    found = plan(copy)
    part = found.component("transformer")
    assert part is not None and part.files == ("flux1-tiny.safetensors",)
    assert any("flux1-aaa.safetensors" in line for line in found.warnings)


def test_unknown_class_unknown_library_and_missing_weights(copy: Path) -> None:
    edit(
        copy / "model_index.json",
        transformer=["diffusers", "HyperTransformer9D"],
        vae=["pipeline_hyper", "HyperVAE"],
        image_encoder=["transformers", "CLIPVisionModel"],
        feature_extractor=[None, None],
        _class_name="HyperPipeline",
    )
    (copy / "pipeline_hyper.py").write_text("raise SystemExit('ran')")
    found = plan(copy)
    status = {part.name: part.status for part in found.components}
    assert (status["transformer"], status["vae"], status["image_encoder"]) == ("port", "port", "missing")
    assert "feature_extractor" not in status
    assert found.style == "Hybrid" and "vae" in found.style_reason
    text = "\n".join(found.warnings)
    for word in ("HyperTransformer9D", "never run", "no weights found", "feature_extractor", "never run:"):
        assert word in text


def test_a_variant_and_an_autoregressive_encoder_choose_the_style(copy: Path) -> None:
    edit(copy / "model_index.json", _class_name="FluxNewPipeline")
    assert "variant of FLUX.1" in plan(copy).style_reason
    edit(copy / "model_index.json", text_encoder=["transformers", "Qwen2_5_VLForConditionalGeneration"])
    found = plan(copy)
    assert found.style == "Hybrid" and "Qwen2_5_VL" in found.style_reason


def test_diffusers_layout_is_native_or_reused(copy: Path) -> None:
    weights = {"proj_out.weight": numpy.zeros((2, 2), "float32")}
    for name in ("transformer", "vae"):
        save_file(weights, copy / name / "diffusion_pytorch_model.safetensors")
    found = plan(copy)
    assert {part.name: part.status for part in found.components}["transformer"] == "native"
    assert {part.name: part.status for part in found.components}["vae"] == "reuse"
    assert any("in the original layout as well" in line for line in found.warnings)
    assert found.next == (f'porter generate {copy} "a prompt"',)


def test_variants_shards_and_pickles(copy: Path) -> None:
    folder = copy / "transformer"
    one = {"a": numpy.zeros(4, "float16")}
    for i in (1, 3):
        save_file({f"a{i}": one["a"]}, folder / f"diffusion_pytorch_model-0000{i}-of-00003.safetensors")
    save_file(one, folder / "diffusion_pytorch_model.fp16.safetensors")
    (copy / "text_encoder" / "model.safetensors").rename(copy / "text_encoder" / "pytorch_model.bin")
    found = plan(copy)
    transformer, encoder = found.component("transformer"), found.component("text_encoder")
    assert transformer and encoder
    assert len(transformer.files) == 2 and transformer.note == "also as fp16"
    assert encoder.files == ("text_encoder/pytorch_model.bin",)
    text = "\n".join(found.warnings)
    assert "shards 2 are missing" in text and "without running it" in text


def test_quantised_components_are_not_taken(copy: Path) -> None:
    edit(copy / "transformer" / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    found = plan(copy)
    part = found.component("transformer")
    assert part and part.status == "port" and any("bitsandbytes" in line for line in found.warnings)


def test_what_is_no_model(tmp_path: Path, copy: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "notes.txt").write_text("hello")
    with pytest.raises(BadInputError, match="not a pipeline"):
        plan(tmp_path / "text")
    with pytest.raises(BadInputError, match="no checkpoint that porter reads"):
        plan(tmp_path / "text" / "notes.txt")
    (copy / "model_index.json").write_text("[]")
    with pytest.raises(BadInputError, match="names no pipeline class"):
        plan(copy)
    (copy / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(BadInputError, match="names no components"):
        plan(copy)


def test_truncated_weights_are_named(copy: Path) -> None:
    file = copy / "text_encoder" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"text_encoder/model\.safetensors"):
        plan(copy)


def test_unknown_single_file_shows_its_templates(tmp_path: Path) -> None:
    save_file({f"layer.{i}.w": numpy.zeros(1, "float32") for i in range(3)}, tmp_path / "x.safetensors")
    found = plan(tmp_path / "x.safetensors")
    assert found.components[0].status == "port" and "layer.{i}.w" in found.warnings[0]


def test_a_component_folder(tmp_path: Path, copy: Path) -> None:
    save_file({"a": numpy.zeros(4, "float16")}, copy / "transformer" / "diffusion_pytorch_model.safetensors")
    found = plan(copy / "transformer")
    (part,) = found.components
    assert (part.name, part.class_name, part.status) == ("transformer", "FluxTransformer2DModel", "native")


def test_lfs_pointers_have_their_real_sizes(copy: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 23802932552\n"
    (copy / "flux1-tiny.safetensors").write_text(pointer)
    found = plan(copy)
    part = found.component("transformer")
    whole = plan(TINY).component("transformer")
    assert part and whole and (part.bytes, part.status) == (23802932552, "convert")
    assert part.parameters == whole.parameters and part.dtypes == {}  # its config says how many there will be
    assert "parameters by its config" in part.note
    (copy / "text_encoder" / "model.safetensors").write_text(pointer)
    (copy / "tokenizer_2" / "tokenizer.json").write_text(pointer)
    found = plan(copy)
    encoder, tokenizer = found.component("text_encoder"), found.component("tokenizer_2")
    assert encoder and encoder.parameters is None
    assert tokenizer and tokenizer.note == "tokenizer.json not fetched (Git LFS)"
    text = "\n".join(found.warnings)
    assert "2 weight files and 1 other file (tokenizer_2/tokenizer.json) that components use" in text
    assert "no git clone" in text
    (copy / "model_index.json").unlink()
    bare = plan(copy)
    part = bare.component("transformer")
    assert part and part.bytes == 23802932552 and "told by its file name alone" in part.note
    assert bare.family == "flux1" and bare.next[0].startswith("hf download OWNER/NAME flux1-tiny.safetensors ")


def test_pointers_are_fetched_from_where_they_can_be_had(copy: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 800000\n"
    shards = [f"vae/diffusion_pytorch_model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for place in (*shards, "unused.bin", "text_encoder/model.safetensors"):
        (copy / place).write_text(pointer)
    names = ["text_encoder/model.safetensors", "vae/diffusion_pytorch_model-*-of-00002.safetensors"]
    download = f"hf download OWNER/NAME --include {names[0]} --include '{names[1]}' --local-dir {copy}"
    assert plan(copy).next == (download, f"porter plan {copy}")
    (copy / ".git").mkdir()
    assert plan(copy).next[0] == download  # somebody's repository, without LFS
    (copy / ".gitattributes").write_text("*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
    found = plan(copy)
    assert found.next[0] == f"git -C {copy} lfs pull --include '{','.join(names)}'"
    assert "3 weight files that components use are Git-LFS pointers (2.4 MB not fetched)" in found.warnings
    inner = plan(copy, subfolder="vae").next
    assert inner == (f"git -C {copy} lfs pull --include '{names[1]}'", f"porter plan {copy} --subfolder vae")
    (alone,) = plan(copy / "text_encoder" / "model.safetensors").components
    assert alone.status == "port" and "before its weights are fetched" in alone.note
    file = copy / "text_encoder" / "model.safetensors"
    assert plan(file).next[0] == f"git -C {copy} lfs pull --include {names[0]}"


def test_a_pipeline_without_weights_says_what_it_needs(copy: Path) -> None:
    for file in copy.rglob("*.safetensors"):
        file.unlink()
    source = open_source(copy)
    found = make_plan(source, device_memory=80 * 10**9)
    transformer, encoder = found.component("transformer"), found.component("text_encoder")
    whole = plan(TINY).component("transformer")
    assert transformer and encoder and whole and transformer.parameters == whole.parameters
    assert "by its config" in transformer.note and encoder.parameters is None
    assert found.memory and found.memory["fits"] == "unknown"
    assert found.memory["absent"] == ["text_encoder", "text_encoder_2"] and "text_encoder" in found.memory["reason"]
    assert found.next[0].startswith("hf download OWNER/NAME --include 'text_encoder/*' ")
    assert found.next[1] == f"porter plan {copy}"
    for part in ("transformer", "vae"):
        edit(copy / "model_index.json", **{part: ["diffusers", "Luna3DModel"]})
        (copy / part / "config.json").unlink()
    bare = make_plan(open_source(copy), device_memory=80 * 10**9)
    assert bare.memory and bare.memory["fits"] == "unknown" and "no weights here" in bare.memory["reason"]
    assert bare.memory["stages"] == [] and make_plan(open_source(copy)).memory is None
    part = bare.component("transformer")
    assert part and part.status == "port" and "no class Luna3DModel" in part.note
    assert "transformer: no weights found for Luna3DModel" in bare.warnings


@pytest.mark.parametrize("passed", [True, False])
def test_a_proven_port_is_used_next(own_port: Path, passed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Port, "verdict", lambda self: "passed" if passed else "missing")
    generate = f'porter generate {own_port} "a prompt"'
    assert plan(own_port).next == ((generate,) if passed else (f"porter parity {own_port}", generate))


def test_weight_names() -> None:
    names = ["u/model.fp16.safetensors", "u/model.safetensors", "u/pytorch_model.bin", "u/sub/model.safetensors"]
    assert [one.files[0] for one in weight_sets(names, "u")] == [names[1], names[0], names[2]]
    assert weight_sets(names[:1], "u") == [WeightSet("u/model", "safetensors", "fp16", tuple(names[:1]))]
    assert weight_sets(names, "v") == [] and len(weight_sets(names)) == 4
    assert weight_sets(["Wan2.1_VAE.pth"]) == [WeightSet("Wan2.1_VAE", "pth", "", ("Wan2.1_VAE.pth",))]
    shard = "model-00001-of-00002.safetensors"
    assert weight_sets([shard]) == [WeightSet("model", "safetensors", "", (shard,), (2,))]
    for index in ("model.safetensors.index.fp16.json", "model.fp16.safetensors.index.json"):
        for shard in ("model.fp16-00001-of-00001.safetensors", "model-00001-of-00001.fp16.safetensors"):
            assert weight_sets([shard, index]) == [WeightSet("model", "safetensors", "fp16", (shard,), (), index)]
    assert weight_sets(["m-00001-of-99999999999.safetensors"])[0].missing == ()  # no such shard name: a name of its own
    assert weightless("CLIPTokenizerFast") and weightless("EulerDiscreteScheduler") and not weightless("CLIPTextModel")


def test_classes_are_looked_up_without_importing() -> None:
    assert library_has("diffusers", "AutoencoderKL") and library_has("transformers", "T5EncoderModel")
    assert library_has("transformers", "CLIPTextModelWithProjection")
    assert not library_has("transformers", "T5EncoderMode") and not library_has("diffusers", "Flux")
    assert library_has("os", "system") is None


@real
@pytest.mark.parametrize(
    ("name", "pipeline", "gigabytes"),
    [("flux", "FluxPipeline", 13.4), ("sdxl", "StableDiffusionXLPipeline", 13.9), ("mochi", "MochiPipeline", 51.5)],
)
def test_real_git_clones(name: str, pipeline: str, gigabytes: float) -> None:
    found = plan(REAL / name)
    assert found.pipeline_class == pipeline
    assert round(found.bytes / 1e9, 1) == gigabytes
    assert all(part.status in ("reuse", "native") for part in found.components)
    text = "\n".join(found.warnings)
    wanted = {"flux": "bitsandbytes", "sdxl": "sd_xl_base_1.0.safetensors", "mochi": "dit.safetensors"}[name]
    assert wanted in text and "Git-LFS pointers" in text
    assert found.next[0].startswith("hf download OWNER/NAME ")  # these folders are no clones


def test_numpy_and_safetensors_agree_on_the_embedded_text_encoder() -> None:
    part = plan("builtin:tiny-flux").component("text_encoder")
    assert part is not None and part.parameters
    with pytest.raises(TypeError):
        load_file(TINY / "text_encoder" / "model.safetensors")  # numpy has no bfloat16: headers are all a plan may need
