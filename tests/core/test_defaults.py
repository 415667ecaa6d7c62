"""What the installed libraries' sources say of their classes, against the libraries themselves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import transformers
from transformers import CLIPTextConfig, T5Config

from porter.core.defaults import class_source, config_source, with_kept_modules
from porter.core.installed import class_block

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", [
    "FluxTransformer2DModel", "AutoencoderKL", "UNet2DConditionModel", "WanTransformer3DModel", "SD3Transformer2DModel",
    "FlowMatchEulerDiscreteScheduler", "DPMSolverMultistepScheduler", "AutoencoderKLWan",
])  # fmt: skip
def test_defaults_are_those_of_the_class(name: str) -> None:
    """Against the library itself, which the code under test never imports."""
    import inspect

    found = class_source("diffusers", name)
    assert found is not None
    signature = inspect.signature(getattr(diffusers, name).__init__).parameters
    real = {n: p.default for n, p in signature.items() if p.default is not p.empty}
    assert {n: v for n, v in found.defaults.items() if n in real} == real
    keep = getattr(getattr(diffusers, name), "_keep_in_fp32_modules", None)
    assert found.keep_in_fp32 == tuple(keep or ())


def test_config_classes_of_transformers() -> None:
    for model_type, real in (("t5", T5Config()), ("clip_text_model", CLIPTextConfig())):
        found = config_source(model_type)
        assert found is not None and len(found.defaults) > 10
        for key in ("vocab_size", "num_layers" if model_type == "t5" else "num_hidden_layers"):
            assert found.defaults[key] == getattr(real, key)
    assert config_source("no_such_model") is None and config_source("../x") is None
    assert class_source("diffusers", "Nonsense") is None and class_source("no_library", "X") is None
    assert class_source("diffusers", "x; import os") is None


def test_nothing_is_imported() -> None:
    code = """
import sys
from porter.core.defaults import class_source, config_source
assert class_source("diffusers", "FluxTransformer2DModel") and config_source("t5")
assert not {"diffusers", "transformers", "torch"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize(("class_name", "model_type"), [
    ("T5EncoderModel", "t5"), ("UMT5EncoderModel", "umt5"), ("CLIPTextModel", "clip_text_model"),
    ("Qwen3ForCausalLM", "qwen3"), ("GptOssForCausalLM", "gpt_oss"), ("RwkvModel", "rwkv"),
    ("Glm4MoeForCausalLM", "glm4_moe"),
])  # fmt: skip
def test_kept_modules_are_those_of_transformers(class_name: str, model_type: str) -> None:
    real, config = getattr(transformers, class_name), config_source(model_type)
    assert config is not None
    found = with_kept_modules(config, class_name, model_type)
    assert set(found.keep_from_float16) == set(real._keep_in_fp32_modules or ())
    assert set(found.keep_in_fp32) == set(real._keep_in_fp32_modules_strict or ())


def test_a_class_is_cut_out_whole() -> None:
    text = b"import x\n\nclass A(B):\n    a = 1\n    t = '''\nat the margin\n'''\n\n@last\nclass AB:\n    b = 2\n"
    whole = b"class A(B):\n    a = 1\n    t = '''\nat the margin\n'''\n\n"
    assert class_block(text, "A") == (3, whole)
    assert class_block(text, "AB") == (10, b"class AB:\n    b = 2\n") and class_block(text, "C") is None
