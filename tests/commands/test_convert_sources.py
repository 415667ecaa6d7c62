"""What `porter convert` takes and gives besides a pipeline's own files.

Files that hold several components, torch files, averaged copies, a base pipeline, shards, ComfyUI's files, and a way
back that needs the original.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from porter.core.convert import Conversion, convert
from porter.core.errors import BadInputError, MissingError, PorterError, RecipeError, UsageError
from porter.core.port import Port
from tests.commands.test_convert import equal, tree
from tests.conversions.proofs.qwen_image import PROOFS

TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"


def config_of(tiny_port: Path, part: str = "transformer") -> dict[str, Any]:
    document: dict[str, Any] = json.loads((tiny_port / part / "config.json").read_text())
    return document


@pytest.fixture
def whole_file(tiny_flux: Path, tmp_path: Path) -> Path:
    """Everything in one file, as checkpoints for other programs have it, with an averaged copy and training buffers."""
    tensors: dict[str, torch.Tensor] = {"alphas_cumprod": torch.ones(4), "model_ema.decay": torch.tensor(0.5)}
    for name, tensor in load_file(tiny_flux / "flux1-tiny.safetensors").items():
        tensors[f"model.diffusion_model.{name}"] = tensor
        tensors[f"model_ema.diffusion_model{name.replace('.', '')}"] = -tensor
    for name, tensor in load_file(tiny_flux / "ae.safetensors").items():
        tensors[f"first_stage_model.{name}"] = tensor
    for name, tensor in load_file(tiny_flux / "text_encoder" / "model.safetensors").items():
        tensors[f"text_encoders.clip_l.transformer.{name}"] = tensor
    save_file(tensors, tmp_path / "all.safetensors")
    return tmp_path / "all.safetensors"


def test_a_file_of_several_components(whole_file: Path, tiny_port: Path, tmp_path: Path) -> None:
    """Each under its own name, whatever no recipe takes named, and with a base a whole pipeline."""
    done = convert(whole_file, tmp_path / "port", base=tiny_port, verify=True)
    assert {job.component for job in done.preparation.jobs} == {"transformer", "vae", "text_encoder"}
    for name in (TRANSFORMER, VAE, "text_encoder/model.safetensors"):
        assert equal(tmp_path / "port" / name, tiny_port / name), name
    left = done.to_json()["left_tensors"]["all.safetensors"]
    count = len(load_file(tmp_path / "port" / TRANSFORMER))  # some count: the averaged copies and two buffers
    assert left["count"] > count // 2 and done.manifest
    names = done.manifest["left_tensors"]["all.safetensors"]
    assert {"alphas_cumprod", "model_ema.decay"} < set(names) and not any("first_stage" in name for name in names)
    from diffusers import FluxPipeline

    assert FluxPipeline.from_pretrained(tmp_path / "port", local_files_only=True).transformer.config.guidance_embeds
    assert Port.open(tmp_path / "port").manifest["base"]["spec"] == str(tiny_port)
    convert(tmp_path / "port", tmp_path / "back", to="original", component="vae")
    plain = {name.removeprefix("first_stage_model."): tensor for name, tensor in load_file(whole_file).items()}
    restored = load_file(tmp_path / "back" / "ae.safetensors")
    assert restored and all(torch.equal(tensor, plain[name]) for name, tensor in restored.items())


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda t, n: t.pop(n), "missing from the source"),
        (lambda t, n: t.update({n: t[n].to(torch.int8)}), "wrong dtype in the source"),
        (lambda t, n: t.update({n: t[n][:-1].clone()}), "wrong shape in the source"),
        (lambda t, n: t.update({n + "_old": t[n].clone()}), "no rule claims"),
    ],
    ids=["missing", "integers", "cut", "extra"],
)
@pytest.mark.parametrize("part", ["text_encoder", "transformer"])
def test_names_that_stay_are_accounted_for_too(
    part: str, spoil: Callable[[dict[str, torch.Tensor], str], object], words: str, tiny_port: Path, tmp_path: Path
) -> None:
    """A component in its class's own names, below a prefix: its recipe counts its tensors, wherever one is known."""
    if part == "text_encoder":
        held, config = load_file(tiny_port / part / "model.safetensors"), config_of(tiny_port, part)
        tensors = {f"text_model.{each}": tensor for each, tensor in held.items()}  # the class's names in most files
        prefix, name, recipe = "text_encoders.clip_l.transformer.", "layers.1.mlp.fc2.weight", "clip-text"
    else:
        proof = next(proof for proof in PROOFS if proof.name == "qwen-image-transformer")
        shapes = proof.load().target_headers(proof.tiny)
        tensors = {name: torch.full(info.shape, 0.5) for name, info in shapes.items()}
        config, prefix, recipe = dict(proof.tiny), "model.diffusion_model.", proof.load().name
        name = "blocks.1.attn.to_q.weight"
    found = next(each for each in tensors if each.endswith(name))
    source = tmp_path / "all.safetensors"
    save_file({prefix + each: tensor for each, tensor in tensors.items()}, source)
    done = convert(source, tmp_path / "port", component=part, config=config)
    assert [(job.recipe.name, job.recipe.knows_targets) for job in done.preparation.jobs] == [(recipe, True)]
    spoil(tensors, found)
    save_file({prefix + each: tensor for each, tensor in tensors.items()}, source)
    with pytest.raises(RecipeError) as error:
        convert(source, tmp_path / "other", component=part, config=config)
    assert words in error.value.what and found in error.value.what
    assert not (tmp_path / "other").exists()


