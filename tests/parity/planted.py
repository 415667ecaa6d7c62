"""The FLUX.1 pipeline case with faults planted into it; the untouched reference answers each request once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conversions.flux1 import case as flux
from parity import pipeline
from parity.case import PipelineCase, PipelineSide
from parity.pipeline import PipelineResult, compare_pipelines
from parity.stages import Request
from runtime.stages import LatentPreparationStage

PROMPT = "a red circle on a white background"
CASE = flux.CASES.pipelines["FluxPipeline"]


_run = pipeline._run
_run_once = cache(_run)


@pytest.fixture
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


def noise(draw: Callable[[tuple[int, ...], torch.Generator], Tensor]) -> Callable[..., Any]:
    original = LatentPreparationStage.forward

    def forward(self: Any, batch: Any, config: Any) -> Any:
        raw = config.prepare_latent_shape(batch)
        drawn = torch.cat([draw((1, *raw[1:]), generator) for generator in batch.generator])
        batch.latents = config.maybe_pack_latents(drawn, batch)
        return original(self, batch, config)

    return forward
