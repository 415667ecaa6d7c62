"""The pitfalls that a config triggers, and those that a harmless one does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from porter.core.defaults import call_source, class_source, config_source, with_kept_modules
from porter.core.plan import ComponentPlan, Layout
from porter.core.planning import plan
from porter.core.risks import Part, Risk, risks_of, risks_of_all, unusual
from porter.core.survey import Survey, source_of
from tests.core.risk_configs import (
    CLIP_G,
    CLIP_L,
    CLIP_VISION,
    EMA,
    FLUX,
    FLUX_SCHEDULER,
    FLUX_VAE,
    LTX_VAE,
    LUMINA2,
    MISTRAL3,
    QWEN_IMAGE,
    QWEN_VL,
    SD15_VAE,
    SDXL_SCHEDULER,
    SDXL_UNET,
    T5_XXL,
)


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
    denoiser = "WanTransformer3DModel"
    assert (43, "patch_size") in keys({"patch_size": [1, 2, 2]}, denoiser) and not keys({"patch_size": 1}, denoiser)


def test_against_the_class() -> None:
    source = class_source("diffusers", "WanTransformer3DModel")
    found = risks_of("transformer", "WanTransformer3DModel", {"made_up": 1}, source)
    assert any(risk.key == "made_up" and "ignored" in risk.text for risk in found)
    assert any(risk.key == "eps" and "1e-06" in risk.text for risk in found)
    assert any(risk.pitfall == 42 and "norm2" in str(risk.value) for risk in found)
    assert unusual({"patch_size": [1, 2, 2], "num_layers": 30}, source) == {"num_layers": (30, 40)}


def _part(name: str, config: dict[str, Any], class_name: str | None = None) -> Part:
    """A component as `plan` would see it."""
    model_type = config.get("model_type")
    named = class_name or config["_class_name"]
    if isinstance(model_type, str):
        found = config_source(model_type)
        return Part(name, named, config, with_kept_modules(found, named, model_type) if found else None)
    return Part(name, named, config, class_source("diffusers", named))


VAE, TWO_CLIPS = _part("vae", FLUX_VAE), _part("text_encoder_2", CLIP_G, "CLIPTextModelWithProjection")


@pytest.mark.parametrize(("part", "others", "pitfall", "key"), [
    (_part("vae", SD15_VAE), (), 30, "scaling_factor"),  # left to the class, which says 0.18215
    (_part("vae", FLUX_VAE), (), 30, "shift_factor"),
    (_part("transformer", FLUX), (VAE,), 43, "in_channels"),
    (_part("transformer", {**FLUX, "in_channels": 384, "out_channels": 64}), (VAE,), 43, "in_channels"),
    (_part("transformer", QWEN_IMAGE), (VAE,), 43, "in_channels"),
    (_part("transformer", LUMINA2), (VAE,), 43, "patch_size"),
    (_part("transformer", LUMINA2), (), 36, "axes_dim_rope"),
    (_part("transformer", FLUX), (), 36, "axes_dims_rope"),  # left to the class
    (_part("text_encoder", QWEN_VL, "Qwen2_5_VLForConditionalGeneration"), (), 36, "rope_scaling"),
    (_part("text_encoder", QWEN_VL, "Qwen2_5_VLForConditionalGeneration"), (), 52, "num_hidden_layers"),
    (_part("text_encoder", {"model_type": "gemma2", "num_hidden_layers": 26}, "Gemma2Model"), (), 52,
     "num_hidden_layers"),
    (_part("text_encoder", MISTRAL3, "Mistral3ForConditionalGeneration"), (), 52, "text_config.num_hidden_layers"),
    (_part("text_encoder", CLIP_L, "CLIPTextModel"), (TWO_CLIPS,), 52, "num_hidden_layers"),
    (TWO_CLIPS, (), 52, "num_hidden_layers"),
    (_part("image_encoder", CLIP_VISION, "CLIPVisionModel"), (), 52, "num_hidden_layers"),
    (_part("text_encoder_2", T5_XXL, "T5EncoderModel"), (), 42, "_keep_in_fp32_modules"),
    (_part("text_encoder", {**T5_XXL, "model_type": "umt5"}, "UMT5EncoderModel"), (), 42, "_keep_in_fp32_modules"),
    (_part("text_encoder", {"model_type": "x", "rope_scaling": {"type": "yarn"}}, "LlamaModel"), (), 56,
     "rope_scaling"),
    (_part("scheduler", {"shift": 1.73}, "FlowMatchEulerDiscreteScheduler"), (), 28, "shift"),
    (_part("scheduler", {}, "FlowMatchEulerDiscreteScheduler"), (), 12, "shift"),
    (_part("scheduler", {"base_shift": 0.5}, "FlowMatchEulerDiscreteScheduler"), (), 12, "use_dynamic_shifting"),
    (_part("scheduler", {"beta_end": 0.012}, "PNDMScheduler"), (), 12, "prediction_type"),
])  # fmt: skip
def test_what_fires(part: Part, others: tuple[Part, ...], pitfall: int, key: str) -> None:
    found = [risk for risk in risks_of_all([part, *others]) if risk.component == part.name]
    assert (pitfall, key) in {(risk.pitfall, risk.key) for risk in found}


@pytest.mark.parametrize(("part", "others", "upcasts", "silent"), [
    (_part("vae", FLUX_VAE), (), False, {9}),
    (_part("vae", SD15_VAE), (), False, {9, 12}),
    (_part("vae", LTX_VAE), (), None, {30, 43}),
    (_part("transformer", LUMINA2), (VAE,), None, {30, 45}),
    (_part("transformer", FLUX), (), None, {43}),  # without an autoencoder nobody knows
    (_part("transformer", {**FLUX, "in_channels": 128}), (_part("vae", LTX_VAE),), None, {43}),
    (_part("unet", SDXL_UNET), (), True, {12, 30, 43, 45, 46}),
    (_part("image_encoder", CLIP_VISION, "CLIPVisionModelWithProjection"), (), None, {12, 43, 45, 52, 54}),
    (_part("text_encoder", CLIP_L, "CLIPTextModel"), (), None, {12, 42, 43, 45, 52}),
    (_part("text_encoder_2", T5_XXL, "T5EncoderModel"), (), None, {12, 45, 52, 54}),
    (_part("text_encoder", {"model_type": "bert", "num_hidden_layers": 24}, "BertModel"), (), None, {42, 52}),
    (_part("text_encoder", QWEN_VL, "Qwen2_5_VLForConditionalGeneration"), (), None, {12, 42, 56}),
    (_part("text_encoder", {"model_type": "x", "rope_scaling": {"rope_type": "default"}}, "LlamaModel"), (), None,
     {36, 56}),
    (_part("scheduler", FLUX_SCHEDULER), (), None, {12, 28}),
    (_part("scheduler", {"flow_shift": 3.0, "use_flow_sigmas": False}, "UniPCMultistepScheduler"), (), None, {28}),
    (_part("scheduler", {**SDXL_SCHEDULER, "timestep_spacing": "linspace", "steps_offset": 0}), (), None, {2, 29}),
])  # fmt: skip
def test_what_stays_silent(part: Part, others: tuple[Part, ...], upcasts: bool | None, silent: set[int]) -> None:
    found = [risk for risk in risks_of_all([part, *others], upcasts=upcasts) if risk.component == part.name]
    assert not [risk for risk in found if risk.pitfall in silent]


def test_upcasting_is_told_where_it_matters() -> None:
    def told(upcasts: bool | None) -> list[Risk]:
        return [risk for risk in risks_of_all([VAE], upcasts=upcasts) if risk.pitfall == 9]

    assert "overflows" not in told(True)[0].text and "decodes in float32" in told(True)[0].text
    assert "not every pipeline" in told(None)[0].text
    for name, upcasts in (("FluxPipeline", False), ("StableDiffusionXLPipeline", True), ("Lumina2Pipeline", False)):
        call = call_source(name)
        assert call is not None and call.upcasts_decoder == upcasts


def test_ignored_keys_are_one_risk() -> None:
    found = [risk for risk in risks_of_all([_part("unet", {**SDXL_UNET, **EMA})]) if risk.pitfall == 12]
    assert len(found) == 1 and found[0].value == EMA and all(key in found[0].text for key in EMA)
    assert found[0].key == "decay and 6 more"


@pytest.mark.parametrize(("name", "kind"), [
    ("gelu", "exact"), ("gelu_new", "tanh"), ("gelu_pytorch_tanh", "tanh"), ("gelu-approximate", "tanh"),
    ("quick_gelu", "sigmoid"),
])  # fmt: skip
def test_which_gelu_and_by_how_much(name: str, kind: str) -> None:
    x = torch.linspace(-8, 8, 160_001, dtype=torch.float64)
    values = {
        "exact": torch.nn.functional.gelu(x),
        "tanh": torch.nn.functional.gelu(x, approximate="tanh"),
        "sigmoid": x * torch.sigmoid(1.702 * x),
    }
    text = risks_of("x", None, {"hidden_act": name}, None)[0].text
    assert kind in text.split(";")[0]
    for one, other in (("exact", "tanh"), ("exact", "sigmoid"), ("tanh", "sigmoid")):
        assert f"{float((values[one] - values[other]).abs().max()):.1e}".replace("e-0", "e-") in text
    if name != "gelu-approximate":  # diffusers' name
        ours = transformers.activations.ACT2FN[name](x)
        assert float((ours - values[kind]).abs().max()) < 1e-12


def _planned(config: dict[str, Any], class_name: str, library: str, layout: Layout) -> ComponentPlan:
    return ComponentPlan(
        name="transformer", library=library, class_name=class_name, status="port", layout=layout, files=(), bytes=0,
        parameters=None, dtypes={}, recipe=None, config=config,
    )  # fmt: skip


def test_a_config_of_the_original_code_is_not_judged_by_the_class() -> None:
    config = {"model_type": "t2v", "dim": 5120, "eps": 1e-06, "in_dim": 16, "num_heads": 40, "text_len": 512}
    original = _planned(config, "WanTransformer3DModel", "diffusers", "original")
    assert source_of(original) is None and not Survey(components=[original]).risks()
    converted = original.replace(layout="diffusers")
    assert source_of(converted) is not None
    assert any("dim" in risk.text and risk.pitfall == 12 for risk in Survey(components=[converted]).risks())


def test_survey_finds_the_kept_modules_and_heeds_the_pipeline() -> None:
    encoder = _planned(T5_XXL, "T5EncoderModel", "transformers", "diffusers").replace(name="text_encoder_2")
    vae = _planned(FLUX_VAE, "AutoencoderKL", "diffusers", "diffusers").replace(name="vae")
    found = Survey(pipeline_class="FluxPipeline", components=[encoder, vae]).risks()
    kept = [risk for risk in found if risk.pitfall == 42]
    assert [(risk.component, risk.key, risk.value) for risk in kept] == [
        ("text_encoder_2", "_keep_in_fp32_modules", "wo")
    ]
    assert "float16" in kept[0].text and not [risk for risk in found if risk.pitfall == 9]
    upcasting = Survey(pipeline_class="StableDiffusionXLPipeline", components=[vae]).risks()
    assert [risk.key for risk in upcasting if risk.pitfall == 9] == ["force_upcast"]


def test_the_worst_come_first() -> None:
    parts = [
        _part("text_encoder", CLIP_L, "CLIPTextModel"), _part("text_encoder_2", T5_XXL, "T5EncoderModel"),
        _part("scheduler", FLUX_SCHEDULER), _part("transformer", {**FLUX, "made_up": 1}), VAE,
    ]  # fmt: skip
    found = risks_of_all(parts, upcasts=False)
    assert [(risk.component, risk.key) for risk in found[:6]] == [
        ("vae", "scaling_factor"), ("vae", "shift_factor"), ("transformer", "in_channels"),
        ("transformer", "axes_dims_rope"), ("transformer", "guidance_embeds"), ("scheduler", "use_dynamic_shifting"),
    ]  # fmt: skip
    numbers = [risk.pitfall for risk in found]
    assert numbers.index(42) < numbers.index(46) < numbers.index(12) and found[-1].key == "made_up"
    clips = risks_of_all(
        [_part("text_encoder", CLIP_L, "CLIPTextModel"), TWO_CLIPS, _part("scheduler", SDXL_SCHEDULER)]
    )
    assert [risk.component for risk in clips if risk.pitfall == 46] == ["text_encoder", "text_encoder_2"]  # stable
    assert clips[0].pitfall == 52 and clips[-1].pitfall == 12


def test_a_u_net_that_no_encoder_answers(tmp_path: Path) -> None:
    def unmet(encoders: dict[str, dict[str, Any]], **unet: Any) -> list[tuple[str, int]]:
        names = [("UNet2DConditionModel", "unet", unet)]
        names += [("CLIPTextModel", name, {"model_type": "clip_text_model", **said}) for name, said in encoders.items()]
        parts = [_part(name, config, class_name) for class_name, name, config in names]
        return [(r.key, r.value) for r in risks_of_all(parts, whole=True) if r.pitfall == 7]

    small, large = {"hidden_size": 768, "projection_dim": 768}, {"hidden_size": 1280, "projection_dim": 1280}
    assert unmet({"text_encoder": small}, cross_attention_dim=2048) == [("cross_attention_dim", 2048)]
    assert not unmet({"text_encoder": small, "text_encoder_2": large}, cross_attention_dim=2048)
    assert not unmet({"text_encoder": small}, cross_attention_dim=768)
    assert not unmet({"text_encoder": small}, cross_attention_dim=2048, encoder_hid_dim=768)
    assert not unmet({}, cross_attention_dim=2048)
    document = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"],
                "text_encoder": ["transformers", "CLIPTextModel"]}  # fmt: skip
    (tmp_path / "model_index.json").write_text(json.dumps(document))
    clip = {"model_type": "clip_text_model", **small}
    for name, config in (("unet", {"cross_attention_dim": 2048}), ("text_encoder", clip)):
        assert not any(risk.pitfall == 7 for risk in plan(tmp_path).risks)  # not before all configs are here
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    first = plan(tmp_path).risks[0]
    assert (first.component, first.pitfall, first.value) == ("unet", 7, 2048) and "768" in first.text


def test_left_out_keys_come_before_ignored_ones() -> None:
    found = risks_of_all(
        [_part("scheduler", {"skip_prk_steps": True}, "DDIMScheduler"), _part("s", {}, "DDIMScheduler")]
    )
    ignored = [number for number, risk in enumerate(found) if "ignored" in risk.text]
    assert ignored == [len(found) - 1] and sum(risk.key == "prediction_type" for risk in found) == 2


def test_pipelines_of_one_source_are_told_apart() -> None:
    """Two that hold one CLIP each take no penultimate layer; a transformer's latents are those of its own folder."""
    clips = [_part(f"{folder}/text_encoder", CLIP_L, "CLIPTextModel") for folder in ("base", "refiner")]
    assert not [risk for risk in risks_of_all(clips) if risk.pitfall == 52]
    apart = [_part("a/transformer", FLUX), _part("b/vae", FLUX_VAE)]
    assert not [risk for risk in risks_of_all(apart) if risk.pitfall == 43]


def test_a_default_that_is_true_counts() -> None:
    found = risks_of_all([_part("transformer", {}, "WanTransformer3DModel")])
    assert any(risk.key == "cross_attn_norm" and risk.value is True for risk in found)
