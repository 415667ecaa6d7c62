"""Faults planted into the native pipeline, each found at its stage and by its name; what is no fault passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conversions.flux1.pipeline import FluxPipelineConfig
from parity.case import PipelineSide
from parity.compare import DIFFERS, SKIPPED
from runtime.stages import DecodingStage, LatentPreparationStage, TextEncodingStage, TimestepPreparationStage
from tests.parity.planted import CASE, PROMPT, compare, edited, noise, reference_runs_once

__all__ = ["reference_runs_once"]
pytestmark = pytest.mark.usefixtures("reference_runs_once")

# --- faults in the code of a stage: what is patched, and what must be said about which stage -------------------------


def shifted_twice(self: Any, batch: Any, config: Any) -> Any:
    batch = prepare(self, batch, config)
    sigmas = self.scheduler.time_shift(0.4, 1.0, self.scheduler.sigmas[:-1])
    self.scheduler.sigmas = torch.cat([sigmas, torch.zeros(1)])
    return batch


def shift_grows(self: Any, batch: Any, config: Any) -> Any:
    """mu is kept on the scheduler and added to by every request."""
    self.scheduler.kept = getattr(self.scheduler, "kept", 0.0)
    batch.sigmas = config.prepare_sigmas(batch)
    mu = config.prepare_mu(batch) + self.scheduler.kept
    self.scheduler.set_timesteps(sigmas=batch.sigmas, mu=mu, device=self.device)
    self.scheduler.set_begin_index(0)
    self.scheduler.kept += 0.1
    batch.timesteps = self.scheduler.timesteps
    return batch


def never_reset(self: Any, batch: Any, config: Any) -> Any:
    """The schedule of the first request is kept for all others, and so is the place in it."""
    if not hasattr(self.scheduler, "known"):
        prepare(self, batch, config)
        self.scheduler.known = True
    batch.timesteps = self.scheduler.timesteps
    return batch


def one_step_more(self: Any, batch: Any, config: Any) -> Any:
    batch.num_inference_steps += 1
    return prepare(self, batch, config)


def deaf(self: Any, batch: Any, config: Any) -> Any:
    batch.prompt = PROMPT
    return encode(self, batch, config)


def truncated(self: Any, batch: Any, config: Any) -> Any:
    batch = decode(self, batch, config)
    batch.output = (batch.output * 255).floor() / 255
    return batch


def drawn_for_nothing(self: Any, batch: Any, config: Any) -> Any:
    batch = decode(self, batch, config)
    torch.randn(1, 8, 2, 2, generator=batch.generator[0])
    return batch


prepare, encode, decode = TimestepPreparationStage.forward, TextEncodingStage.forward, DecodingStage.forward
GLOBAL = noise(lambda shape, g: torch.randn(shape))
COARSE = noise(lambda shape, g: torch.randn(shape, generator=g, dtype=torch.bfloat16).float())
ROUNDED = noise(lambda shape, g: torch.randn(shape, generator=g).bfloat16().float())
FAULTS: dict[str, tuple[Any, Callable[..., Any], str, str]] = {
    "global generator": (LatentPreparationStage, GLOBAL, "draw 0", "from torch's global generator here"),
    "noise in bfloat16": (LatentPreparationStage, COARSE, "draw 0", "drawn in float32 there, bfloat16 here"),
    "noise rounded": (LatentPreparationStage, ROUNDED, "step 0 denoiser hidden_states", "lie on bfloat16's grid"),
    "one draw more": (DecodingStage, drawn_for_nothing, "draw 1", "never drawn (here torch.randn from a given"),
    "shifted twice": (TimestepPreparationStage, shifted_twice, "sigmas", ""),
    "one step more": (TimestepPreparationStage, one_step_more, "set_timesteps sigmas", "shape (3,), reference (2,)"),
    "shift kept": (TimestepPreparationStage, shift_grows, "a second request", "kept from the first"),
    "prompt ignored": (TextEncodingStage, deaf, "another prompt, another picture", "in the picture of the candidate"),
    "truncated": (DecodingStage, truncated, "image", ""),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_at_its_stage(tiny_port: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    stage, forward, where, why = FAULTS[fault]
    monkeypatch.setattr(stage, "forward", forward)
    result = compare(tiny_port)
    assert not result.passed and result.first_failing is not None and not result.reason
    assert result.first_failing.name == where and why in result.first_failing.note


def test_a_schedule_that_is_never_reset_fails_at_the_second_request(
    tiny_port: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TimestepPreparationStage, "forward", never_reset)
    result = compare(tiny_port)
    assert result.status == SKIPPED and result.first_failing is not None
    assert result.first_failing.name == "a second request"
    assert result.first_failing.note.startswith("the candidate's ended in IndexError")


def test_guidance_off_by_one_step(tiny_port: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conditions, scale = FluxPipelineConfig._conditions, FluxPipelineConfig.scale_timestep
    given: list[Tensor] = []

    def remembered(self: Any, *args: Any) -> dict[str, Any]:
        found = conditions(self, *args)
        given[:] = [found["guidance"]]
        return found

    def late(self: Any, timestep: Tensor, batch: Any) -> Tensor:
        if timestep.item() < 500:
            given[0].fill_(1.0)  # from this step on, as if it were already the next phase
        return scale(self, timestep, batch)

    monkeypatch.setattr(FluxPipelineConfig, "_conditions", remembered)
    monkeypatch.setattr(FluxPipelineConfig, "scale_timestep", late)
    result = compare(tiny_port, steps=4)
    assert result.first_failing is not None and result.growth is not None
    step = result.growth.jump
    assert step and result.first_failing.name == f"step {step} denoiser guidance"
    assert f"jumps at step {step}" in result.growth.text and result.growth.errors[step - 1] < 1e-12


# --- faults in what is loaded ----------------------------------------------------------------------------------------


def wide_eps(side: PipelineSide) -> None:
    norm = side.stages["decoder"].get_submodule("conv_norm_out")
    norm.eps = norm.eps * 10  # type: ignore[operator, assignment]


def truncating(side: PipelineSide) -> PipelineSide:
    return replace(side, save=lambda image: (image * 255).to(torch.uint8))


def other_shift(side: PipelineSide) -> None:
    side.scheduler._shift = 2.0  # without effect under dynamic shifting, and wrong for whoever comes next


LOADED: dict[str, tuple[Callable[[PipelineSide], PipelineSide | None], str, str]] = {
    "decoder eps": (wide_eps, "decoder -> 0", "float64 keeps"),
    "saved by truncation": (truncating, "the saved picture", "one rounds where the other truncates"),
    "a setting of the scheduler": (other_shift, "the scheduler's state", "_shift: 1.0 there, 2.0 here"),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", LOADED)
def test_a_fault_in_a_loaded_part(tiny_port: Path, fault: str) -> None:
    edit, where, why = LOADED[fault]
    result = compare(tiny_port, edited(edit))
    assert result.status == DIFFERS and result.first_failing is not None
    assert result.first_failing.name == where and why in result.first_failing.note


def test_vae_scale_applied_twice(tiny_port: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = FluxPipelineConfig.get_decode_scale_and_shift
    monkeypatch.setattr(
        FluxPipelineConfig, "get_decode_scale_and_shift", lambda self: (known(self)[0] ** 2, known(self)[1])
    )
    result = compare(tiny_port)
    assert result.first_failing is not None and result.first_failing.name == "decoder sample"
    assert result.metrics is not None and result.metrics.psnr < 40 and result.metrics.changed > 0
    pictures = result.difference()
    assert pictures is not None and pictures[1] == pytest.approx(result.metrics.max_abs) and pictures[0].max() == 1


# --- agreement on nothing --------------------------------------------------------------------------------------------


def idle_denoiser(side: PipelineSide) -> None:
    for tensor in side.stages["denoiser"].parameters():
        tensor.data.zero_()


def dark_decoder(side: PipelineSide) -> None:
    last = side.stages["decoder"].get_submodule("conv_out")
    assert isinstance(last, nn.Conv2d) and last.bias is not None
    last.weight.data.zero_()
    last.bias.data.fill_(-2.0)


@pytest.mark.parametrize(("edit", "why"), [(idle_denoiser, "noise (neighbours"), (dark_decoder, "black")])
def test_sides_that_agree_on_nothing_do_not_pass(
    tiny_port: Path, edit: Callable[[PipelineSide], None], why: str
) -> None:
    result = compare(tiny_port, edited(edit, both=True))
    assert result.status == SKIPPED and not result.passed and result.counts["skipped"] > 0
    assert result.first_failing is not None and why in result.first_failing.note
    assert "nothing was compared" in result.first_failing.note


def test_a_prompt_without_effect_on_the_reference_is_not_compared(tiny_port: Path) -> None:
    result = compare(tiny_port, replace(CASE, other_prompt=PROMPT))
    assert result.status == SKIPPED and result.first_failing is not None
    assert "changes nothing in the picture of the reference and the candidate" in result.first_failing.note


def test_an_input_that_the_reference_does_not_get(tiny_port: Path) -> None:
    result = compare(tiny_port, replace(CASE, own=()))
    assert result.status == SKIPPED and result.counts["missing"] == 2
    assert {v.name for v in result.stages if not v.passed} == {f"step 0 denoiser rotary.{i}" for i in (0, 1)}
