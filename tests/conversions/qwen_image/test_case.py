"""Qwen-Image's parity cases: honest ports agree at every stage, native against diffusers, and planted faults do not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conversions.qwen_image import case as qwen
from conversions.qwen_image.pipeline_base import QwenImagePipelineConfig
from parity.compare import SKIPPED
from parity.pipeline import PipelineResult, compare_pipelines
from parity.run import Options, _compare_cross
from parity.stages import Request
from tests.conversions.qwen_image.ports import write_port

CASE = qwen.PIPELINE
PROMPT = "a red circle on a white background"


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_port(tmp_path_factory.mktemp("ports") / "tiny")


def compare(port: Path, steps: int = 2) -> PipelineResult:
    return compare_pipelines(CASE, port, Request(PROMPT, 0, steps, 0.0))


def test_an_honest_pipeline_agrees_at_every_stage(port: Path) -> None:
    """Random weights paint noise, which one guard says; the trained ones of a release do not."""
    result = compare(port)
    assert all(v.passed for v in result.stages), [v.name for v in result.stages if not v.passed]
    assert {v.name for v in result.guards if v.status == SKIPPED} <= {"the reference's last latents shows something"}
    assert all(v.passed or v.status == SKIPPED for v in result.guards)
    names = [v.name for v in result.stages]
    assert names[:2] == ["text_encoder input_ids", "text_encoder attention_mask"]
    assert names.index("draw 0") < names.index("step 0 denoiser hidden_states") < names.index("step 1 latents")
    assert names[-2:] == ["decoder -> 0", "image"]
    assert all(v.max_abs64 < 1e-11 for v in result.stages)


@pytest.mark.parametrize(
    ("name", "broken", "first"),
    [
        ("dropped", 33, "step 0 denoiser encoder_hidden_states"),
        ("prepare_mu", lambda self, batch: 0.5, "set_timesteps mu"),
        ("scale_timestep", lambda self, t, batch: t / 999, "step 0 denoiser timestep"),
        ("get_decode_scale_and_shift", lambda self: (1.0, 0.0), "decoder x"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_planted_faults_part_at_their_stage(
    port: Path, monkeypatch: pytest.MonkeyPatch, name: str, broken: Any, first: str
) -> None:
    if name == "dropped":
        init = QwenImagePipelineConfig.__init__
        broken_init = lambda self, **fields: init(self, **fields, dropped=broken)  # noqa: E731
        monkeypatch.setattr(QwenImagePipelineConfig, "__init__", broken_init)
    else:
        monkeypatch.setattr(QwenImagePipelineConfig, name, broken)
    result = compare(port)
    assert not result.passed
    assert next(v.name for v in result.stages if not v.passed) == first


@pytest.mark.parametrize(
    "settings", [{}, {"zero_cond_t": True}, {"use_additional_t_cond": True, "use_layer3d_rope": True}], ids=str
)
def test_the_native_transformer_agrees_with_diffusers_block_by_block(tmp_path: Path, settings: dict[str, Any]) -> None:
    folder = write_port(tmp_path / "tiny", **settings) / "transformer"
    cross = qwen.CROSS
    result = _compare_cross("transformer", cross, folder, cross.inputs(folder, 0), Options())
    assert result.passed, (result.reason, [v.name for v in result.verdicts if not v.passed][:8])
    assert result.counts["compared"] > 60 and not result.counts["missing"]
    worse = replace(cross, candidate=replace(cross.candidate, load=_with_swapped_norms))
    assert not _compare_cross("transformer", worse, folder, cross.inputs(folder, 0), Options()).passed


def _with_swapped_norms(folder: Path) -> torch.nn.Module:
    model: Any = qwen.load_native(folder)
    attn = model.transformer_blocks[1].attn
    attn.norm_q, attn.norm_k = attn.norm_k, attn.norm_q
    return model
