"""What `porter convert` takes and gives besides a pipeline's own files.

Files that hold several components, torch files, averaged copies, a base pipeline, shards, ComfyUI's files, and a way
back that needs the original.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from porter import plan
from porter.cli import main
from porter.core.convert import Conversion, convert
from porter.core.errors import BadInputError, MissingError, PorterError, RecipeError, UsageError
from porter.core.family import resolve
from porter.core.port import Port
from tests.commands.test_convert import equal, tree
from tests.conversions.proofs import autoencoder_kl, clip, qwen_image, unet, wan
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


def dtypes(path: Path) -> set[torch.dtype]:
    return {tensor.dtype for tensor in load_file(path).values()}


def test_a_cast_on_the_way_back(tiny_port: Path, tiny_flux: Path, tmp_path: Path) -> None:
    """What ComfyUI loads, and the original layout of a pipeline of which nothing says what it was; with a keep list."""
    convert(tiny_port, tmp_path / "comfy", to="comfyui", dtype="float16", component="transformer", verify=True)
    found = load_file(tmp_path / "comfy" / "diffusion_models" / f"{tiny_port.name}.safetensors")
    whole = load_file(tiny_flux / "flux1-tiny.safetensors")
    assert all(torch.equal(tensor, whole[name].to(torch.float16)) for name, tensor in found.items())
    convert(tiny_port, tmp_path / "encoder", to="comfyui", dtype="float16", component="text_encoder")
    (encoder,) = (tmp_path / "encoder" / "text_encoders").iterdir()
    assert torch.float32 not in dtypes(encoder)
    theirs = without_manifest(tiny_port, tmp_path / "theirs")
    convert(theirs, tmp_path / "back", to="original", dtype="float16")
    assert dtypes(tmp_path / "back" / "ae.safetensors") == {torch.float16}
    with pytest.raises(UsageError, match="of a port restores the original dtypes"):
        convert(tiny_port, tmp_path / "no", to="original", dtype="float16")
    recipe = replace(
        resolve("conversions.flux1.recipe:TRANSFORMER"),
        keep_dtype=("transformer_blocks.{i:int}.attn.to_q.{p:weight|bias}",),
    )
    convert(theirs, tmp_path / "kept", to="original", dtype="float16", component="transformer",
            recipe={"transformer": recipe})  # fmt: skip
    stored = load_file(tmp_path / "kept" / "flux1.safetensors")
    same = {name for name, tensor in stored.items() if tensor.dtype != torch.float16}
    assert same == {name for name in whole if "img_attn.qkv" in name} and same  # of which to_q is a part


def test_only_the_very_original_is_a_base(tiny_flux: Path, tmp_path: Path) -> None:
    convert("builtin:tiny-flux", tmp_path / "half", dtype="float16")
    other = Path(shutil.copytree(tiny_flux, tmp_path / "other"))
    with (other / "flux1-tiny.safetensors").open("r+b") as file:  # another version, of the same size
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    with pytest.raises(BadInputError, match="not the file that the port was made from"):
        convert(tmp_path / "half", tmp_path / "back", to="original", base=other)
    assert not (tmp_path / "back").exists()
    lone = shutil.copy(tiny_flux / "ae.safetensors", tmp_path / "renamed.safetensors")
    convert(tmp_path / "half", tmp_path / "vae", to="original", base=lone, component="vae")
    save_file(load_file(tiny_flux / "ae.safetensors"), tmp_path / "renamed.safetensors", metadata={"a": "b"})
    with pytest.raises(BadInputError, match="not the file that the port was made from"):
        convert(tmp_path / "half", tmp_path / "no", to="original", base=lone, component="vae", dry_run=True)


def test_a_base_called_like_the_ports_own_file(tiny_flux: Path, tiny_port: Path, tmp_path: Path) -> None:
    """An original that lay where diffusers' file lies now."""
    model = tmp_path / "model"
    (model / "transformer").mkdir(parents=True)
    shutil.copy(tiny_flux / "flux1-tiny.safetensors", model / TRANSFORMER)
    convert(model, tmp_path / "half", dtype="float16", component="transformer", config=config_of(tiny_port))
    done = convert(tmp_path / "half", tmp_path / "back", to="original", base=model)
    assert done.manifest and done.manifest["base"]["files"].keys() == {TRANSFORMER}
    assert TRANSFORMER in done.manifest["source"]["files"]
    (restored,) = (tmp_path / "back").rglob("*.safetensors")
    assert equal(restored, tiny_flux / "flux1-tiny.safetensors")