def test_averaged_weights_are_taken_when_asked_for(whole_file: Path, tiny_port: Path, tmp_path: Path) -> None:
    convert(whole_file, tmp_path / "port", component="transformer", config=config_of(tiny_port), averaged=True)
    ours, plain = load_file(tmp_path / "port" / TRANSFORMER), load_file(tiny_port / TRANSFORMER)
    assert all(torch.equal(ours[name], -plain[name]) for name in plain)
    with pytest.raises(UsageError, match="has no averaged copy"):
        convert(whole_file, tmp_path / "vae", component="vae", config=config_of(tiny_port, "vae"), averaged=True)
    assert not (tmp_path / "vae").exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files_give_the_same_bytes(zipped: bool, tiny_flux: Path, tiny_port: Path, tmp_path: Path) -> None:
    state = load_file(tiny_flux / "flux1-tiny.safetensors")
    torch.save({"state_dict": state}, tmp_path / "flux.ckpt", _use_new_zipfile_serialization=zipped)
    convert(tmp_path / "flux.ckpt", tmp_path / "port", config=config_of(tiny_port), verify=True)
    assert equal(tmp_path / "port" / TRANSFORMER, tiny_port / TRANSFORMER)
    name = next(name for name, tensor in state.items() if tensor.ndim == 2 and min(tensor.shape) > 1)
    torch.save(state | {name: state[name].t().contiguous().t()}, tmp_path / "strided.ckpt")
    with pytest.raises(PorterError, match="do not lie in order"):
        convert(tmp_path / "strided.ckpt", tmp_path / "other", config=config_of(tiny_port))


