"""Faults planted into the native pipeline, each found at its stage and by its name; what is no fault passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conversions.flux1 import case as flux
from conversions.flux1.pipeline import FluxPipelineConfig
from parity import pipeline
from parity.case import PipelineCase, PipelineSide
from parity.compare import DIFFERS, PRECISION, SKIPPED
from parity.pipeline import PipelineResult, compare_pipelines
from parity.stages import Request
from runtime.stages import DecodingStage, LatentPreparationStage, TextEncodingStage, TimestepPreparationStage

PROMPT = "a red circle on a white background"
assert flux.CASES.pipeline is not None
CASE = flux.CASES.pipeline


_run = pipeline._run
_run_once = cache(_run)


@pytest.fixture(autouse=True)
def reference_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference that nothing was planted into answers the same request the same way: its runs are kept."""
    monkeypatch.setattr(
        pipeline, "_run", lambda load, *rest: (_run_once if load is CASE.reference else _run)(load, *rest)
    )


def compare(port: Path, case: PipelineCase = CASE, steps: int = 2, seed: int = 0, **options: Any) -> PipelineResult:
    return compare_pipelines(case, port, Request(PROMPT, seed, steps, 3.5), **options)


def edited(edit: Callable[[PipelineSide], PipelineSide | None], *, both: bool = False) -> PipelineCase:
    """The case with an edit to its loaded candidate, or to both sides."""

    def after(load: Callable[[Path, torch.dtype], PipelineSide]) -> Callable[[Path, torch.dtype], PipelineSide]:
        def edited_side(port: Path, dtype: torch.dtype) -> PipelineSide:
            side = load(port, dtype)
            return edit(side) or side

        return edited_side

    return replace(
        CASE,
        candidate=after(CASE.candidate),
        reference=after(CASE.reference) if both else CASE.reference,
    )


# --- faults in the code of a stage: what is patched, and what must be said about which stage -------------------------


def noise(draw: Callable[[tuple[int, ...], torch.Generator], Tensor]) -> Callable[..., Any]:
    original = LatentPreparationStage.forward

    def forward(self: Any, batch: Any, config: Any) -> Any:
        raw = config.prepare_latent_shape(batch)
        batch.latents = config.maybe_pack_latents(draw(raw, batch.generator[0]), batch)
        return original(self, batch, config)

    return forward


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
    assert result.status == SKIPPED and "its second request ended in IndexError" in result.reason


def test_guidance_off_by_one_step(tiny_port: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conditions, scale = FluxPipelineConfig._conditions, FluxPipelineConfig.scale_timestep
    given: list[Tensor] = []

    def remembered(self: Any, *args: Any) -> dict[str, Any]:
        found = conditions(self, *args)
        given[:] = [found["guidance"]]
        return found

    def late(self: Any, timestep: Tensor) -> Tensor:
        if timestep.item() < 500:
            given[0].fill_(1.0)  # from this step on, as if it were already the next phase
        return scale(self, timestep)

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


# --- precision -------------------------------------------------------------------------------------------------------


def faster(self: Any, timestep: Tensor) -> Tensor:
    return timestep / 900


def test_low_precision_is_judged_by_the_truth(tiny_port: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FluxPipelineConfig, "scale_timestep", faster)
    result = compare(tiny_port, dtype="bfloat16")
    assert result.status == PRECISION and result.first_failing is not None
    assert result.first_failing.name == "step 0 denoiser timestep"
    assert "error to the truth" in result.first_failing.note and "the reference's own" in result.first_failing.note
    assert result.to_truth is not None and result.to_truth[0].psnr > result.to_truth[1].psnr


def test_noise_in_another_dtype_than_the_runs_own(tiny_port: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the count is a multiple of 16, torch draws the same numbers in both dtypes, rounded; nowhere else."""
    monkeypatch.setattr(LatentPreparationStage, "forward", noise(lambda s, g: torch.randn(s, generator=g)))
    result = compare(tiny_port, dtype="bfloat16")
    draw = next(v for v in result.stages if v.name == "draw 0")
    assert result.passed and draw.status == "rounding" and "drawn in bfloat16 there, float32 here" in draw.note
    skewed = noise(lambda s, g: torch.randn(2049, generator=g)[1:].reshape(s))
    monkeypatch.setattr(LatentPreparationStage, "forward", skewed)
    result = compare(tiny_port, dtype="bfloat16")
    assert result.first_failing is not None and result.first_failing.name == "draw 0"


def split_sums(side: PipelineSide) -> None:
    """The same layers, summed in two halves: other rounding, no fault."""
    for module in side.stages["denoiser"].modules():
        if isinstance(module, nn.Linear):
            module.forward = lambda x, m=module: halves(m, x)  # type: ignore[method-assign, misc]


def halves(linear: nn.Linear, x: Tensor) -> Tensor:
    at = linear.in_features // 2
    out = x[..., :at] @ linear.weight[:, :at].T + x[..., at:] @ linear.weight[:, at:].T
    return out if linear.bias is None else out + linear.bias


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_rounding_passes(tiny_port: Path, dtype: str) -> None:
    result = compare(tiny_port, edited(split_sums), dtype=dtype, seed=1)
    assert result.passed and result.status == "rounding" and result.counts["skipped"] == result.counts["missing"] == 0
    assert result.growth is not None and result.growth.jump is None and max(result.growth.errors) > 0
    assert (result.to_truth is not None) == (dtype == "bfloat16")


def only_float32(side: PipelineSide) -> PipelineSide:
    """A pipeline whose own code holds to float32."""

    def run(*request: Any) -> Tensor:
        image = side.run(*request)
        if image.dtype == torch.float64:
            raise RuntimeError("expected scalar type Float but found Double")
        return image

    return replace(side, run=run)


def test_where_float64_cannot_run_the_baseline_decides(tiny_port: Path) -> None:
    case = edited(only_float32)
    result = compare(tiny_port, case)
    assert result.status == SKIPPED and result.first_failing is not None
    assert "the case gives no `baseline`" in result.first_failing.note
    assert "cannot run in float64: expected scalar type Float but found Double" in result.notes[0]
    assert compare(tiny_port, replace(case, baseline=1e-6)).passed


def test_where_float64_cannot_run_float32_is_the_truth_of_lower_ones(tiny_port: Path) -> None:
    result = compare(tiny_port, edited(only_float32, both=True), dtype="bfloat16")
    assert result.passed and result.notes[0].endswith("its float32 run is the truth")
    image = result.stages[-1]
    assert image.name == "image" and image.noise_reference > 1e-4
