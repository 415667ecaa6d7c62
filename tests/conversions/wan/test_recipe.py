"""What Wan's recipes ask for, what they read from the original's own config, and diffusers' script as an oracle."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors.numpy import load_file

from conversions.wan.recipe import TRANSFORMER
from conversions.wan.vae_recipe import AUTOENCODER
from porter.core.checkpoint import Header, read_header, spec
from porter.core.errors import RecipeError
from porter.core.execute import execute
from porter.core.recipe import compile_recipe
from tests.conversions.headers import differing, fingerprint, shapes_of, write
from tests.conversions.proofs.wan import AUTOENCODERS, TRANSFORMERS

REFERENCES = os.environ.get("PORTER_REFERENCES")
T2V, FLF2V = TRANSFORMERS[0].tiny, TRANSFORMERS[2].tiny
VAE_21, VAE_22 = (proof.tiny for proof in AUTOENCODERS)
ORIGINAL = {  # the keys of a released model's config.json, at the size of `T2V`
    "_class_name": "WanModel", "_diffusers_version": "0.30.0", "dim": 36, "eps": 1e-5, "ffn_dim": 44, "freq_dim": 14,
    "in_dim": 5, "model_type": "t2v", "num_heads": 3, "num_layers": 3, "out_dim": 4, "text_len": 512,
}  # fmt: skip


def transformer(config: Mapping[str, Any] = T2V) -> Header:
    found: Header = TRANSFORMER.source_headers(config)
    return found


def test_the_original_s_own_config_is_understood() -> None:
    full = TRANSFORMER.infer_config(transformer(), ORIGINAL)
    assert {k: tuple(v) if isinstance(v, list) else v for k, v in full.items() if not k.startswith("_")} == T2V
    assert full["_class_name"] == "WanTransformer3DModel" and full["_assumed"] == {"rope_max_seq_len": 1024}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "num_attention_heads and eps"),
        ({"num_heads": 3}, "do not say eps"),
        ({**ORIGINAL, "dim": 40}, "dim does not fit"),
        ({**ORIGINAL, "num_heads": 5}, "do not fill the width"),
        ({**ORIGINAL, "num_heads": True}, "do not fill the width"),
        ({**ORIGINAL, "attention_head_dim": 8}, "do not fill the width"),
        ({**ORIGINAL, "eps": "small"}, "eps is no small number"),
        ({**ORIGINAL, "text_len": 226}, "cannot express text_len"),
        ({**ORIGINAL, "in_dim": 16}, "in_channels does not fit"),
        ({**ORIGINAL, "_class_name": "VaceWanModel"}, "the config is of VaceWanModel"),
        ({"_class_name": "WanTransformer3DModel"}, "do not fill the width"),  # its default is 40 heads of 128
    ],
)
def test_what_the_tensors_do_not_say_is_asked_for_by_name(given: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        TRANSFORMER.infer_config(transformer(), given)


def test_attention_without_norms_cannot_be_expressed() -> None:
    header = {name: info for name, info in transformer().items() if ".norm_" not in name}
    with pytest.raises(RecipeError, match="without norms of q and k"):
        TRANSFORMER.infer_config(header, ORIGINAL)


def test_a_tensor_of_another_wan_is_refused() -> None:
    """VACE has more tensors in the same names."""
    header = {**transformer(), "vace_blocks.0.before_proj.bias": spec("F32", (36,), "vace_blocks.0.before_proj.bias")}
    with pytest.raises(RecipeError, match="vace_blocks"):
        compile_recipe(TRANSFORMER, TRANSFORMER.infer_config(header, ORIGINAL), header)


def test_a_cast_keeps_in_float32_what_the_class_does() -> None:
    plan = compile_recipe(TRANSFORMER, FLF2V, TRANSFORMER.source_headers(FLF2V, "F32"), dtype="bfloat16")
    kept = {name for name, info in plan.targets.items() if info.dtype == "F32"}
    wanted = set(WanTransformer3DModel._keep_in_fp32_modules)
    assert kept == {name for name in plan.targets if wanted & set(name.split("."))} and len(kept) > 10


def test_the_latents_statistics_are_asked_for() -> None:
    header = AUTOENCODER.source_headers(VAE_21)
    for given, message in (
        ({}, "latents_mean and latents_std"),
        ({"latents_mean": [0.0] * 3, "latents_std": [1.0] * 4}, "latents_std does not fit"),
        ({"latents_mean": [0.0, 1.0, float("nan")], "latents_std": [1.0] * 3}, "latents_mean does not fit"),
        ({"_class_name": "AutoencoderKLWan"}, "latents_mean does not fit"),  # the class means those of Wan 2.1
    ):
        with pytest.raises(RecipeError, match=message):
            AUTOENCODER.infer_config(header, given)


def test_a_config_of_the_class_without_statistics_means_wan_2_1() -> None:
    (real,) = AUTOENCODERS[0].real
    full = AUTOENCODER.infer_config(AUTOENCODER.source_headers(real.config), {"_class_name": "AutoencoderKLWan"})
    with torch.device("meta"):
        known = AutoencoderKLWan().config
    assert {key: full[key] for key in known if not key.startswith("_")} == {
        key: value for key, value in known.items() if not key.startswith("_")
    }


def test_layers_that_form_no_levels_are_refused() -> None:
    header = dict(AUTOENCODER.source_headers(VAE_21))
    for part in ("weight", "bias"):
        del header[f"encoder.downsamples.2.resample.1.{part}"]
        header[f"encoder.downsamples.2.shortcut.{part}"] = spec("F32", (4,), "x")
    with pytest.raises(RecipeError, match="levels of equal depth"):
        AUTOENCODER.infer_config(header, VAE_21)


@pytest.mark.reference
@pytest.mark.skipif(not REFERENCES, reason="PORTER_REFERENCES names no folder with checkouts")
def test_equal_to_diffusers_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script that made the released Wan 2.2 autoencoder; what it downloads and fills stands aside."""
    stub = types.ModuleType("accelerate")
    stub.init_empty_weights = contextlib.nullcontext  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "accelerate", stub)
    path = Path(str(REFERENCES)) / "diffusers" / "scripts" / "convert_wan_to_diffusers.py"
    found = importlib.util.spec_from_file_location("convert_wan_to_diffusers", path)
    assert found and found.loader
    script = importlib.util.module_from_spec(found)
    found.loader.exec_module(script)
    assert script.TRANSFORMER_KEYS_RENAME_DICT["img_emb.emb_pos"] == "condition_embedder.image_embedder.pos_embed"

    arrays = fingerprint(shapes_of(AUTOENCODER.source_headers(VAE_22)))
    source = write(tmp_path / "source.safetensors", arrays)
    execute(compile_recipe(AUTOENCODER, VAE_22, read_header(source)[0]), tmp_path / "port.safetensors")
    theirs: dict[str, torch.Tensor] = {}

    class Filled:
        def __init__(self, **_: Any) -> None: ...

        def load_state_dict(self, state: dict[str, torch.Tensor], **_: Any) -> None:
            theirs.update(state)

    monkeypatch.setattr(script, "hf_hub_download", lambda *_: "")
    monkeypatch.setattr(script, "AutoencoderKLWan", Filled)
    monkeypatch.setattr(torch, "load", lambda *_, **__: {k: torch.from_numpy(a.copy()) for k, a in arrays.items()})
    script.convert_vae_22()
    ours = load_file(tmp_path / "port.safetensors")
    assert differing(ours, {name: tensor.numpy() for name, tensor in theirs.items()}) == [] and len(theirs) > 100
