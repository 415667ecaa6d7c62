"""What parity is told about Z-Image: both models and both pipelines agree through it, and a fault is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from conversions.z_image.case import CASES
from conversions.z_image.model import ZImageTransformer
from conversions.z_image.pipeline import ZImagePipelineConfig
from parity.component import ComponentResult
from parity.given import captured_inputs
from parity.outcome import Options
from parity.pipeline import PipelineResult, compare_pipelines
from parity.run import _compare_cross
from parity.stages import Request
from tests.conversions.z_image.ports import write_port

PIPELINE = CASES.pipelines["ZImagePipeline"]
REQUEST = Request(PIPELINE.prompt, 0, 2, PIPELINE.guidance)
CROSS = CASES.components[1].cross[0]
UNTRAINED = "the reference's last latents shows something"  # weights that were drawn paint noise


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_port(tmp_path_factory.mktemp("ports") / "tiny")


def cross(port: Path, inputs: str = "random") -> ComponentResult:
    folder = port / "transformer"
    given = CROSS.inputs(folder, 0)
    if inputs == "captured":
        given = captured_inputs(PIPELINE, port, "transformer", Request(PIPELINE.prompt, 0, 1, 0.0))
    return _compare_cross("transformer", CROSS, folder, given, Options())


@pytest.mark.parametrize("inputs", ["random", "captured"])
def test_both_models_agree_in_every_module(port: Path, inputs: str) -> None:
    result = cross(port, inputs)
    bad = [f"{v.name}: {v.status} {v.note}" for v in result.verdicts if not v.passed]
    assert result.passed, (result.status, result.reason, bad[:8])
    assert result.counts["compared"] > 150 and result.counts["skipped"] == result.counts["missing"] == 0


def test_a_faulty_layer_is_named(port: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = ZImageTransformer.__init__

    def wrong(self: ZImageTransformer, params: object) -> None:
        right(self, params)  # type: ignore[arg-type]
        self.layers[1].ffn_norm2.eps = 1e-2

    monkeypatch.setattr(ZImageTransformer, "__init__", wrong)
    result = cross(port)
    assert not result.passed and result.guilty is not None
    assert result.guilty.candidate == "layers.1.ffn_norm2"


def failing(result: PipelineResult) -> list[str]:
    return [v.name for v in (*result.stages, *result.guards) if not v.passed and v.name != UNTRAINED]


def test_both_pipelines_agree_at_every_stage(port: Path) -> None:
    result = compare_pipelines(PIPELINE, port, REQUEST)
    assert not result.reason and failing(result) == [] and result.missing == 0
    names = {v.name for v in result.stages}
    assert {"text_encoder#1 -> hidden_states.2", "step 1 denoiser#1 -> 0", "step 1 latents", "image"} <= names


def test_a_fault_is_found_at_its_stage(port: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ZImagePipelineConfig, "scale_timestep", lambda self, t, batch: (999 - t) / 1000)
    assert failing(compare_pipelines(PIPELINE, port, REQUEST))[0] == "step 0 denoiser timestep"


def test_what_diffusers_got_in_lists_is_seen_as_batches(port: Path) -> None:
    """Two prompts and their negatives in one call are two batches of two."""
    side = PIPELINE.reference(port, torch.float32)
    calls = []
    side.stages["denoiser"].register_forward_hook(lambda m, args, out: calls.append([*args, out]))
    side.run(
        Request("a red circle", 0, 1, 2.0, more=("a blue square, and " * 4,), negative=("green", 2.0), part=(0.5, 0.5))
    )
    shapes = [[tuple(t.shape) for t in call] for call in calls]
    assert [s[0] for s in shapes] == [s[3] for s in shapes] == [(2, 4, 8, 8)] * 2 and len(calls) == 2
    assert torch.equal(calls[0][0], calls[1][0]) and not torch.equal(calls[0][3], calls[1][3])
    assert calls[0][2].shape[1] > calls[1][2].shape[1]
