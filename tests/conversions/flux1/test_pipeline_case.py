"""Parity of ports whose pipeline is Kontext or Fill: each is compared by the case of its own class."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from conversions.flux1 import pipeline_kontext
from conversions.flux1.case import CASES
from conversions.flux1.pipeline_case import PIPELINES, PROMPT
from conversions.flux1.pipeline_fill import FillLatentPreparationStage, FluxFillPipelineConfig
from conversions.flux1.pipeline_kontext import FluxKontextPipelineConfig
from parity.outcome import Options, Outcome
from parity.pipeline import PipelineResult, compare_pipelines
from parity.run import run_parity
from parity.stages import Request
from porter.core.errors import BadInputError, UsageError
from porter.core.port import Port
from runtime.stages import LatentPreparationStage
from tests.runtime.ports import write_port

KONTEXT, FILL = "FluxKontextPipeline", "FluxFillPipeline"


@pytest.fixture(scope="module")
def ports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("ports")
    return {name: write_port(folder / name, pipeline=name, filled=name == FILL) for name in (KONTEXT, FILL)}


def compare(port: Path) -> PipelineResult:
    return compare_pipelines(PIPELINES[port.name], port, Request(PROMPT, 0, 2, PIPELINES[port.name].guidance))


@pytest.mark.parametrize("name", [KONTEXT, FILL])
def test_an_honest_pipeline_agrees_at_every_stage(ports: dict[str, Path], name: str) -> None:
    result = compare(ports[name])
    assert all(v.passed and v.max_abs64 < 1e-10 for v in result.stages) and result.pixels_changed == 0
    failed = [v.name for v in result.guards if not v.passed]
    assert failed == ["the reference's last latents shows something"] and result.reason == ""  # weights are random
    names = {v.name for v in result.stages}
    assert {"draw 0", "step 0 denoiser img_ids", "step 1 latents", "decoder sample", "image"} <= names
    assert ("draw 2" in names) == (name == FILL)  # a sample of the picture, the noise, a sample of what is kept


FAULTS: dict[str, tuple[str, Any, str, Any, str]] = {
    "ids": (KONTEXT, pipeline_kontext, "grid", lambda _, *size: GRID(0, *size), "step 0 denoiser img_ids"),
    "picture": (KONTEXT, FluxKontextPipelineConfig, "normalise", lambda _, x: x, "step 0 denoiser hidden_states"),
    "draws": (FILL, FillLatentPreparationStage, "forward", LatentPreparationStage.forward, "draw 2"),
    "kept": (FILL, FluxFillPipelineConfig, "normalise", lambda _, x: x, "step 0 denoiser hidden_states"),
}
GRID = pipeline_kontext.grid


@pytest.mark.parametrize("fault", FAULTS)
def test_the_stage_of_a_fault_is_named(ports: dict[str, Path], monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    name, owner, attribute, wrong, stage = FAULTS[fault]
    monkeypatch.setattr(owner, attribute, wrong)
    result = compare(ports[name])
    assert not result.passed and result.first_failing is not None and result.first_failing.name == stage


def called(port: Path, name: object) -> Port:
    """The port with another `_class_name`."""
    index = port / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": name}))
    return Port.open(port)


def run(port: Port, **options: Any) -> Outcome:
    return run_parity(port, "flux1", CASES, Options(components=("pipeline",), steps=1, **options))


def test_a_port_is_compared_by_the_case_of_its_class(own_port: Path) -> None:
    lines: list[str] = []
    port = called(own_port, KONTEXT)
    outcome = run_parity(port, "flux1", CASES, Options(components=("pipeline",), steps=1), progress=lines.append)
    assert outcome.pipeline is not None and outcome.pipeline.passed
    assert outcome.pipeline.request.guidance == PIPELINES[KONTEXT].guidance
    assert lines == [f"pipeline ({KONTEXT}, native) against diffusers"]


def test_a_pipeline_without_a_case_is_refused_where_it_is_asked_for(own_port: Path) -> None:
    port = called(own_port, "FluxImg2ImgPipeline")
    with pytest.raises(UsageError, match="nothing is known") as error:
        run(port)
    assert error.value.expected == " | ".join(PIPELINES) and error.value.found == "FluxImg2ImgPipeline"
    with pytest.raises(UsageError, match="none is known here"):
        run_parity(
            port, "flux1", CASES, Options(components=("transformer",), against=("diffusers",), inputs="captured")
        )


@pytest.mark.parametrize("name", [None, 3, ["FluxPipeline"]])
def test_an_index_that_names_no_pipeline_is_bad_input(own_port: Path, name: object) -> None:
    with pytest.raises(BadInputError, match="names no pipeline"):
        run(called(own_port, name))
