"""Parity of Stable Diffusion 3: the native transformer against diffusers', block by block, and the whole pipeline."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conversions.publish import port_of
from conversions.sd3.case import CASES, OneAfterTheOther
from conversions.sd3.pipeline import SD3PipelineConfig
from parity.case import ComponentCase
from parity.outcome import Options
from parity.pipeline import PipelineResult, compare_pipelines
from parity.run import run_parity
from parity.stages import Request
from porter.core.port import Port
from tests.conversions.sd3.ports import LARGE_35, MEDIUM, MEDIUM_35, write_port

NOISE = "the reference's last latents shows something"  # random weights paint noise
TRANSFORMERS = [case for case in CASES.components if case.component == "transformer"]


@pytest.mark.parametrize("case", TRANSFORMERS, ids=lambda case: case.trace.stem)
def test_the_transformer_equals_diffusers_block_by_block(case: ComponentCase, tmp_path: Path) -> None:
    port = Port.open(port_of("sd3", case, tmp_path).parent)
    outcome = run_parity(port, "sd3", replace(CASES, components=(case,), pipelines={}), Options())
    results = {(result.against, result.candidate): result for result in outcome.components}
    assert set(results) == {("trace", "native"), ("trace", "diffusers"), ("diffusers", "native")}
    for key, result in results.items():
        bad = [f"{v.name}: {v.status} {v.max_abs:.2e} {v.note}" for v in result.verdicts if not v.passed][:8]
        assert result.passed, (key, result.status, result.reason, bad)
        assert not result.counts["missing"] and not result.counts["skipped"], (key, result.counts)
    blocks = {v.name for v in results["diffusers", "native"].verdicts if "transformer_blocks.1" in v.name}
    assert any("hidden_states" in name for name in blocks), blocks


@pytest.fixture(scope="module")
def ports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("ports")
    return {
        "medium": write_port(folder / "medium", MEDIUM),
        "3.5 large, no T5": write_port(folder / "large", LARGE_35, t5=False),
        "3.5 medium": write_port(folder / "medium-35", MEDIUM_35, use_dynamic_shifting=True),
    }


def compared(port: Path, **options: Any) -> PipelineResult:
    case = CASES.pipelines["StableDiffusion3Pipeline"]
    return compare_pipelines(case, port, Request(case.prompt, 0, 2, case.guidance), **options)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("medium", "float32"), ("3.5 large, no T5", "float32"), ("3.5 medium", "float32"), ("3.5 medium", "bfloat16")],
)
def test_the_pipeline_equals_diffusers_stage_by_stage(ports: dict[str, Path], name: str, dtype: str) -> None:
    result = compared(ports[name], dtype=dtype)
    every = [v for v in (*result.stages, *result.guards) if v.name != NOISE]
    bad = [f"{v.name}: {v.status} {v.max_abs:.2e} {v.note}" for v in every if not v.passed]
    assert len(result.stages) > 40 and not result.reason and not bad, (result.reason, result.notes, bad[:8])
    assert result.counts["missing"] == 0 and result.counts["skipped"] == 1, result.counts
    seen = {v.name for v in result.stages}
    assert {"step 1 denoiser#1 encoder_hidden_states", "text_encoder_2#1 input_ids", "image"} <= seen, seen


def test_a_planted_fault_is_found(ports: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SD3PipelineConfig, "prepare_mu", lambda self, batch: 0.7)
    result = compared(ports["3.5 medium"])
    assert not result.passed
    assert result.first_failing is not None and result.first_failing.name == "set_timesteps mu"


def test_both_halves_one_after_the_other_equal_both_in_one_batch(ports: dict[str, Path]) -> None:
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel.from_pretrained(ports["medium"] / "transformer", low_cpu_mem_usage=False)
    draw, halves = torch.Generator().manual_seed(0), OneAfterTheOther(model)
    given = {
        "hidden_states": torch.randn(4, 4, 8, 8, generator=draw),
        "encoder_hidden_states": torch.randn(4, 5, 96, generator=draw),
        "pooled_projections": torch.randn(4, 44, generator=draw),
        "timestep": torch.full((4,), 500.0),
    }
    calls: list[torch.Tensor] = []
    model.register_forward_pre_hook(lambda m, a, k: calls.append(k["pooled_projections"]), with_kwargs=True)
    with torch.no_grad():
        (whole,) = halves(**given, return_dict=False)
        halves.guided = True
        (parts,) = halves(**given, return_dict=False)
    assert (whole - parts).abs().max() < 1e-5 and float(whole.std()) > 0.1
    assert torch.equal(calls[1], given["pooled_projections"][2:])
    assert torch.equal(calls[2], given["pooled_projections"][:2])