def test_a_folder_as_the_base_of_a_pipeline(tiny_flux: Path, tiny_port: Path, tmp_path: Path) -> None:
    """Only its weights are read, and of those only the files that hold what was lost."""
    theirs = without_manifest(tiny_port, tmp_path / "theirs")
    convert(theirs, tmp_path / "back", to="original", base=tiny_flux)
    assert equal(tmp_path / "back" / "ae.safetensors", tiny_flux / "ae.safetensors")


def test_averaged_and_plain_are_two_jobs(whole_file: Path, tiny_port: Path, tmp_path: Path) -> None:
    """A killed run with --ema is not continued by one without: the files of the two have the same names and sizes."""
    keys = [
        convert(whole_file, tmp_path / "port", component="transformer", config=config_of(tiny_port), averaged=averaged,
                dry_run=True).preparation.key
        for averaged in (True, False, False)
    ]  # fmt: skip
    assert keys[0] != keys[1] == keys[2]
    done = convert(whole_file, tmp_path / "port", component="transformer", config=config_of(tiny_port), averaged=True)
    assert done.manifest and done.manifest["components"]["transformer"]["averaged"] is True


def test_what_comes_from_the_base_is_said(tiny_port: Path, tiny_flux: Path, tmp_path: Path) -> None:
    """Its files stand under the base, its licence beside the source's, and what of it is left out is named."""
    base = Path(shutil.copytree(tiny_port, tmp_path / "base"))
    (base / "LICENSE").write_text("terms")
    lone = shutil.copy(tiny_flux / "ae.safetensors", tmp_path / "ae.safetensors")
    done = convert(lone, tmp_path / "port", base=base)
    assert done.manifest and done.manifest["source"]["files"].keys() == {"ae.safetensors"}
    assert {"LICENSE", "model_index.json", TRANSFORMER} < done.manifest["base"]["files"].keys()
    assert done.manifest["licence"]["base"] == {"license": "apache-2.0"}
    assert done.manifest["licence"]["files"] == ["LICENSE"] and "base: README.md" in done.manifest["not_carried"]