def test_shards_and_their_index(tiny_port: Path, tmp_path: Path) -> None:
    convert("builtin:tiny-flux", tmp_path / "port", shard_size="3MB", verify=True)
    index = json.loads((tmp_path / "port" / f"{TRANSFORMER}.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) == 4 and files[0].endswith("-00001-of-00004.safetensors")
    found: dict[str, torch.Tensor] = {}
    for file in files:
        part = load_file(tmp_path / "port" / "transformer" / file)
        assert {name for name, place in index["weight_map"].items() if place == file} == set(part)
        assert sum(tensor.nbytes for tensor in part.values()) <= 3_000_000
        found |= part
    whole = load_file(tiny_port / TRANSFORMER)
    assert found.keys() == whole.keys() and all(torch.equal(found[name], whole[name]) for name in whole)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    convert(tmp_path / "port", tmp_path / "back", to="original")
    convert(tiny_port, tmp_path / "plain", to="original")
    assert equal(tmp_path / "back" / "flux1-tiny.safetensors", tmp_path / "plain" / "flux1-tiny.safetensors")
    with pytest.raises(UsageError, match="no size of a shard"):
        convert("builtin:tiny-flux", tmp_path / "never", shard_size="big")


@pytest.mark.parametrize("how", ["alone", "folder", "index", "copied", "base"])
def test_a_missing_shard_makes_no_smaller_model(how: str, tiny_port: Path, tiny_flux: Path, tmp_path: Path) -> None:
    """All but the last block: the tensors alone would be those of a model with fewer blocks."""
    model = tmp_path / "model"
    tensors = load_file(tiny_flux / "flux1-tiny.safetensors")
    config = {key: value for key, value in config_of(tiny_port).items() if "layers" not in key}
    last = max(name.split(".")[1] for name in tensors if name.startswith("single_blocks."))
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(f"single_blocks.{last}.")}
    first, second = ("w.safetensors", "v.safetensors") if how == "index" else (
        "flux-00001-of-00002.safetensors", "flux-00002-of-00002.safetensors")  # fmt: skip
    model.mkdir()
    save_file(kept, model / first)
    more: dict[str, Any] = {"config": config}
    if how == "index":
        table = {name: first if name in kept else second for name in tensors}
        (model / "flux.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    if how in ("copied", "base"):
        model = Path(shutil.copytree(tiny_flux if how == "copied" else tiny_port, tmp_path / "pipeline"))
        (model / "manifest.json").unlink(missing_ok=True)
        whole = model / "text_encoder_2" / "model.safetensors"
        whole.rename(whole.with_name("model-00001-of-00002.safetensors"))
        more = {"base": model} if how == "base" else {}
    source = model / first if how == "alone" else tiny_flux / "flux1-tiny.safetensors" if how == "base" else model
    with pytest.raises(MissingError, match="not all of its weights are here") as error:
        convert(source, tmp_path / "port", **more)
    assert ("v.safetensors" if how == "index" else "shard 2") in str(error.value.found) and error.value.hint
    assert not (tmp_path / "port").exists()


def test_any_number_of_workers_writes_the_same_bytes(tiny_port: Path, tmp_path: Path) -> None:
    for workers in (1, 2, 7):
        convert("builtin:tiny-flux", tmp_path / str(workers), workers=workers)
        assert (tmp_path / str(workers) / TRANSFORMER).read_bytes() == (tiny_port / TRANSFORMER).read_bytes()
    with pytest.raises(UsageError, match="number of threads"):
        convert("builtin:tiny-flux", tmp_path / "none", workers=0)


def without_manifest(port: Path, folder: Path) -> Path:
    """The port as somebody else's pipeline: nothing says what it was made from."""
    shutil.copytree(port, folder)
    (folder / "manifest.json").unlink()
    return folder


def test_any_pipeline_goes_back(tiny_port: Path, tiny_flux: Path, tmp_path: Path) -> None:
    theirs = without_manifest(tiny_port, tmp_path / "theirs")
    convert(theirs, tmp_path / "back", to="original")
    assert equal(tmp_path / "back" / "flux1.safetensors", tiny_flux / "flux1-tiny.safetensors")
    assert equal(tmp_path / "back" / "ae.safetensors", tiny_flux / "ae.safetensors")
    with pytest.raises(UsageError, match="mean nothing with --to original"):
        convert(theirs, tmp_path / "no", to="original", averaged=True)


def test_comfyui_gets_its_folders(tiny_port: Path, tiny_flux: Path, tmp_path: Path) -> None:
    theirs = without_manifest(tiny_port, tmp_path / "tiny")
    for source in (theirs, tiny_port):
        out = tmp_path / f"comfy-{source.name}"
        done: Conversion = convert(source, out, to="comfyui")
        written = {name for name in tree(out) if name != "manifest.json" and not name.startswith(("README", "LICENSE"))}
        assert {name.partition("/")[0] for name in written} >= {"diffusion_models", "vae"}, written
        assert equal(out / "diffusion_models" / f"{source.name}.safetensors", tiny_flux / "flux1-tiny.safetensors")
        assert any("scheduler" in name for name in done.to_json()["not_carried"])
    assert equal(
        tmp_path / "comfy-tiny" / "text_encoders" / "tiny.safetensors", tiny_flux / "text_encoder" / "model.safetensors"
    )


def test_what_was_rounded_comes_back_only_from_the_original(tiny_flux: Path, tmp_path: Path) -> None:
    convert("builtin:tiny-flux", tmp_path / "half", dtype="float16")
    with pytest.raises(RecipeError, match="cannot be undone: it rounds") as error:
        convert(tmp_path / "half", tmp_path / "back", to="original")
    assert "--base" in str(error.value.hint)
    convert(tmp_path / "half", tmp_path / "back", to="original", base=tiny_flux)
    assert equal(tmp_path / "back" / "flux1-tiny.safetensors", tiny_flux / "flux1-tiny.safetensors")


def test_a_base_that_does_not_fit(tiny_port: Path, tiny_flux: Path, tmp_path: Path) -> None:
    lone = tmp_path / "flux.safetensors"
    shutil.copy(tiny_flux / "flux1-tiny.safetensors", lone)
    convert(lone, tmp_path / "port", base=tiny_port)
    assert json.loads((tmp_path / "port" / "model_index.json").read_text())["_class_name"] == "FluxPipeline"
    assert equal(tmp_path / "port" / TRANSFORMER, tiny_port / TRANSFORMER)
    with pytest.raises(UsageError, match="is no base"):
        convert(lone, tmp_path / "a", base=lone)
    with pytest.raises(UsageError, match="it needs nothing"):
        convert("builtin:tiny-flux", tmp_path / "b", base=tiny_port)
    other = without_manifest(tiny_port, tmp_path / "other")
    index = json.loads((other / "model_index.json").read_text()) | {
        "transformer": ["diffusers", "SD3Transformer2DModel"]
    }
    (other / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(BadInputError, match="takes no transformer of FluxTransformer2DModel"):
        convert(lone, tmp_path / "c", base=other)
    assert not any((tmp_path / name).exists() for name in "abc")
