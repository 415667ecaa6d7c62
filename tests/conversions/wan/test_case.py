"""Parity's view of the native transformer and pipeline: against diffusers they pass, and planted faults do not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conversions.publish import port_of
from conversions.wan.case import CASES, PROMPT
from conversions.wan.model import CrossAttention
from conversions.wan.pipeline import WanPipelineConfig
from parity.outcome import Options, Outcome
from parity.pipeline import PipelineResult, compare_pipelines
from parity.run import run_parity
from parity.stages import Request
from porter.core.port import Port
from tests.conversions.wan.ports import write_port

TRANSFORMERS = [case for case in CASES.components if case.component == "transformer"]


def against_diffusers(case: Any, folder: Path, level: str = "") -> Outcome:
    port, alone = Port.open(port_of("wan", case, folder).parent), replace(CASES, components=(case,), pipelines={})
    return run_parity(port, "wan", alone, Options(against=("diffusers",), level=level))


@pytest.mark.parametrize("case", TRANSFORMERS[:3], ids=lambda case: case.trace.stem)
def test_the_native_transformer_passes_against_diffusers(case: Any, tmp_path: Path) -> None:
    (result,) = against_diffusers(case, tmp_path).components
    assert result.passed and result.candidate == "native" and result.reference == "diffusers", result.reason
    assert result.counts["compared"] > 50 and not result.counts["missing"] and not result.unused


def test_a_fault_of_the_native_transformer_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture's keys a hundredth too large, in a step that is no module's."""
    keys = CrossAttention._keys

    def wrong(self: Any, context: Any) -> dict[str, Any]:
        return {name: y * 1.01 if name == "image_k" else y for name, y in keys(self, context).items()}

    monkeypatch.setattr(CrossAttention, "_keys", wrong)
    (result,) = against_diffusers(TRANSFORMERS[1], tmp_path, "block").components
    first = next(v for v in result.verdicts if not v.passed)
    assert not result.passed and not result.unused and (first.name, first.status) == ("forward", "over the gate")


@pytest.fixture(scope="module")
def ports(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Path] = {}

    def port(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("ports") / kind
            write_port(made[kind], kind)
        return made[kind]

    return port


def compare(port: Path, monkeypatch: pytest.MonkeyPatch) -> PipelineResult:
    for side, pixels in (("HEIGHT", 32), ("WIDTH", 48)):
        monkeypatch.setattr(f"conversions.wan.case.{side}", pixels)
    return compare_pipelines(CASES.pipelines["WanPipeline"], port, Request(PROMPT, 0, 3, 4.0))


@pytest.mark.parametrize("kind", ["t2v", "a14b", "5b"])
def test_the_native_pipeline_passes_at_every_stage(kind: str, ports: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    result = compare(ports(kind), monkeypatch)
    assert all(v.passed for v in result.stages) and not result.counts["missing"], result.first_failing
    names = [v.name for v in result.stages]
    assert names[0] == "text_encoder input_ids" and names[-1] == "image"
    denoiser = "denoiser_2" if kind == "a14b" else "denoiser"
    assert f"step 2 {denoiser}#1 encoder_hidden_states" in names and f"step 2 {denoiser} timestep" in names
    # What random weights paint is noise, and that it is none is one of the guards.
    assert [v.name for v in result.guards if not v.passed] == ["the reference's last latents shows something"]


def test_the_stage_of_a_fault_is_named(ports: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (1, -1, 1, 1, 1)
    unscaled = lambda self: (torch.ones(1, 1, 1, 1, 1), torch.tensor(self.vae_config["latents_mean"]).view(shape))  # noqa: E731
    monkeypatch.setattr(WanPipelineConfig, "get_decode_scale_and_shift", unscaled)
    result = compare(ports("t2v"), monkeypatch)
    assert not result.passed and result.first_failing is not None
    assert result.first_failing.name.startswith("decoder")