def test_what_comfyui_was_given_is_planned_and_converted_again(
    tiny_port: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """ComfyUI has no text encoders of its own: a port's go over too, those that no recipe took among them."""
    port = tmp_path / "tiny"
    shutil.copytree(tiny_port, port)
    convert(port, tmp_path / "comfy", to="comfyui")
    for name, component in (("tiny", "text_encoder"), ("tiny-2", "text_encoder_2")):
        ours = load_file(tmp_path / "comfy" / "text_encoders" / f"{name}.safetensors")
        theirs = load_file(port / component / "model.safetensors")
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert main(["plan", str(tmp_path / "comfy"), "--quiet"]) == 0
    assert capsys.readouterr().out.startswith(f"porter convert {tmp_path / 'comfy'}")
    convert(tmp_path / "comfy", tmp_path / "again", base=port)
    for name in (TRANSFORMER, VAE, "text_encoder/model.safetensors"):
        assert equal(tmp_path / "again" / name, port / name), name
    convert(port, tmp_path / "one", to="comfyui", component="text_encoder_2")
    assert [path.parent.name for path in (tmp_path / "one").rglob("*.safetensors")] == ["text_encoders"]


def test_the_way_back_leaves_the_index_of_shards(tiny_port: Path, tmp_path: Path) -> None:
    convert("builtin:tiny-flux", tmp_path / "port", shard_size="3MB")
    done = convert(tmp_path / "port", tmp_path / "back", to="original")
    assert not list((tmp_path / "back").rglob("*.index.json"))
    assert f"{TRANSFORMER}.index.json" in done.to_json()["not_carried"]


def test_only_some_components_have_averaged_copies(whole_file: Path, tiny_port: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"vae: .* has no averaged copy") as error:
        convert(whole_file, tmp_path / "port", base=tiny_port, component="vae", averaged=True)
    assert error.value.hint == "--ema with --component transformer, which has them"


def test_a_loss_is_said_and_the_next_command_undoes_it(
    tiny_flux: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["convert", str(tiny_flux), "--dtype", "float16", "-o", "half"]) == 0
    assert re.search(r"loss +\d+ tensors rounded; manifest.json says which", capsys.readouterr().out)
    assert main(["convert", "half", "--to", "original", "-o", "back"]) == 6
    said = capsys.readouterr().err
    assert re.search(r"it rounds \d+ tensors, the first", said) and "another name" not in said
    following = re.search(r"next: +porter (.*)", said)
    assert following and main(shlex.split(following[1].replace("OUT", "back"))) == 0
    assert equal(Path("back/flux1-tiny.safetensors"), tiny_flux / "flux1-tiny.safetensors")


@pytest.mark.parametrize("dtype", ["int8", "F8_E4M3", "float99"])
def test_a_dtype_that_weights_are_not_cast_to(dtype: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="weights are not cast to"):
        convert("builtin:tiny-flux", tmp_path / "out", dtype=dtype)


def test_a_file_of_several_components_asks_for_a_base(whole_file: Path, tmp_path: Path) -> None:
    """One --config is for one component: of several, that would be refused."""
    with pytest.raises(PorterError) as error:
        convert(whole_file, tmp_path / "port")
    assert "--base PIPELINE -o PORT" in str(error.value.hint)


def drawn(proofs: Any, name: str, prefix: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """An original component of drawn weights behind a prefix, and its config."""
    proof = next(each for each in proofs.PROOFS if each.name == name)
    noise = torch.Generator().manual_seed(len(name))
    tensors = {
        prefix + key: torch.randn(info.shape, generator=noise)
        for key, info in resolve(proof.recipe).source_headers(proof.tiny).items()
    }  # fmt: skip
    return tensors, {key: value for key, value in proof.tiny.items() if not key.startswith("_")}


@pytest.fixture
def diffusion_v1(tmp_path: Path) -> tuple[Path, Path]:
    """A file as Stable Diffusion 1.5 was released in, and a base whose autoencoder's config leaves the scale out."""
    denoiser, unet_config = drawn(unet, "unet-1", "model.diffusion_model.")
    decoder, vae_config = drawn(autoencoder_kl, "autoencoder-kl-quant-convs", "first_stage_model.")
    text, text_config = drawn(clip, "clip-kept", "cond_stage_model.transformer.")
    text["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(8)[None]
    copies = {"model_ema." + name.removeprefix("model.").replace(".", ""): -tensor for name, tensor in denoiser.items()}
    extras = {"alphas_cumprod": torch.ones(4), "model_ema.decay": torch.tensor(0.5)}
    save_file(denoiser | decoder | text | copies | extras, tmp_path / "v1-5-pruned.safetensors")
    base = tmp_path / "base"
    vae_config = {key: value for key, value in vae_config.items() if key not in ("scaling_factor", "shift_factor")}
    entries = {
        "unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
    }  # fmt: skip
    configs = {
        "model_index.json": {"_class_name": "StableDiffusionPipeline", **entries},
        "unet/config.json": {**unet_config, "_class_name": "UNet2DConditionModel"},
        "vae/config.json": {**vae_config, "_class_name": "AutoencoderKL"},
        "text_encoder/config.json": {**text_config, "architectures": ["CLIPTextModel"]},
    }  # fmt: skip
    for name, content in configs.items():
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text(json.dumps(content))
    return tmp_path / "v1-5-pruned.safetensors", base


def test_a_released_file_beside_its_own_pipeline(diffusion_v1: tuple[Path, Path], tmp_path: Path) -> None:
    """The base says what no tensor does; a buffer of older versions is dropped by name, not carried into the port."""
    file, base = diffusion_v1
    done = convert(file, tmp_path / "port", base=base, verify=True)
    assert {job.component: job.recipe.name for job in done.preparation.jobs} == {
        "unet": "unet-2d-condition", "vae": "autoencoder-kl", "text_encoder": "clip-text",
    }  # fmt: skip
    assert config_of(tmp_path / "port", "vae")["scaling_factor"] == 0.18215
    assert not [name for name in load_file(tmp_path / "port/text_encoder/model.safetensors") if "position_ids" in name]
    assert done.manifest
    assert [item["tensor"] for item in done.manifest["loss"]["dropped"]] == ["text_model.embeddings.position_ids"]


def test_averaged_weights_of_the_one_component_that_has_them(diffusion_v1: tuple[Path, Path], tmp_path: Path) -> None:
    file, base = diffusion_v1
    convert(file, tmp_path / "plain", base=base)
    convert(file, tmp_path / "averaged", base=base, averaged=True)
    name = "unet/diffusion_pytorch_model.safetensors"
    plain, averaged = load_file(tmp_path / "plain" / name), load_file(tmp_path / "averaged" / name)
    assert all(torch.equal(averaged[key], -plain[key]) for key in plain)
    assert equal(tmp_path / "plain" / VAE, tmp_path / "averaged" / VAE)
    bare = {name: tensor for name, tensor in load_file(file).items() if not name.startswith("model_ema")}
    save_file(bare, tmp_path / "bare.safetensors")
    with pytest.raises(UsageError, match="has no averaged copy"):
        convert(tmp_path / "bare.safetensors", tmp_path / "no", base=base, averaged=True)


def test_averaged_copies_beside_bare_names(tmp_path: Path) -> None:
    """As training codes save them: in the same dict, or in one of their own beside the weights."""
    bare, config = drawn(autoencoder_kl, "autoencoder-kl-quant-convs", "")
    copies = {"model_ema." + name.replace(".", ""): -tensor for name, tensor in bare.items()}
    save_file(bare | copies | {"model_ema.decay": torch.tensor(0.5)}, tmp_path / "one.safetensors")
    torch.save({"model": bare, "ema": {name: -tensor for name, tensor in bare.items()}, "opt": {"state": {}}},
               tmp_path / "two.pt")  # fmt: skip
    for file in ("one.safetensors", "two.pt"):
        found = plan(tmp_path / file)
        assert [part.name for part in found.components] == ["vae"] and found.components[0].status == "convert", file
        assert [extra.name for extra in found.extras] == ["averaged copies"], file
        for averaged in (False, True):
            out = tmp_path / f"{file}-{averaged}"
            convert(tmp_path / file, out, config=config, averaged=averaged, verify=not averaged)
            first = load_file(out / VAE)["encoder.conv_in.bias"]
            assert torch.equal(first, -bare["encoder.conv_in.bias"] if averaged else bare["encoder.conv_in.bias"])


def test_one_packed_component_leaves_the_others_plain(whole_file: Path, tiny_port: Path, tmp_path: Path) -> None:
    """An all-in-one file whose text encoder alone is fp8: that one is refused, the others are converted."""
    tensors = load_file(whole_file)
    for name, tensor in tensors.items():
        if name.startswith("text_encoders."):
            tensors[name] = tensor.to(torch.float8_e4m3fn)
    save_file(tensors, tmp_path / "mixed.safetensors")
    found = {part.name: (part.status, part.quantised) for part in plan(tmp_path / "mixed.safetensors").components}
    assert found["transformer"] == ("convert", None) and found["vae"] == ("convert", None)
    status, packed = found["text_encoder"]
    assert status == "port" and packed and packed.startswith("fp8 without scales")
    convert(tmp_path / "mixed.safetensors", tmp_path / "port", component="transformer", config=config_of(tiny_port))
    assert equal(tmp_path / "port" / TRANSFORMER, tiny_port / TRANSFORMER)


def test_an_encoder_of_another_class_than_the_family_s(whole_file: Path, tiny_port: Path, tmp_path: Path) -> None:
    """It is named and left; the base gives its own, and the rest is converted."""
    clip_l = "text_encoders.clip_l.transformer."
    tensors = {name.replace(clip_l, clip_l + "text_model."): tensor for name, tensor in load_file(whole_file).items()}
    tensors[clip_l + "text_projection.weight"] = torch.eye(8)
    save_file(tensors, tmp_path / "projected.safetensors")
    part = next(each for each in plan(tmp_path / "projected.safetensors").components if each.name == "text_encoder")
    assert part.status == "port" and "text_encoder is of CLIPTextModel here" in part.note
    done = convert(tmp_path / "projected.safetensors", tmp_path / "port", base=tiny_port)
    assert {job.component for job in done.preparation.jobs} == {"transformer", "vae"}
    assert equal(tmp_path / "port/text_encoder/model.safetensors", tiny_port / "text_encoder/model.safetensors")
    left = done.to_json()["left_tensors"]["projected.safetensors"]["count"]
    assert left >= len([name for name in tensors if name.startswith("text_encoders.")])


def test_the_config_beside_the_weights_of_an_original_repository(tmp_path: Path) -> None:
    """As Wan's are laid out: config.json at the top, or in a folder for each of two denoisers."""
    tensors, config = drawn(wan, "wan-transformer-i2v", "")
    heads = config["num_attention_heads"]
    original = {"_class_name": "WanModel", "dim": heads * config["attention_head_dim"], "num_heads": heads,
                "eps": config["eps"], "model_type": "i2v", "text_len": 512}  # fmt: skip
    for place, parts in (("one", [""]), ("two", ["high_noise_model/", "low_noise_model/"])):
        for part in parts:
            folder = tmp_path / place / part
            folder.mkdir(parents=True)
            save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
            (folder / "config.json").write_text(json.dumps(original))
        done = convert(tmp_path / place, tmp_path / f"{place}-port", verify=True)
        assert [job.component for job in done.preparation.jobs] == ["transformer", "transformer_2"][: len(parts)]
        for job in done.preparation.jobs:
            said = config_of(tmp_path / f"{place}-port", job.component)
            assert (said["_class_name"], said["num_attention_heads"]) == ("WanTransformer3DModel", heads)
            assert "model_type" not in said and "dim" not in said


def test_what_is_asked_for_comes_with_the_command(diffusion_v1: tuple[Path, Path], tmp_path: Path) -> None:
    """Of a file of several components --config is one component's, so the next command names it."""
    file, _ = diffusion_v1
    with pytest.raises(RecipeError, match="CLIPTextModel: the tensors do not say") as error:
        convert(file, tmp_path / "port")
    assert f"porter convert {file} --component text_encoder --config FILE" in str(error.value.hint)
    config = drawn(clip, "clip-kept", "")[1]
    convert(file, tmp_path / "port", component="text_encoder", config=config, verify=True)


def test_a_prefix_does_not_change_which_recipe_reads_the_config(tmp_path: Path) -> None:
    """Names that are the class's own, behind a prefix: what the tensors show is in the config.json all the same."""
    bare, config = drawn(qwen_image, "qwen-image-transformer", "")
    given = {key: config[key] for key in ("axes_dims_rope", "zero_cond_t", "use_layer3d_rope")}
    save_file(bare, tmp_path / "bare.safetensors")
    save_file({f"model.diffusion_model.{name}": t for name, t in bare.items()}, tmp_path / "behind.safetensors")
    for name in ("bare", "behind"):
        convert(tmp_path / f"{name}.safetensors", tmp_path / name, config=given, verify=True)
    assert config_of(tmp_path / "behind") == config_of(tmp_path / "bare")
    assert equal(tmp_path / "behind" / TRANSFORMER, tmp_path / "bare" / TRANSFORMER)
