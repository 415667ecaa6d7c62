"""The native Z-Image pipeline against diffusers.ZImagePipeline on the same folder, step by step."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conversions.z_image.pipeline import ZImagePipeline, ZImagePipelineConfig
from porter.core.errors import BadInputError, UsageError
from runtime.loader import quiet_libraries
from runtime.registry import load
from tests.conversions.z_image.ports import write_port

PROMPT = "a red circle and a blue square"
LONG = "two green triangles on a white background, " * 2 + PROMPT
ROUNDING = 2e-5  # absolute; guidance multiplies the rounding of single predictions


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_port(tmp_path_factory.mktemp("ports") / "tiny")


@pytest.fixture(scope="module")
def native(port: Path) -> ZImagePipeline:
    pipeline = load(port, dtype=torch.float32, device="cpu")
    assert isinstance(pipeline, ZImagePipeline)
    return pipeline


@pytest.fixture(scope="module")
def theirs(port: Path) -> Any:
    return diffusers_pipeline(port)


def diffusers_pipeline(port: Path) -> Any:
    from diffusers import ZImagePipeline as Reference

    with quiet_libraries():
        pipe = Reference.from_pretrained(port, low_cpu_mem_usage=False).to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run_theirs(pipe: Any, seeds: list[int], **options: Any) -> tuple[list[Tensor], Tensor]:
    """(latents after each step, image (B, 3, H, W) in [0, 1])."""
    steps: list[Tensor] = []

    def after(pipe: Any, step: int, t: Any, kept: dict[str, Tensor]) -> dict[str, Tensor]:
        steps.append(kept["latents"].clone())
        return kept

    given = {"height": 64, "width": 64, "max_sequence_length": 96, "num_inference_steps": 3, "prompt": PROMPT} | options
    given["prompt"] = given["prompt"] if isinstance(given["prompt"], str) else list(given["prompt"])  # they write to it
    draws = [torch.Generator().manual_seed(seed) for seed in seeds]
    return steps, pipe(**given, generator=draws, output_type="pt", callback_on_step_end=after).images


def run_ours(pipeline: Any, **fields: Any) -> tuple[dict[str, dict[str, Tensor]], Any]:
    """(tensors by tap, finished request)."""
    seen: dict[str, dict[str, Tensor]] = {}
    tap = lambda name, tensors: seen.update({name: {k: t.clone() for k, t in tensors.items()}})  # noqa: E731
    own = ("cfg_normalization", "cfg_truncation")
    extra = {name: fields.pop(name) for name in own if name in fields}
    given = {"height": 64, "width": 64, "max_sequence_length": 96, "num_inference_steps": 3, "prompt": PROMPT} | fields
    return seen, pipeline.generate(**given, extra=extra, taps=[tap])


CASES: dict[str, dict[str, Any]] = {
    "guided": {"guidance_scale": 4.0, "num_inference_steps": 4},
    "no guidance": {"guidance_scale": 0.0},
    "a scale below 1": {"guidance_scale": 0.5, "negative_prompt": LONG},
    "other size": {"guidance_scale": 2.0, "height": 48, "width": 80},
    "negative prompt": {"guidance_scale": 2.0, "negative_prompt": LONG},
    "normalised": {"guidance_scale": 5.0, "cfg_normalization": 0.75},
    "truncated": {"guidance_scale": 5.0, "cfg_truncation": 0.2, "num_inference_steps": 4},
    "own schedule": {"guidance_scale": 1.0, "sigmas": [1.0, 0.6, 0.1]},
}


@pytest.mark.parametrize("case", CASES)
def test_every_step_and_the_image_equal_diffusers(native: ZImagePipeline, theirs: Any, case: str) -> None:
    seen, batch = run_ours(native, seed=3, **CASES[case])
    steps, image = run_theirs(theirs, [3], **CASES[case])
    for i, latents in enumerate(steps):
        assert (seen[f"denoising.step.{i}"]["latents"] - latents).abs().max() < ROUNDING, f"step {i}"
    assert f"denoising.step.{len(steps)}" not in seen
    assert (batch.output - image).abs().max() < ROUNDING
    assert torch.equal(seen["timestep_preparation"]["sigmas"], theirs.scheduler.sigmas)
    assert float(image.std()) > 1e-2  # the comparison is not of two flat pictures


def test_exact_without_guidance_is_diffusers_in_every_bit(port: Path, theirs: Any) -> None:
    exact = load(port, dtype=torch.float32, device="cpu", quality="exact")
    seen, batch = run_ours(exact, seed=3, guidance_scale=0.0)
    steps, image = run_theirs(theirs, [3], guidance_scale=0.0)
    for i, latents in enumerate(steps):
        assert torch.equal(seen[f"denoising.step.{i}"]["latents"], latents)
    assert torch.equal(batch.output, image)


def test_text_embeddings_and_noise_equal_diffusers(native: ZImagePipeline, theirs: Any) -> None:
    seen, _ = run_ours(native, prompt=[PROMPT, LONG], seed=11, num_inference_steps=1, guidance_scale=1.0)
    with torch.no_grad():
        tokens, empty = theirs.encode_prompt([PROMPT, LONG], device="cpu", max_sequence_length=96)
    for ours, expected in (("prompt_embeds.0", tokens), ("negative_prompt_embeds.0", empty)):
        for row, own in zip(seen["text_encoding"][ours], expected, strict=True):
            assert torch.equal(row[: len(own)], own) and not row[len(own) :].any()
    draws = [torch.Generator().manual_seed(11 + i) for i in range(2)]
    noise = theirs.prepare_latents(2, 4, 64, 64, torch.float32, "cpu", draws)
    assert torch.equal(seen["latent_preparation"]["latents"], noise)


@pytest.mark.parametrize("scale", [0.0, 3.0])
def test_prompts_of_different_lengths_in_one_batch(native: ZImagePipeline, theirs: Any, scale: float) -> None:
    prompts = [PROMPT, LONG]
    _, batch = run_ours(native, prompt=prompts, seed=5, guidance_scale=scale, num_images=2)
    _, image = run_theirs(theirs, [5, 6, 7, 8], prompt=prompts, guidance_scale=scale, num_images_per_prompt=2)
    assert batch.prompt_masks[0].sum(1).diff().abs().max() > 32  # filled to different lengths
    assert (batch.output - image).abs().max() < ROUNDING
    for i, prompt in enumerate((PROMPT, PROMPT, LONG, LONG)):
        _, alone = run_ours(native, prompt=prompt, seed=5 + i, guidance_scale=scale)
        assert (batch.output[i] - alone.output[0]).abs().max() < ROUNDING


def test_everything_asked_for_matters(native: ZImagePipeline) -> None:
    plain: dict[str, Any] = {"seed": 1, "guidance_scale": 3.0}
    first = run_ours(native, **plain)[1].output
    assert torch.equal(first, run_ours(native, **plain)[1].output)
    changes: list[dict[str, Any]] = [
        {"guidance_scale": 0.0}, {"seed": 2}, {"prompt": LONG}, {"negative_prompt": "two"}, {"cfg_normalization": 0.5},
        {"cfg_truncation": 0.1},
    ]  # fmt: skip
    for change in changes:
        assert (first - run_ours(native, **plain | change)[1].output).abs().max() > 1e-3, change


def test_defaults_of_the_base_model_and_of_turbo(port: Path, tmp_path: Path) -> None:
    base = load(port, dtype=torch.float32, device="cpu")
    assert (base.sampling_params.num_inference_steps, base.sampling_params.guidance_scale) == (50, 5.0)
    folder = tmp_path / "turbo"
    shutil.copytree(port, folder)
    settings = folder / "scheduler" / "scheduler_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"shift": 3.0}))
    turbo = load(folder, dtype=torch.float32, device="cpu")
    _, batch = run_ours(turbo, seed=2, num_inference_steps=None)
    steps, image = run_theirs(diffusers_pipeline(folder), [2], num_inference_steps=8, guidance_scale=0.0)
    assert len(steps) == 8 and (batch.output - image).abs().max() < ROUNDING
    assert not batch.do_classifier_free_guidance and batch.negative_prompt_embeds == []


def test_a_schedule_that_shifts_with_the_size(tmp_path: Path) -> None:
    folder = write_port(tmp_path / "dynamic", dynamic=True)
    seen, batch = run_ours(load(folder, dtype=torch.float32, device="cpu"), seed=4, guidance_scale=0.0, width=96)
    pipe = diffusers_pipeline(folder)
    _, image = run_theirs(pipe, [4], guidance_scale=0.0, width=96)
    assert torch.equal(seen["timestep_preparation"]["sigmas"], pipe.scheduler.sigmas)
    assert (batch.output - image).abs().max() < ROUNDING


def test_a_prompt_that_does_not_fit_is_cut_as_diffusers_does_and_said(native: ZImagePipeline, theirs: Any) -> None:
    _, batch = run_ours(native, prompt=LONG, guidance_scale=0.0, max_sequence_length=20)
    _, image = run_theirs(theirs, [0], prompt=LONG, guidance_scale=0.0, max_sequence_length=20)
    assert (batch.output - image).abs().max() < ROUNDING
    assert len(batch.warnings) == 1 and "reads 20 of the prompt's" in batch.warnings[0]
    assert run_ours(native, guidance_scale=0.0, num_inference_steps=1)[1].warnings == []


def test_a_tokenizer_without_a_chat_template_is_refused(port: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    shutil.copytree(port, folder)
    (folder / "tokenizer" / "chat_template.jinja").unlink()
    with pytest.raises(BadInputError, match="no chat template"):
        run_ours(load(folder, dtype=torch.float32, device="cpu"))


@pytest.mark.parametrize("value", [-1.0, float("nan"), "much"], ids=str)
@pytest.mark.parametrize("name", ["cfg_normalization", "cfg_truncation"])
def test_bad_settings_of_guidance_are_refused_by_name(native: ZImagePipeline, name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=name):
        run_ours(native, **{name: value})


def test_bfloat16_is_rounded_where_diffusers_rounds(port: Path) -> None:
    """State and schedule stay float32; nothing but the modules' own arithmetic is rounded."""
    ours, pipe = load(port, dtype=torch.bfloat16, device="cpu", quality="exact"), diffusers_pipeline(port)
    for module in (pipe.transformer, pipe.vae, pipe.text_encoder):
        for parameter in module.parameters():
            parameter.data = parameter.data.bfloat16()
    seen, _ = run_ours(ours, seed=3, guidance_scale=0.0)
    steps, _ = run_theirs(pipe, [3], guidance_scale=0.0)
    for i, latents in enumerate(steps):
        assert latents.dtype == seen[f"denoising.step.{i}"]["latents"].dtype == torch.float32
        assert torch.equal(seen[f"denoising.step.{i}"]["latents"], latents)


