"""CLIP's text encoders: which role a lone tower gets, what is written for transformers, what is asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch

from conversions.common.clip.recipe import KEPT, PENULTIMATE, WITH_PROJECTION
from porter.core.architectures import architectures
from porter.core.checkpoint import read_header
from porter.core.convert import convert
from porter.core.errors import RecipeError, UsageError
from porter.core.execute import execute
from porter.core.planning import plan
from porter.core.recipe import compile_recipe
from tests.conversions.headers import differing, fingerprint, shapes_of, write
from tests.conversions.proofs.clip import PROOFS
from tests.sparse_models import names_of, sparse

TINY = {proof.name: dict(proof.tiny) for proof in PROOFS}
GIVEN = {"num_attention_heads": 2, "hidden_act": "gelu", "layer_norm_eps": 1e-5, "eos_token_id": 2}


def tower(path: Path, **more: Any) -> Path:
    """A tower of three layers, without its scale unless asked for."""
    full = {**TINY["open-clip-with-projection"], "_unused": {}, **more}
    return write(path, fingerprint(shapes_of(WITH_PROJECTION.source_headers(full))))


def test_a_tower_becomes_what_the_user_names(tmp_path: Path) -> None:
    """Its tensors are Stable Diffusion XL's second encoder and 2.x's alike; the whole of it where nobody says."""
    source = tower(tmp_path / "tower.safetensors", _unused={"logit_scale": ()})
    (part,) = plan(source).components
    assert (part.name, part.class_name, part.status) == ("text_encoder_2", "CLIPTextModelWithProjection", "convert")
    whole = convert(source, tmp_path / "xl", config=GIVEN, verify=True)
    less = convert(source, tmp_path / "2", component="text_encoder", config=GIVEN, verify=True)
    assert whole.manifest and less.manifest
    assert [item["tensor"] for item in whole.manifest["loss"]["dropped"]] == ["logit_scale"]
    dropped = {item["tensor"] for item in less.manifest["loss"]["dropped"]}
    assert {"logit_scale", "text_projection", "transformer.resblocks.2.ln_1.weight"} < dropped and len(dropped) == 14
    assert less.manifest["family"] == "sd2" and less.manifest["components"]["text_encoder"]["class"] == "CLIPTextModel"
    assert json.loads((tmp_path / "2/text_encoder/config.json").read_text())["num_hidden_layers"] == 2
    with pytest.raises(UsageError, match="unknown component"):
        convert(source, tmp_path / "no", component="text_encoder_3", config=GIVEN)


def test_what_is_written_is_transformers_own(tmp_path: Path) -> None:
    """The file's and the config's names, as released; every value where it belongs; back to the very bytes."""
    source = tower(tmp_path / "tower.safetensors")
    convert(source, tmp_path / "port", config=GIVEN, verify=True)
    folder = tmp_path / "port" / "text_encoder_2"
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["CLIPTextModelWithProjection"] and config["model_type"] == "clip_text_model"
    assert not [key for key in config if key.startswith("_")]
    assert load_torch(folder / "model.safetensors").keys() == set(WITH_PROJECTION.target_headers(config))
    (part,) = plan(folder).components
    assert (part.library, part.status, part.layout) == ("transformers", "reuse", "diffusers")
    convert(tmp_path / "port", tmp_path / "back", to="original")
    assert differing(load_file(tmp_path / "back" / "tower.safetensors"), load_file(source)) == []


def test_a_family_gives_a_tower_its_role_and_that_roles_recipe(tmp_path: Path) -> None:
    """A tower in 2.x's size beside XL's denoiser is XL's second encoder, with the recipe that keeps every layer."""
    for name, family, component in (("unet", "sdxl", "unet"), ("tower", None, "text_encoder")):
        known = next(k for k in architectures() if (k.family, k.component, k.layout) == (family, component, "original"))
        sparse(tmp_path / f"{name}.safetensors", names_of(known))
    parts = {part.name: part for part in plan(tmp_path).components}
    assert parts["text_encoder_2"].class_name == "CLIPTextModelWithProjection"
    assert parts["text_encoder_2"].recipe == "conversions.common.clip.recipe:WITH_PROJECTION"


@pytest.mark.parametrize("recipe", [WITH_PROJECTION, PENULTIMATE, KEPT], ids=lambda recipe: recipe.name)
def test_what_no_tensor_says_is_asked_for(recipe: Any) -> None:
    proof = next(proof for proof in PROOFS if proof.load() is recipe)
    header = recipe.source_headers(proof.tiny)
    for key in GIVEN:
        with pytest.raises(RecipeError, match=f"do not say {key}"):
            recipe.infer_config(header, {name: value for name, value in GIVEN.items() if name != key})
    full = recipe.infer_config(header, GIVEN)
    assert {"pad_token_id", "initializer_range"} < full["_assumed"].keys() and not full["_assumed"].keys() & GIVEN


