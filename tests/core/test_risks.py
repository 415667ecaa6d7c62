"""Class defaults read without importing, and the pitfalls that a config triggers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
from transformers import CLIPTextConfig, T5Config

from porter.core.defaults import class_source, config_source
from porter.core.planning import plan
from porter.core.risks import risks_of, unusual

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


def test_risks_of_the_embedded_model() -> None:
    found = {(risk.component, risk.pitfall, risk.key) for risk in plan("builtin:tiny-flux").risks}
    for expected in [
        ("vae", 30, "scaling_factor"), ("vae", 30, "shift_factor"), ("vae", 15, "use_quant_conv"),
        ("transformer", 36, "axes_dims_rope"), ("transformer", 32, "guidance_embeds"),
        ("scheduler", 27, "use_dynamic_shifting"), ("text_encoder", 46, "hidden_act"),
    ]:  # fmt: skip
        assert expected in found


def test_rules_look_at_values() -> None:
    def keys(config: dict[str, object], name: str | None = None) -> set[tuple[int, str]]:
        return {(risk.pitfall, risk.key) for risk in risks_of("x", name, config, None)}

    assert (45, "norm_eps") in keys({"norm_eps": 1e-4}) and not keys({"norm_eps": 1e-6})
    assert (37, "num_key_value_heads") in keys({"num_attention_heads": 8, "num_key_value_heads": 2})
    assert not keys({"num_attention_heads": 8, "num_key_value_heads": 8})
    assert (28, "shift") in keys({"shift": 3.0}) and not keys({"shift": 1.0})
    assert (31, "solver_order") in keys({"solver_order": 2}, "UniPCMultistepScheduler")
    assert (6, "_class_name") in keys({}, "UniPCMultistepScheduler") and (1, "_class_name") in keys({}, "DDPMScheduler")
    assert (43, "patch_size") in keys({"patch_size": [1, 2, 2]}) and not keys({"patch_size": 1})


def test_against_the_class() -> None:
    source = class_source("diffusers", "WanTransformer3DModel")
    found = risks_of("transformer", "WanTransformer3DModel", {"made_up": 1}, source)
    assert any(risk.key == "made_up" and "ignored" in risk.text for risk in found)
    assert any(risk.key == "eps" and "1e-06" in risk.text for risk in found)
    assert any(risk.pitfall == 42 and "norm2" in str(risk.value) for risk in found)
    assert unusual({"patch_size": [1, 2, 2], "num_layers": 30}, source) == {"num_layers": (30, 40)}