def test_a_negative_prompt_without_guidance_is_refused(native: ZImagePipeline) -> None:
    with pytest.raises(UsageError, match="guidance_scale") as error:
        run_ours(native, negative_prompt="green", guidance_scale=0.0)
    assert "above 0" in str(error.value.expected)


FAULTS: dict[str, tuple[str, Any]] = {
    "vae shift": ("get_decode_scale_and_shift", lambda self: (0.7, 0.0)),
    "sign": ("post_model", lambda self, x, batch: x.float()),
    "time": ("scale_timestep", lambda self, t, batch: t / 1000),
    "usual guidance": ("combine_guidance", lambda self, pos, neg, scale, batch: neg + scale * (pos - neg)),
    "schedule": ("prepare_sigmas", lambda self, batch: [1.0, 0.6, 0.3]),
    "places": ("get_freqs_cis", None),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_seen(
    native: ZImagePipeline, theirs: Any, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison above is sharp enough for the known causes of noise."""
    name, wrong = FAULTS[fault]
    right = ZImagePipelineConfig.get_freqs_cis
    wrong = wrong or (lambda *args: tuple(p._replace(image=right(*args)[0].image) for p in right(*args)))
    monkeypatch.setattr(ZImagePipelineConfig, name, wrong)
    options = {"guidance_scale": 2.0, "negative_prompt": LONG}
    _, batch = run_ours(native, seed=3, **options)
    _, image = run_theirs(theirs, [3], **options)
    assert (batch.output - image).abs().max() > 10 * ROUNDING
