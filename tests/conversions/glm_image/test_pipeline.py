"""The native GLM-Image pipeline against diffusers.GlmImagePipeline on the same folder, step by step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from conversions.glm_image.pipeline import GlmImagePipeline, GlmImagePipelineConfig
from porter.core.errors import BadInputError, CheckFailed, PorterError, UsageError
from runtime.loader import quiet_libraries
from runtime.registry import load
from runtime.request import Req
from tests.conversions.glm_image.ports import CODES, write_port

SIGN = "a red sign that says \"OPEN\" and 'to 6'"
PLAIN = "a red circle on the left"
ROUNDING = 5e-6  # absolute
SIZE: dict[str, Any] = {"height": 32, "width": 64}


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    with quiet_libraries():
        yield


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_port(tmp_path_factory.mktemp("glm") / "tiny")


@pytest.fixture(scope="module")
def native(port: Path) -> GlmImagePipeline:
    pipeline = load(port, dtype=torch.float32, device="cpu")
    assert isinstance(pipeline, GlmImagePipeline) and pipeline.warnings == []
    return pipeline


@pytest.fixture(scope="module")
def theirs(port: Path) -> Any:
    return diffusers_pipeline(port)


def diffusers_pipeline(port: Path, dtype: torch.dtype = torch.float32) -> Any:
    from diffusers import GlmImagePipeline as Reference

    pipe = Reference.from_pretrained(port, low_cpu_mem_usage=False, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run_theirs(pipe: Any, seed: int, **options: Any) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """(latents after each step, image (B, 3, H, W) in [0, 1], prior tokens of each denoiser call)."""
    steps: list[Tensor] = []
    prior: list[Tensor] = []

    def after(pipe: Any, step: int, t: Any, kept: dict[str, Tensor]) -> dict[str, Tensor]:
        steps.append(kept["latents"].clone())
        return kept

    handle = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: prior.append(kwargs["prior_token_id"].clone()), with_kwargs=True
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(), handle:
        image = pipe(**SIZE | options, generator=generator, output_type="pt", callback_on_step_end=after).images
    return steps, image, prior


def run_ours(pipeline: GlmImagePipeline, **fields: Any) -> tuple[dict[str, dict[str, Tensor]], Req]:
    """(tensors by tap, finished request)."""
    seen: dict[str, dict[str, Tensor]] = {}
    tap = lambda name, tensors: seen.update({name: {k: t.clone() for k, t in tensors.items()}})  # noqa: E731
    return seen, pipeline.generate(**SIZE | fields, taps=[tap])


CASES: dict[str, dict[str, Any]] = {
    "two texts": {"prompt": SIGN, "num_inference_steps": 4},
    "no text, no guidance": {"prompt": PLAIN, "num_inference_steps": 2, "guidance_scale": 1.0},
    "other size": {"prompt": "「a」 and “b”", "num_inference_steps": 3, "height": 96, "width": 32},
    "empty, own sigmas": {"prompt": "", "num_inference_steps": 3, "sigmas": [0.9, 0.5, 0.2], "guidance_scale": 4.0},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_tokens_every_step_and_the_image_equal_diffusers(
    native: GlmImagePipeline, theirs: Any, options: dict[str, Any]
) -> None:
    seen, batch = run_ours(native, seed=3, **options)
    steps, image, prior = run_theirs(theirs, 3, **options)
    before = seen["before_denoising"]
    assert torch.equal(before["prompt_embeds.1"][..., 0], prior[0])
    assert torch.equal(before["sigmas"], theirs.scheduler.sigmas)
    assert torch.equal(before["timesteps"], theirs.scheduler.timesteps)
    assert len(steps) == options["num_inference_steps"]
    for i, latents in enumerate(steps):
        assert (seen[f"denoising.step.{i}"]["latents"] - latents).abs().max() < ROUNDING, f"step {i}"
    assert batch.output is not None and batch.warnings == []
    assert (batch.output - image).abs().max() < ROUNDING
    assert float(image.std()) > 1e-2  # the comparison is not of two flat pictures
    assert len(prior[0].unique()) > 1


def test_text_and_noise_equal_diffusers(native: GlmImagePipeline, theirs: Any) -> None:
    seen, _ = run_ours(native, prompt=SIGN, seed=11, num_inference_steps=1)
    with torch.no_grad():
        glyphs, nothing = theirs.encode_prompt(SIGN)
    noise = theirs.prepare_latents(1, 4, 32, 64, torch.float32, "cpu", torch.Generator().manual_seed(11))
    before = seen["before_denoising"]
    assert torch.equal(before["prompt_embeds.0"], glyphs) and glyphs.shape[1] > nothing.shape[1]
    assert torch.equal(before["negative_prompt_embeds.0"], nothing)
    assert torch.equal(before["latents"], noise)


def test_a_batch_equals_each_prompt_alone_with_the_following_seeds(native: GlmImagePipeline, theirs: Any) -> None:
    """diffusers draws a batch's tokens from one seed, and shows the model the padding of shorter texts; we do not."""
    _, batch = run_ours(native, prompt=[SIGN, PLAIN], seed=5, num_inference_steps=2, num_images=2)
    assert batch.output is not None and batch.prompt_masks[0] is not None
    for i, prompt in ((0, SIGN), (3, PLAIN)):
        _, image, prior = run_theirs(theirs, 5 + i, prompt=prompt, num_inference_steps=2)
        assert torch.equal(batch.prompt_embeds[1][i, :, 0], prior[0][0])
        assert (batch.output[i] - image[0]).abs().max() < ROUNDING, i
    for i in range(3):
        assert (batch.output[i] - batch.output[i + 1]).abs().max() > 1e-2


