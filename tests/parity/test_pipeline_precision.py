"""Low precision is judged by the truth, other rounding passes, and a side that float64 cannot run says so."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conversions.flux1.pipeline import FluxPipelineConfig
from parity.case import PipelineSide
from parity.compare import PRECISION, SKIPPED
from porter.cli import main
from porter.core.errors import UsageError
from runtime.stages import LatentPreparationStage
from tests.parity.planted import compare, edited, noise, reference_runs_once

pytestmark = pytest.mark.slow

__all__ = ["reference_runs_once"]
pytestmark = pytest.mark.usefixtures("reference_runs_once")


def faster(self: Any, timestep: Tensor, batch: Any) -> Tensor:
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
        if image.element_size() == 8:
            raise RuntimeError("expected scalar type Float but found Double")
        return image

    return replace(side, run=run)


@pytest.mark.slow
def test_where_float64_cannot_run_the_baseline_decides(tiny_port: Path) -> None:
    case = edited(only_float32)
    result = compare(tiny_port, case)
    assert result.status == SKIPPED and result.first_failing is not None
    assert "the case gives no `baseline`" in result.first_failing.note
    assert "cannot run in float64: RuntimeError: expected scalar type Float but found Double" in result.notes[0]
    assert compare(tiny_port, replace(case, baseline=1e-6)).passed


@pytest.mark.slow
def test_where_float64_cannot_run_float32_is_the_truth_of_lower_ones(tiny_port: Path) -> None:
    result = compare(tiny_port, edited(only_float32, both=True), dtype="bfloat16")
    assert result.passed and result.notes[0].endswith("its float32 run is the truth")
    image = result.stages[-1]
    assert image.name == "image" and image.noise_reference > 1e-4


def test_the_command_and_its_document(tiny_port: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["parity", str(tiny_port), "--component", "pipeline", "--steps", "2", "-o", str(tmp_path)]
    assert main([*command, "--dtype", "bfloat16"]) == 0
    assert "PASS" in capsys.readouterr().out
    document = json.loads((tmp_path / "parity.json").read_text())["pipeline"]
    assert document["dtype"] == "bfloat16" and document["level"] == "step"
    assert document["to_truth"]["candidate"]["psnr"] > 30 and document["metrics"]["ssim"] > 0.99
    assert [len(side) for side in document["draws"]] == [1, 1] and document["draws"][0][0]["dtype"] == "bfloat16"
    assert len(document["growth"]["errors"]) == 2 and all(v["passed"] for v in document["guards"])
    assert main([*command, "--dtype", "int8"]) == 2


@pytest.mark.parametrize("option", [{"dtype": "float64"}, {"level": "block"}])
def test_other_dtypes_and_levels_are_refused(tiny_port: Path, option: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="pipelines have no"):
        compare(tiny_port, **option)