def test_a_released_config_is_understood() -> None:
    """With what transformers writes of its making; what it leaves out is the class's own default."""
    header = WITH_PROJECTION.source_headers(TINY["open-clip-with-projection"])
    released = {
        "architectures": ["CLIPTextModelWithProjection"], "dropout": 0.0, "torch_dtype": "float16",
        "transformers_version": "4.32.0.dev0", "model_type": "clip_text_model", "hidden_act": "gelu",
        "num_attention_heads": 4, "eos_token_id": 2, "hidden_size": 16, "projection_dim": 24,
    }  # fmt: skip
    full = WITH_PROJECTION.infer_config(header, released)
    assert (full["num_attention_heads"], full["layer_norm_eps"], full["bos_token_id"]) == (4, 1e-5, 49406)
    assert "torch_dtype" not in full and "dropout" not in full
    for wrong, said in (
        ({"architectures": ["CLIPModel"]}, "the config is of CLIPModel"),
        ({"hidden_size": 32}, "hidden_size does not fit"), ({"num_attention_heads": 3}, "do not fill the width"),
        ({"model_type": "t5"}, "model_type does not fit"), ({"vision_config": {}}, "unknown key vision_config"),
    ):  # fmt: skip
        with pytest.raises(RecipeError, match=said):
            WITH_PROJECTION.infer_config(header, {**released, **wrong})


_IN = "transformer.resblocks.{i:int<n}.attn.in_proj_{p:weight|bias}"
_T = "text_model.encoder.layers.{i}.self_attn."
FAULTS = {
    "q and k traded": WITH_PROJECTION.replace_rule(
        _IN, targets=(_T + "k_proj.{p}", _T + "q_proj.{p}", _T + "v_proj.{p}")
    ),
    "not transposed": WITH_PROJECTION.replace_rule("text_projection", ops=()),
    "norms traded": WITH_PROJECTION.replace_rule(
        "transformer.resblocks.{i:int<n}.ln_{k:1|2}.{p:weight|bias}",
        targets="text_model.encoder.layers.{i}.layer_norm{3-k}.{p}",
        sources="transformer.resblocks.{i:int<n}.ln_{k:int}.{p:weight|bias}",
    ),
    "the last layer kept": WITH_PROJECTION.replace_rule(_IN, sources=_IN.replace("<n", "<n-1")),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_seen(tmp_path: Path, fault: str) -> None:
    """At a square projection, which shapes alone do not tell from its transpose."""
    full = {**TINY["open-clip-with-projection"], "projection_dim": 16, "_unused": {}}
    source = tower(tmp_path / "in.safetensors", projection_dim=16)
    wanted = compile_recipe(WITH_PROJECTION, full, read_header(source)[0])
    try:
        found = compile_recipe(FAULTS[fault], full, read_header(source)[0])
    except RecipeError:
        return
    for name, each in (("right", wanted), ("wrong", found)):
        execute(each, tmp_path / f"{name}.safetensors")
    assert differing(load_file(tmp_path / "wrong.safetensors"), load_file(tmp_path / "right.safetensors"))


def test_the_pooled_place_is_the_highest_id(tmp_path: Path) -> None:
    """`eos_token_id: 2` is transformers' word for the original's rule; the tokenizer's own id is another rule."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(**{k: v for k, v in TINY["open-clip-with-projection"].items() if not k.startswith("_")})
    torch.manual_seed(0)
    model = CLIPTextModelWithProjection(config).eval()
    ids = torch.tensor([[5, 9, 40, 7, 3]])
    pooled = model(ids).text_embeds
    states = model.text_model(ids).last_hidden_state
    torch.testing.assert_close(pooled, model.text_projection(states[:, 2]))


def test_the_encoder_inside_a_checkpoint_goes_by_its_familys_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Checkpoints of Stable Diffusion 1.x hold a buffer that today's class does not have: it is dropped, and said."""
    buffer, prefix = "text_model.embeddings.position_ids", "cond_stage_model.transformer."
    encoder = TINY["clip-kept"]
    known = next(k for k in architectures() if (k.family, k.component, k.layout) == ("sd1", "unet", "original"))
    shapes = {prefix + name: shape for name, shape in shapes_of(KEPT.source_headers(encoder)).items()}
    unet = {f"model.diffusion_model.{name}": shape for name, shape in names_of(known).items()}
    real = sparse(tmp_path / "v1.safetensors", {**unet, **shapes, prefix + buffer: (1, 9)})
    parts = {part.name: part for part in plan(real).components}
    assert parts["text_encoder"].recipe == "conversions.common.clip.recipe:KEPT"
    given = {key: value for key, value in encoder.items() if not key.startswith("_")}
    done = convert(real, tmp_path / "port", component="text_encoder", config=given, verify=True)
    assert done.verified["text_encoder"]["tensors"] == len(shapes)
    assert capsys.readouterr().err == ""  # no bars of the library's own
    assert [item["tensor"] for item in done.to_json()["loss"]["dropped"]] == [buffer]


@pytest.mark.parametrize("component", ["text_encoder", "text_encoder_2"])
def test_a_merger_s_buffer_is_dropped_by_name(component: str, tmp_path: Path) -> None:
    """Merged checkpoints of XL hold a buffer of transformers' beside open_clip's own names."""
    name = "transformer.text_model.embeddings.position_ids"
    source = tower(tmp_path / "tower.safetensors", _unused={name: (1, 8)})
    done = convert(source, tmp_path / "port", component=component, config=GIVEN, verify=True)
    assert done.manifest
    dropped = {item["tensor"]: item["reason"] for item in done.manifest["loss"]["dropped"]}
    assert "counts from 0" in dropped[name]