@pytest.fixture(scope="module")
def first(native: GlmImagePipeline) -> Req:
    return run_ours(native, prompt=SIGN, seed=3, num_inference_steps=2)[1]


def test_a_request_repeats_and_leaves_the_global_generator_alone(native: GlmImagePipeline, first: Req) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    _, again = run_ours(native, prompt=SIGN, seed=3, num_inference_steps=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.prompt_embeds[1], again.prompt_embeds[1])
    assert torch.equal(first.output, again.output)  # type: ignore[arg-type]
    _, other = run_ours(native, prompt=SIGN, seed=4, num_inference_steps=2)
    assert not torch.equal(first.prompt_embeds[1], other.prompt_embeds[1])


def given(first: Req) -> dict[str, Any]:
    """What the first request encoded, for another that skips it."""
    return {"prompt_embeds": first.prompt_embeds, "negative_prompt_embeds": first.negative_prompt_embeds}


def test_embeddings_that_are_given_are_taken(native: GlmImagePipeline, first: Req) -> None:
    plain: dict[str, Any] = {"prompt": None, "seed": 3, "num_inference_steps": 2, **given(first)}
    _, again = run_ours(native, **plain)
    assert torch.equal(first.output, again.output)  # type: ignore[arg-type]
    glyphs, prior = first.prompt_embeds
    changes = {"prompt_embeds": [glyphs.flip(1), prior]}, {"prompt_embeds": [glyphs, prior.flip(1)]}, {"seed": 4}
    for change in (*changes, {"guidance_scale": 4.0}):
        _, other = run_ours(native, **plain | change)
        assert other.output is not None
        moved = (first.output - other.output).abs().max()  # type: ignore[operator]
        assert moved < ROUNDING if change is changes[0] else moved > 1e-3, change  # glyphs have no order
    for bad in ([glyphs, prior + CODES], [glyphs, prior[:, 1:]], [glyphs]):
        with pytest.raises(UsageError, match="prompt_embeds"):
            run_ours(native, **plain | {"prompt_embeds": bad})


def test_bfloat16_keeps_the_loop_in_float32_as_diffusers_does(port: Path) -> None:
    native = load(port, dtype=torch.bfloat16, device="cpu")
    assert isinstance(native, GlmImagePipeline)
    seen, batch = run_ours(native, prompt=SIGN, seed=3, num_inference_steps=2)
    steps, image, prior = run_theirs(diffusers_pipeline(port, torch.bfloat16), 3, prompt=SIGN, num_inference_steps=2)
    assert torch.equal(batch.prompt_embeds[1][..., 0], prior[0])
    for i, latents in enumerate(steps):
        assert latents.dtype == torch.float32
        assert torch.equal(seen[f"denoising.step.{i}"]["latents"], latents)
    assert batch.output is not None and (batch.output - image).abs().max() < 0.05  # denormalised in float32


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "negative prompt": ({"negative_prompt": "green"}, "negative_prompt"),
    "picture": ({"image": [Image.new("RGB", (32, 32))]}, "image"),
    "size": ({"height": 48}, "height"),
    "placeholder": ({"prompt": "a <|image|> of a cat"}, "prompt"),
    "setting": ({"extra": {"shift": 3}}, "shift"),
}


