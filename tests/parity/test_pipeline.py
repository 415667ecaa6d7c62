"""The pipeline, native against diffusers: honest runs agree stage by stage, planted faults part at the right stage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conversions.flux1.case import CASES
from conversions.flux1.pipeline import FluxPipelineConfig
from parity.compare import SKIPPED
from parity.pipeline import PipelineResult, compare_pipelines
from parity.stages import Request
from runtime.stages import DenoisingStage, LatentPreparationStage

PROMPT = "a red circle on a white background"


def compare(port: Path, seed: int = 0, steps: int = 2) -> PipelineResult:
    return compare_pipelines(CASES.pipelines["FluxPipeline"], port, Request(PROMPT, seed, steps, 3.5))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_an_honest_pipeline_agrees_at_every_stage(tiny_port: Path, seed: int) -> None:
    result = compare(tiny_port, seed)
    assert result.passed and result.counts["skipped"] == 0 and result.pixels_changed == 0
    names = [v.name for v in result.stages]
    assert names[:2] == ["text_encoder input_ids", "text_encoder -> last_hidden_state"]
    assert names.index("sigmas") < names.index("step 0 denoiser hidden_states") < names.index("step 1 latents")
    assert names[-2:] == ["decoder -> 0", "image"]
    assert names.index("draw 0") < names.index("step 0 denoiser hidden_states")
    assert all(v.passed for v in result.guards) and len(result.guards) == 8
    assert result.metrics is not None and result.metrics.ssim > 0.999999
    assert all(v.max_abs64 < 1e-11 for v in result.stages)


@pytest.mark.slow
def test_seeds_and_steps_reach_both_sides(tiny_port: Path) -> None:
    first, second = compare(tiny_port, seed=0), compare(tiny_port, seed=1, steps=3)
    assert first.images is not None and second.images is not None
    assert not torch.equal(first.images[1], second.images[1])
    assert "step 2 latents" in {v.name for v in second.stages} - {v.name for v in first.stages}


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
def test_threads_and_levels(tiny_port: Path, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        result = compare_pipelines(
            CASES.pipelines["FluxPipeline"], tiny_port, Request(PROMPT, 5, 3, 2.0), level="pipeline"
        )
    finally:
        torch.set_num_threads(before)
    names = [v.name for v in result.stages]
    assert result.passed and not any(n.startswith("step ") for n in names)
    assert names[-5:] == ["steps", "latents", "decoder sample", "decoder -> 0", "image"]


def test_another_number_of_steps_shows_at_the_level_of_the_pipeline(
    tiny_port: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = DenoisingStage.forward

    def hurried(self: Any, batch: Any, config: Any) -> Any:
        batch.timesteps = batch.timesteps[:-1]
        return forward(self, batch, config)

    monkeypatch.setattr(DenoisingStage, "forward", hurried)
    result = compare_pipelines(CASES.pipelines["FluxPipeline"], tiny_port, Request(PROMPT, 0, 3, 3.5), level="pipeline")
    assert result.first_failing is not None and result.first_failing.name == "steps"
    assert result.first_failing.note == "3 steps there, 2 here"


def no_shift(config: Any, batch: Any) -> float:
    return 0.3


def wrong_packing(config: Any, latents: Tensor, batch: Any) -> Tensor:
    patches = latents.unfold(2, 2, 2).unfold(3, 2, 2)
    return patches.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)


def unscaled_time(config: Any, timestep: Tensor, batch: Any) -> Tensor:
    return timestep / 1001


def shift_lost(config: Any) -> tuple[float, float]:
    return float(config.vae_config["scaling_factor"]), 0.0


def clamped_only(config: Any, image: Tensor, batch: Any) -> Tensor:
    return image.clamp(0, 1)


FAULTS: dict[str, tuple[Callable[..., Any], str]] = {
    "prepare_mu": (no_shift, "set_timesteps mu"),
    "maybe_pack_latents": (wrong_packing, "step 0 denoiser hidden_states"),
    "scale_timestep": (unscaled_time, "step 0 denoiser timestep"),
    "get_decode_scale_and_shift": (shift_lost, "decoder sample"),
    "post_decoding": (clamped_only, "image"),
}


@pytest.mark.parametrize("callback", FAULTS)
def test_the_stage_of_a_fault_is_named(tiny_port: Path, monkeypatch: pytest.MonkeyPatch, callback: str) -> None:
    fault, stage = FAULTS[callback]
    monkeypatch.setattr(FluxPipelineConfig, callback, fault)
    result = compare(tiny_port)
    assert not result.passed and result.first_failing is not None and result.first_failing.name == stage


def test_another_noise_is_found(tiny_port: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = LatentPreparationStage.forward

    def other_seed(self: Any, batch: Any, config: Any) -> Any:
        batch.generator = [torch.Generator().manual_seed(99)]
        return forward(self, batch, config)

    monkeypatch.setattr(LatentPreparationStage, "forward", other_seed)
    result = compare(tiny_port)
    assert result.first_failing is not None and result.first_failing.name == "draw 0"
    assert result.first_failing.note.startswith("seed 0 there, 99 here (stages.latent_preparation:")


def test_guidance_that_never_arrives(tiny_port: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conditions = FluxPipelineConfig._conditions

    def constant(self: Any, batch: Any, *rest: Any) -> dict[str, Any]:
        given = conditions(self, batch, *rest)
        return given | {"guidance": torch.ones_like(given["guidance"])}

    monkeypatch.setattr(FluxPipelineConfig, "_conditions", constant)
    result = compare(tiny_port)
    assert result.first_failing is not None and result.first_failing.name == "step 0 denoiser guidance"


def test_a_step_left_out_is_not_a_pass(tiny_port: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = DenoisingStage.forward

    def hurried(self: Any, batch: Any, config: Any) -> Any:
        batch.timesteps = batch.timesteps[:-1]
        return forward(self, batch, config)

    monkeypatch.setattr(DenoisingStage, "forward", hurried)
    result = compare(tiny_port)
    assert not result.passed and result.counts["missing"] > 0
    assert {v.name for v in result.stages if v.status == SKIPPED} >= {"step 1 latents"}


def test_a_side_that_fails_is_not_a_pass(tiny_port: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Any, batch: Any, config: Any) -> Any:
        raise RuntimeError("no noise today")

    monkeypatch.setattr(LatentPreparationStage, "forward", broken)
    result = compare(tiny_port)
    assert not result.passed and "no noise today" in result.reason


def test_a_step_that_only_one_side_has_is_missing(tiny_port: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = DenoisingStage.forward

    def one_more(self: Any, batch: Any, config: Any) -> Any:
        first = batch.timesteps[0]
        batch = forward(self, batch, config)
        self.scheduler._step_index = 0
        self.scheduler.step(torch.zeros_like(batch.latents), first, batch.latents)
        return batch

    monkeypatch.setattr(DenoisingStage, "forward", one_more)
    result = compare(tiny_port)
    assert not result.passed and result.counts["missing"] == 1
    assert {v.name for v in result.stages if v.status == SKIPPED} == {"step 2 latents"}
