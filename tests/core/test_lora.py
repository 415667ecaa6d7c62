"""LoRA files: every writer's names, alphas and settings are read; what is no plain LoRA is refused by its name."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from porter.core.errors import BadInputError, CheckpointError, MissingError, PorterError
from porter.core.lora import read_lora

STEM = "blocks.0.attn.to_q"
RANK = 4


def pair(a: str, b: str, *, rank: int = RANK, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {a: torch.ones(rank, 6, dtype=dtype), b: torch.ones(8, rank, dtype=dtype)}


# form -> (tensors, component and module of the likeliest reading)
FORMS: dict[str, tuple[dict[str, Tensor], tuple[str | None, str]]] = {
    "diffusers": (
        pair(f"transformer.{STEM}.lora_A.weight", f"transformer.{STEM}.lora_B.weight"),
        ("transformer", STEM),
    ),
    "diffusers, older": (pair(f"unet.{STEM}.lora.down.weight", f"unet.{STEM}.lora.up.weight"), ("unet", STEM)),
    "attention processors": (
        pair("unet.mid.attn1.processor.to_out_lora.down.weight", "unet.mid.attn1.processor.to_out_lora.up.weight"),
        ("unet", "mid.attn1.to_out.0"),
    ),
    "text encoder, older": (
        pair(
            "text_encoder.text_model.layers.0.fc1.lora_linear_layer.down.weight",
            "text_encoder.text_model.layers.0.fc1.lora_linear_layer.up.weight",
        ),
        ("text_encoder", "text_model.layers.0.fc1"),
    ),
    "PEFT": (pair(f"base_model.model.{STEM}.lora_A.weight", f"base_model.model.{STEM}.lora_B.weight"), (None, STEM)),
    "PEFT with the adapter's name": (
        pair(f"base_model.model.{STEM}.lora_A.default.weight", f"base_model.model.{STEM}.lora_B.default.weight"),
        (None, STEM),
    ),
    "PEFT in a component": (
        pair(
            f"transformer.base_model.model.{STEM}.lora_A.weight", f"transformer.base_model.model.{STEM}.lora_B.weight"
        ),
        ("transformer", STEM),
    ),
    "kohya": (
        pair("lora_unet_blocks_0_attn_to_q.lora_down.weight", "lora_unet_blocks_0_attn_to_q.lora_up.weight"),
        (None, "blocks_0_attn_to_q"),
    ),
    "kohya's second text encoder": (
        pair("lora_te2_layers_0_fc1.lora_down.weight", "lora_te2_layers_0_fc1.lora_up.weight"),
        ("text_encoder_2", "layers_0_fc1"),
    ),
    "OneTrainer": (
        pair("lora_transformer_blocks_0_fc1.lora_down.weight", "lora_transformer_blocks_0_fc1.lora_up.weight"),
        (None, "blocks_0_fc1"),
    ),
    "ComfyUI": (
        pair(f"diffusion_model.{STEM}.lora_down.weight", f"diffusion_model.{STEM}.lora_up.weight"),
        (None, STEM),
    ),
    "bare": (pair(f"{STEM}.lora_A.weight", f"{STEM}.lora_B.weight"), (None, STEM)),
}


def write(folder: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    file = folder / "it.safetensors"
    save_file(tensors, file, metadata=metadata)
    return file


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read(form: str, tmp_path: Path) -> None:
    tensors, (component, module) = FORMS[form]
    file = read_lora(write(tmp_path, tensors))
    (factor,) = file.factors
    assert (factor.a.name, factor.b.name) == tuple(tensors)
    assert (factor.rank, factor.alpha, factor.scale) == (RANK, None, 1.0)
    assert (factor.places[0].component, factor.places[0].module) == (component, module)
    assert ["scale of 1" in note for note in file.notes] == [True]  # what is taken for granted is said


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64])
def test_alpha_is_read_in_its_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors, _ = FORMS["kohya"]
    alpha = {"lora_unet_blocks_0_attn_to_q.alpha": torch.tensor(6, dtype=dtype)}
    (factor,) = read_lora(write(tmp_path, tensors | alpha)).factors
    assert (factor.alpha, factor.scale) == (6.0, 1.5)


def test_pefts_settings_beside_the_file(tmp_path: Path) -> None:
    tensors = {**FORMS["PEFT"][0]} | pair("base_model.model.out.lora_A.weight", "base_model.model.out.lora_B.weight")
    tensors |= pair("base_model.model.proj_out.lora_A.weight", "base_model.model.proj_out.lora_B.weight", rank=2)
    file = write(tmp_path, tensors)
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "rank_pattern": {"^proj_out": 2}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"alpha_pattern": {"attn.to_q": 2}}))
    scales = {factor.places[0].module: factor.scale for factor in read_lora(file).factors}
    assert scales == {STEM: 0.5, "out": 2.0, "proj_out": 4.0}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"use_rslora": True}))
    scales = {factor.places[0].module: factor.scale for factor in read_lora(file).factors}
    assert scales == {STEM: 4.0, "out": 4.0, "proj_out": 8 / math.sqrt(2)}
    assert not read_lora(file).notes
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"rank_pattern": {}}))
    with pytest.raises(BadInputError, match=r"proj_out .*\n.*rank 4\n.*rank 2"):
        read_lora(file)


def test_settings_in_the_files_metadata(tmp_path: Path) -> None:
    settings = {"transformer.r": 4, "transformer.lora_alpha": 6, "text_encoder.r": 4, "text_encoder.lora_alpha": 2}
    tensors = FORMS["diffusers"][0] | FORMS["text encoder, older"][0]
    file = read_lora(write(tmp_path, tensors, {"lora_adapter_metadata": json.dumps(settings)}))
    assert {f.places[0].component: f.scale for f in file.factors} == {"transformer": 1.5, "text_encoder": 0.5}


@pytest.mark.parametrize(
    "change",
    [{"use_dora": True}, {"peft_type": "LOHA"}, {"init_lora_weights": "pissa"}, {"bias": "all"}, {"lora_alpha": "8"},
     {"lora_alpha": -1}, {"alpha_pattern": {"(a+)+$": 1}}, {"rank_pattern": [1]}, {"use_rslora": "yes"}],
    ids=str,
)  # fmt: skip
def test_settings_of_no_plain_lora_are_refused(change: dict[str, object], tmp_path: Path) -> None:
    file = write(tmp_path, FORMS["PEFT"][0])
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 4} | change))
    with pytest.raises(BadInputError, match=next(iter(change))):
        read_lora(file)


Q = "lora_unet_q"
PLAIN = pair(f"{Q}.lora_down.weight", f"{Q}.lora_up.weight")
KINDS = {
    "DoRA": f"{Q}.dora_scale", "PEFT's DoRA": "transformer.x.lora_magnitude_vector.weight", "LoHa": f"{Q}.hada_w1_a",
    "LoKr": f"{Q}.lokr_w1", "OFT": f"{Q}.oft_blocks", "a middle factor": f"{Q}.lora_mid.weight",
    "differences": f"{Q}.diff_b", "differences of weights": f"{Q}.diff", "differences of norms": f"{Q}.w_norm",
    "biases": "transformer.x.lora_B.bias", "an attention processor": "double.0.processor.qkv_lora1.down.weight",
    "embeddings": "base_model.model.x.lora_embedding_A", "a control network": "lora_controlnet",
    "a whole weight": "transformer.x.weight",
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_other_methods_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    file = write(tmp_path, PLAIN | {KINDS[kind]: torch.ones(2, 2)})
    words = {"PEFT's DoRA": "DoRA", "differences of weights": "differences", "differences of norms": "differences",
             "a whole weight": "no factor"}.get(kind, kind)  # fmt: skip
    with pytest.raises(BadInputError) as caught:
        read_lora(file)
    assert KINDS[kind] in caught.value.what
    assert words in caught.value.what
    assert "1 such tensor of 3" in str(caught.value.found)


def _drop(name: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.pop(f"{Q}.{name}")


def _put(name: str, value: Tensor) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({f"{Q}.{name}": value})


DAMAGE: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "no A": (_drop("lora_down.weight"), r"lora_unet_q has no lora_A \(down\)"),
    "no B": (_drop("lora_up.weight"), r"lora_unet_q has no lora_B \(up\)"),
    "ranks differ": (_put("lora_up.weight", torch.ones(8, 3)), r"lora_down.weight and .*lora_up.weight .*ranks"),
    "rank 0": (lambda t: t.update(pair(*PLAIN, rank=0)), "lora_down.weight is no factor"),
    "a vector": (_put("lora_up.weight", torch.ones(8)), "lora_up.weight is no factor"),
    "integers": (_put("lora_down.weight", torch.ones(4, 6, dtype=torch.int8)), "lora_down.weight holds no weights"),
    "alpha 0": (_put("alpha", torch.tensor(0.0)), r"absurd alpha\n.*above 0.*\n.*alpha 0 at rank 4"),
    "alpha below 0": (_put("alpha", torch.tensor(-4.0)), "absurd alpha"),
    "alpha beyond reason": (_put("alpha", torch.tensor(1e16)), "absurd alpha"),
    "alpha is NaN": (_put("alpha", torch.tensor(math.nan)), "absurd alpha"),
    "alpha is a vector": (_put("alpha", torch.ones(4)), "lora_unet_q.alpha is no alpha"),
    "alpha is no number": (_put("alpha", torch.tensor(True)), "lora_unet_q.alpha is no alpha"),
    "alpha of nothing": (lambda t: t.update({"lora_unet_k.alpha": torch.tensor(1.0)}), "lora_unet_k has no lora_A"),
    "alphas of some": (
        lambda t: t.update(pair("lora_unet_k.lora_down.weight", "lora_unet_k.lora_up.weight"))
        or t.update({f"{Q}.alpha": torch.tensor(1.0)}),
        "lora_unet_k has no alpha, while others have",
    ),
    "two adapters": (
        lambda t: t.update(pair("x.lora_A.one.weight", "x.lora_B.one.weight") | pair("x.lora_A.two.weight", "y.up")),
        "x.lora_A.one.weight and x.lora_A.two.weight|x.lora_A.two.weight and x.lora_A.one.weight",
    ),
    "a name without end": (lambda t: t.update({"x" * 5000 + ".lora_A.weight": torch.ones(1, 1)}), "xxx is no factor"),
    "nothing": (lambda t: t.clear(), "holds no tensors"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_factors_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    change, named = DAMAGE[kind]
    tensors = dict(PLAIN)
    change(tensors)
    with pytest.raises(BadInputError, match=named) as caught:
        read_lora(write(tmp_path, tensors))
    assert caught.value.hint


def test_files_that_are_none(tmp_path: Path) -> None:
    file = write(tmp_path, PLAIN)
    cases: list[tuple[Path, type[PorterError], str]] = [(tmp_path / "none.safetensors", MissingError, "cannot read")]
    for name, data, named in (
        ("short.safetensors", file.read_bytes()[:-8], "truncated"),
        ("tiny.safetensors", b"abc", "too short"),
        ("noise.safetensors", b"\xff" * 100, "header too long"),
    ):
        (tmp_path / name).write_bytes(data)
        cases.append((tmp_path / name, CheckpointError, named))
    torch.save(PLAIN, tmp_path / "pickled.safetensors")
    torch.save(PLAIN, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    cases += [(tmp_path / name, CheckpointError, "is a pickle") for name in ("pickled.safetensors", "old.pt")]
    cases.append((tmp_path, BadInputError, "is no LoRA"))  # several files in it
    for path, error, named in cases:
        with pytest.raises(error, match=named) as caught:
            read_lora(path)
        assert caught.value.hint
    folder = tmp_path / "folder"
    folder.mkdir()
    assert read_lora(write(folder, PLAIN).parent).path == folder / "it.safetensors"


def test_alpha_that_contradicts_the_settings(tmp_path: Path) -> None:
    tensors = FORMS["diffusers"][0] | {f"transformer.{STEM}.alpha": torch.tensor(2.0)}
    settings = {"lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.lora_alpha": 4})}
    with pytest.raises(BadInputError, match=r"alpha contradicts(.*\n)+.*alpha 2"):
        read_lora(write(tmp_path, tensors, settings))
