"""What one square picture hides shows in a batch of another size; a side that stops says where it had parted."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conversions.flux1.pipeline import FluxPipelineConfig
from parity.case import PipelineSide
from parity.compare import DIFFERS, PRECISION, SKIPPED
from parity.pipeline_guards import BATCH, SECOND
from runtime.stages import DenoisingStage, InputValidationStage, TextEncodingStage, TimestepPreparationStage
from tests.parity.planted import compare, edited, reference_runs_once

__all__ = ["reference_runs_once"]
pytestmark = pytest.mark.usefixtures("reference_runs_once")


def exchanged(known: Callable[..., Any], config: Any, batch: Any) -> tuple[int, ...]:
    count, channels, height, width = known(config, batch)
    return count, channels, width, height


def columns_first(known: Callable[..., Any], config: Any, batch: Any, device: Any) -> tuple[Tensor, Tensor]:
    text, _ = known(config, batch, device)
    _, _, height, width = batch.raw_latent_shape
    rows, columns = torch.arange(width // 2).float(), torch.arange(height // 2).float()
    return text, torch.cartesian_prod(torch.zeros(1), rows, columns)


def longer_side(known: Callable[..., Any], config: Any, batch: Any) -> float:
    side = max(batch.height, batch.width)
    return float(known(config, replace(batch, height=side, width=side)))


def first_only(known: Callable[..., Any], stage: Any, texts: list[str], *rest: Any) -> Any:
    return known(stage, [texts[0]] * len(texts), *rest)


def pooled_backwards(known: Callable[..., Any], *args: Any) -> Any:
    tokens, pooled = known(*args)
    return tokens, [p.flip(0) for p in pooled]


def one_generator(known: Callable[..., Any], stage: Any, batch: Any, config: Any) -> Any:
    batch = known(stage, batch, config)
    batch.generator = batch.generator[:1] * len(batch.generator)
    return batch


def weaker(known: Callable[..., Any], stage: Any, batch: Any, config: Any) -> Any:
    batch.true_cfg_scale = 1 + (batch.true_cfg_scale - 1) / 2  # the other formula: positive + scale * (positive - …)
    return known(stage, batch, config)


def positive_pooled(known: Callable[..., Any], config: Any, batch: Any, table: Any, device: Any) -> dict[str, Any]:
    return config._conditions(batch, batch.negative_prompt_embeds[1], batch.pooled_embeds[0], table, device)


def guided_once(known: Callable[..., Any], config: Any, *args: Any) -> dict[str, Any]:
    given = known(config, *args)
    given["guidance"][1:] = 1.0
    return given


FAULTS: dict[str, tuple[type, str, Callable[..., Any], str]] = {
    "height and width exchanged": (FluxPipelineConfig, "prepare_latent_shape", exchanged, "step 0 denoiser hidden_"),
    "positions column by column": (FluxPipelineConfig, "_ids", columns_first, "step 0 denoiser img_ids"),
    "shift of the longer side": (FluxPipelineConfig, "prepare_mu", longer_side, "set_timesteps mu"),
    "second prompt ignored": (TextEncodingStage, "_encode", first_only, "text_encoder input_ids"),
    "rows in another order": (TextEncodingStage, "_encode", pooled_backwards, "step 0 denoiser pooled_projections"),
    "one generator for all": (InputValidationStage, "forward", one_generator, "draw 1: seed 1 there, 0 here"),
    "formula of the guidance": (DenoisingStage, "forward", weaker, "step 0 scheduler model_output"),
    "pooled of the other prompt": (
        FluxPipelineConfig,
        "prepare_neg_cond_kwargs",
        positive_pooled,
        "denoiser#1 pooled_",
    ),
    "guidance of the first": (FluxPipelineConfig, "_conditions", guided_once, "step 0 denoiser guidance"),
}


@pytest.mark.parametrize(
    "fault", [pytest.param(fault, marks=pytest.mark.slow if i else ()) for i, fault in enumerate(FAULTS)]
)
def test_a_fault_that_one_square_picture_hides(tiny_port: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    owner, name, planted, where = FAULTS[fault]
    known = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args: planted(known, *args))
    result = compare(tiny_port)
    assert not result.passed and all(v.passed for v in result.stages)
    assert result.first_failing is not None and result.first_failing.name == BATCH
    assert where in result.first_failing.note and all(v.passed for v in result.guards if v.name != BATCH)


@pytest.mark.slow
def test_a_batch_in_low_precision(tiny_port: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert compare(tiny_port, dtype="bfloat16").passed
    known = FluxPipelineConfig._conditions
    monkeypatch.setattr(FluxPipelineConfig, "_conditions", lambda *args: guided_once(known, *args))
    result = compare(tiny_port, dtype="bfloat16")
    assert result.status == PRECISION and result.first_failing is not None and result.first_failing.name == BATCH


def test_a_case_whose_sides_make_no_batch_is_not_compared(tiny_port: Path) -> None:
    def alone(side: PipelineSide) -> PipelineSide:
        return replace(side, run=lambda request: side.run(replace(request, more=(), part=(1, 1), negative=None)))

    result = compare(tiny_port, edited(alone, both=True))
    assert result.status == SKIPPED and result.first_failing is not None and result.first_failing.name == BATCH
    assert result.first_failing.note == "asked for 2 pictures of another size, the reference made 1 of 64 x 64"


def test_embeddings_kept_from_the_first_request_are_named(tiny_port: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = TextEncodingStage.forward

    def kept(self: Any, batch: Any, config: Any) -> Any:
        if hasattr(self, "kept"):
            batch.prompt_embeds = self.kept
            batch.pooled_embeds = self.pooled
            return batch
        batch = encode(self, batch, config)
        self.kept, self.pooled = batch.prompt_embeds, batch.pooled_embeds
        return batch

    monkeypatch.setattr(TextEncodingStage, "forward", kept)
    result = compare(tiny_port)
    assert result.status == DIFFERS and result.first_failing is not None and result.first_failing.name == SECOND
    assert result.first_failing.note.startswith("text_encoder input_ids is never seen on the candidate's side, and")


# --- sides that stop, and stages that only one side has --------------------------------------------------------------


def test_a_side_that_stops_says_where_it_had_parted(tiny_port: Path) -> None:
    def broken(side: PipelineSide) -> None:
        calls = iter(range(100))

        def spoil(module: Any, args: Any, out: Tensor) -> Tensor:
            return out + math.nan if next(calls) == 1 else out

        side.stages["denoiser"].register_forward_hook(spoil)

    result = compare(tiny_port, edited(broken), steps=3)
    assert result.status == SKIPPED and "the latents are not finite after step" in result.reason
    assert "before that, it differs from step 1 denoiser -> 0 on (nan" in result.reason


@pytest.mark.parametrize("error", [IndexError("no such step"), AttributeError("no such scheduler"), KeyError("t")])
def test_whatever_a_side_raises_is_no_crash(tiny_port: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def raising(self: Any, batch: Any, config: Any) -> Any:
        raise error

    monkeypatch.setattr(DenoisingStage, "forward", raising)
    result = compare(tiny_port)
    assert result.status == SKIPPED and type(error).__name__ in result.reason
    assert result.reason.endswith("until then it agreed with the reference")


def test_what_a_stage_of_the_port_refuses_is_no_crash(tiny_port: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare = TimestepPreparationStage.forward

    def backwards(self: Any, batch: Any, config: Any) -> Any:
        batch = prepare(self, batch, config)
        batch.timesteps = batch.timesteps.flip(0)
        return batch

    monkeypatch.setattr(TimestepPreparationStage, "forward", backwards)
    result = compare(tiny_port)
    assert result.status == SKIPPED and "UsageError: timesteps: not what" in result.reason


def test_what_only_the_candidate_has_stands_where_it_happens(tiny_port: Path) -> None:
    def masked(side: PipelineSide) -> None:
        def give(module: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return args, kwargs | {"attention_mask": (args[0] != 0).long()}

        side.stages["text_encoder_2"].register_forward_pre_hook(give, with_kwargs=True)

    result = compare(tiny_port, edited(masked))
    names = [v.name for v in result.stages]
    at = names.index("text_encoder_2 attention_mask")
    assert result.first_failing is result.stages[at] and names[at + 1] == "text_encoder_2 -> last_hidden_state"
