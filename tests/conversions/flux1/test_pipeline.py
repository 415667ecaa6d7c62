"""The native FLUX.1 pipeline against diffusers.FluxPipeline on the same folder, step by step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conversions.flux1.pipeline import FluxPipeline, FluxPipelineConfig
from runtime.loader import quiet_libraries
from runtime.registry import load
from runtime.request import Req
from tests.runtime.ports import write_port

PROMPT = "a large red circle on the left, on a blue background"
ROUNDING = 5e-6  # absolute; one batch and two single images already differ by 3e-6


@pytest.fixture(scope="module")
def bare_port(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_port(tmp_path_factory.mktemp("ports") / "tiny")


@pytest.fixture(scope="module")
def native(bare_port: Path) -> FluxPipeline:
    pipeline = load(bare_port, dtype=torch.float32, device="cpu")
    assert isinstance(pipeline, FluxPipeline)
    return pipeline


@pytest.fixture(scope="module")
def theirs(bare_port: Path) -> Any:
    return diffusers_pipeline(bare_port)


def diffusers_pipeline(port: Path) -> Any:
    from diffusers import FluxPipeline as Reference

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

    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    defaults = {"height": 64, "width": 64, "max_sequence_length": 32, "num_images_per_prompt": len(seeds)}
    image = pipe(**defaults | options, generator=generators, output_type="pt", callback_on_step_end=after).images
    return steps, image


def run_ours(pipeline: FluxPipeline, **fields: Any) -> tuple[dict[str, dict[str, Tensor]], Req]:
    """(tensors by tap, finished request)."""
    seen: dict[str, dict[str, Tensor]] = {}
    tap = lambda name, tensors: seen.update({name: {k: t.clone() for k, t in tensors.items()}})  # noqa: E731
    return seen, pipeline.generate(**fields, taps=[tap])


CASES = [
    {"num_inference_steps": 4, "guidance_scale": 3.5},
    {"num_inference_steps": 3, "guidance_scale": 0.0},
    {"num_inference_steps": 2, "guidance_scale": 2.0, "height": 48, "width": 80},
    {"num_inference_steps": 2, "guidance_scale": 2.0, "negative_prompt": "green", "true_cfg_scale": 3.0},
]


@pytest.mark.parametrize("options", CASES, ids=["plain", "guidance 0", "other size", "true cfg"])
def test_every_step_and_the_image_equal_diffusers(native: FluxPipeline, theirs: Any, options: dict[str, Any]) -> None:
    seen, batch = run_ours(native, prompt=PROMPT, seed=3, **options)
    steps, image = run_theirs(theirs, [3], prompt=PROMPT, **options)
    assert len(steps) == options["num_inference_steps"]
    for i, latents in enumerate(steps):
        assert (seen[f"denoising.step.{i}"]["latents"] - latents).abs().max() < ROUNDING, f"step {i}"
    assert batch.output is not None
    assert (batch.output - image).abs().max() < ROUNDING
    assert torch.equal(seen["timestep_preparation"]["sigmas"], theirs.scheduler.sigmas)
    assert float(image.std()) > 1e-2  # the comparison is not of two flat pictures


def test_text_embeddings_and_noise_equal_diffusers(native: FluxPipeline, theirs: Any) -> None:
    seen, _ = run_ours(native, prompt=PROMPT, seed=11, num_inference_steps=1)
    with torch.no_grad():
        tokens, pooled, _ = theirs.encode_prompt(PROMPT, max_sequence_length=32)
    noise, _ = theirs.prepare_latents(1, 4, 64, 64, torch.float32, "cpu", [torch.Generator().manual_seed(11)])
    assert torch.equal(seen["text_encoding"]["prompt_embeds.1"], tokens)
    assert torch.equal(seen["text_encoding"]["pooled_embeds.0"], pooled)
    assert torch.equal(seen["latent_preparation"]["latents"], noise)


def test_several_images_use_following_seeds(native: FluxPipeline, theirs: Any) -> None:
    _, batch = run_ours(native, prompt=PROMPT, seed=5, num_images=2, num_inference_steps=2)
    _, image = run_theirs(theirs, [5, 6], prompt=PROMPT, num_inference_steps=2)
    _, second = run_ours(native, prompt=PROMPT, seed=6, num_inference_steps=2)
    assert batch.output is not None and second.output is not None
    assert (batch.output - image).abs().max() < ROUNDING
    assert (batch.output[1:] - second.output).abs().max() < ROUNDING
    assert (batch.output[0] - batch.output[1]).abs().max() > 1e-2


def test_guidance_seed_and_prompt_all_matter(native: FluxPipeline) -> None:
    plain: dict[str, Any] = {"prompt": PROMPT, "seed": 1, "guidance_scale": 3.5, "num_inference_steps": 2}
    first = native.generate(**plain).output
    assert first is not None
    again = native.generate(**plain).output
    assert torch.equal(first, again)  # type: ignore[arg-type]
    for change in ({"guidance_scale": 0.0}, {"seed": 2}, {"prompt": "two green squares"}):
        other = native.generate(**plain | change).output
        assert (first - other).abs().max() > 1e-3, change


def test_packing_puts_channels_outermost_and_is_undone() -> None:
    latents = torch.arange(2 * 3 * 4 * 6.0).reshape(2, 3, 4, 6)
    config, batch = FluxPipelineConfig(), Req(raw_latent_shape=(2, 3, 4, 6))
    packed = config.maybe_pack_latents(latents, batch)
    assert packed.shape == (2, 6, 12)
    # token 1 is the second patch of the first row: rows 0-1, columns 2-3, channel after channel
    assert packed[0, 1].tolist() == [latents[0, c, y, x] for c in range(3) for y in (0, 1) for x in (2, 3)]
    assert torch.equal(config.post_denoising_loop(packed, batch), latents)


def test_a_model_without_guidance_embedding_ignores_guidance_loudly(tmp_path: Path) -> None:
    port = write_port(tmp_path / "schnell", guidance=False)
    native = load(port, dtype=torch.float32, device="cpu")
    assert native.sampling_params.num_inference_steps == 4
    _, batch = run_ours(native, prompt=PROMPT, seed=3, guidance_scale=3.0, num_inference_steps=2)  # type: ignore[arg-type]
    _, image = run_theirs(diffusers_pipeline(port), [3], prompt=PROMPT, num_inference_steps=2)
    assert batch.output is not None
    assert (batch.output - image).abs().max() < ROUNDING
    assert any("guidance_scale 3 is ignored" in line for line in batch.warnings)


def test_a_prompt_that_does_not_fit_is_reported(native: FluxPipeline) -> None:
    _, batch = run_ours(native, prompt="a red circle and " * 30, num_inference_steps=1)
    assert sorted(line.split()[0] for line in batch.warnings) == ["text_encoder", "text_encoder_2"]
    _, short = run_ours(native, prompt="a red circle", num_inference_steps=1)
    assert short.warnings == []


@pytest.mark.parametrize(
    "fault",
    ["vae shift", "schedule shift", "packing", "guidance", "timestep scale"],
)
def test_planted_faults_are_seen(
    native: FluxPipeline, theirs: Any, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison above is sharp enough for the known causes of noise."""
    config = FluxPipelineConfig
    if fault == "vae shift":
        monkeypatch.setattr(config, "get_decode_scale_and_shift", lambda self: (0.7, 0.0))
    elif fault == "schedule shift":
        monkeypatch.setattr(config, "prepare_mu", lambda self, batch: 0.5)
    elif fault == "packing":
        wrong = lambda self, x, batch: torch.nn.functional.pixel_unshuffle(x, 2).flatten(2).mT.roll(1, 2)  # noqa: E731
        monkeypatch.setattr(config, "maybe_pack_latents", wrong)
    elif fault == "guidance":
        right = config._conditions
        monkeypatch.setattr(config, "_conditions", lambda *args: right(*args) | {"guidance": torch.ones(1)})
    else:
        monkeypatch.setattr(config, "scale_timestep", lambda self, t, batch: t / 999)
    _, batch = run_ours(native, prompt=PROMPT, seed=3, num_inference_steps=2)
    _, image = run_theirs(theirs, [3], prompt=PROMPT, num_inference_steps=2)
    assert batch.output is not None
    assert (batch.output - image).abs().max() > 10 * ROUNDING


def test_the_embedded_models_port_equals_diffusers(tiny_port: Path) -> None:
    """The same comparison on what `porter convert` writes from the original layout."""
    native = load(tiny_port, dtype=torch.float32, device="cpu")
    assert (native.sampling_params.num_inference_steps, native.config.default_size(Req())) == (28, (64, 64))
    _, batch = run_ours(native, prompt=PROMPT, seed=1, num_inference_steps=3)  # type: ignore[arg-type]
    _, image = run_theirs(diffusers_pipeline(tiny_port), [1], prompt=PROMPT, num_inference_steps=3)
    assert batch.output is not None
    assert (batch.output - image).abs().max() < ROUNDING