@pytest.mark.parametrize(("fields", "named"), REFUSED.values(), ids=REFUSED)
def test_what_it_cannot_do_is_refused_by_name(native: GlmImagePipeline, fields: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=f"^{named}: not what"):
        run_ours(native, **{"prompt": PLAIN, "num_inference_steps": 1} | fields)


def test_what_is_cut_or_too_long_is_said(native: GlmImagePipeline) -> None:
    _, batch = run_ours(native, prompt=f"'{'long ' * 9}'", num_inference_steps=1, max_sequence_length=16)
    assert [line.split(":")[0] for line in batch.warnings] == ["text_encoder reads 16 of the 46 tokens that are quoted"]
    _, batch = run_ours(native, prompt="a cat " * 60, num_inference_steps=1)
    assert [line.split()[0] for line in batch.warnings] == ["vision_language_encoder"]


@pytest.mark.parametrize("fault", ["ends early", "no code"])
def test_an_autoregressive_model_that_writes_no_picture_is_reported(
    native: GlmImagePipeline, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = native.modules["vision_language_encoder"]
    if fault == "ends early":
        monkeypatch.setattr(encoder.generation_config, "eos_token_id", list(range(CODES)))
    else:  # the language model's last row is no code of this transformer
        monkeypatch.setattr(encoder.lm_head, "forward", lambda x: torch.eye(CODES)[-1].expand(*x.shape[:-1], -1) * 99)
        params = native.modules["transformer"].params
        monkeypatch.setitem(params.__dict__, "prior_vq_quantizer_codebook_size", CODES - 1)
    with pytest.raises(CheckFailed, match="wrote no picture") as error:
        run_ours(native, prompt=PLAIN, num_inference_steps=1)
    assert "--seed" in str(error.value.hint) and "2 tokens below" in str(error.value.expected)


def test_configs_that_do_not_fit_are_refused_by_name(native: GlmImagePipeline, tmp_path: Path) -> None:
    coarse = write_port(tmp_path / "coarse", patch_size=1)
    with pytest.raises(BadInputError, match="do not fit the prior tokens"):
        load(coarse, dtype=torch.float32, device="cpu").generate(PLAIN, **SIZE)
    facts = native.config.vae_config
    for name, value in (("latents_mean", None), ("latents_std", [1.0, 2.0]), ("latents_std", [1.0, 0, 1, 1])):
        with pytest.raises(BadInputError, match=name):
            GlmImagePipelineConfig(vae_config={**facts, name: value}).get_decode_scale_and_shift()


def test_another_scheduler_is_refused(native: GlmImagePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import DDIMScheduler

    monkeypatch.setattr(native.stages["before_denoising"], "scheduler", DDIMScheduler())
    with pytest.raises(PorterError, match="timesteps and sigmas"):
        run_ours(native, prompt=PLAIN, num_inference_steps=1)


FAULTS = ["vae shift", "schedule shift", "timestep", "dropped", "size"]


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_seen(
    native: GlmImagePipeline, first: Req, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison above is sharp enough for the known causes of noise."""
    config, conditions = GlmImagePipelineConfig, GlmImagePipelineConfig._conditions
    if fault == "vae shift":
        monkeypatch.setattr(config, "get_decode_scale_and_shift", lambda self: (1.0, 0.0))
    elif fault == "schedule shift":
        monkeypatch.setattr(config, "prepare_mu", lambda self, batch: 0.5)
    elif fault == "timestep":
        monkeypatch.setattr(config, "scale_timestep", lambda self, t, batch: t)
    elif fault == "dropped":
        monkeypatch.setattr(config, "_conditions", lambda *args, drop: conditions(*args, drop=False))
    else:
        other = {"target_size": torch.tensor([[64.0, 32.0]])}
        monkeypatch.setattr(config, "_conditions", lambda *args, drop: conditions(*args, drop=drop) | other)
    _, batch = run_ours(native, prompt=None, seed=3, num_inference_steps=2, **given(first))
    assert batch.output is not None and first.output is not None
    assert (batch.output - first.output).abs().max() > 10 * ROUNDING
