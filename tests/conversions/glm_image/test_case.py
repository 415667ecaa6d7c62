"""GLM-Image under the parity instrument: the transformer module by module, the pipeline stage by stage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from conversions.glm_image.before_denoising import GlmImageBeforeDenoisingStage
from conversions.glm_image.case import CASES
from conversions.glm_image.model import GlmImageTransformer
from parity.case import Block, Case, Draw, Side
from parity.outcome import Options
from parity.own import run_case
from parity.pipeline import PipelineResult, compare_pipelines
from parity.stages import Request
from runtime.loader import packed, quiet_libraries
from tests.conversions.glm_image.ports import write_port
from tests.conversions.glm_image.test_model import TINY

NOISE = "the reference's last latents shows something"  # random weights denoise nothing: a guard says so


def diffusers_transformer(config: Mapping[str, Any]) -> nn.Module:
    from diffusers import GlmImageTransformer2DModel

    model: nn.Module = GlmImageTransformer2DModel(**config)
    return model


def inputs(config: Mapping[str, Any], draw: Draw) -> dict[str, Tensor]:
    return {
        "hidden_states": draw("latents", 2, 4, 6, 10),
        "encoder_hidden_states": draw("glyphs", 2, 7, config["text_embed_dim"]),
        "prior_token_id": draw.integers("prior", config["prior_vq_quantizer_codebook_size"], 2, 15),
        "prior_token_drop": draw.uniform("drop", 2, 15) > 0.7,
        "timestep": draw.uniform("time", 2, high=1000.0),
        "target_size": draw.uniform("size", 2, 2, high=1000.0),
        "crop_coords": draw.uniform("crop", 2, 2, high=1000.0),
    }


def case() -> Case:
    return Case(
        Side(diffusers_transformer, lambda model, given: model(**given, return_dict=False)[0]),
        Side(GlmImageTransformer.from_config, lambda model, given: model(**given)),
        inputs,
        convert=lambda state: packed(GlmImageTransformer, TINY, state),
        config=TINY,
        blocks=(
            Block(
                r"transformer_blocks\.\d+",
                force=lambda ref, own: {"img": ref["hidden_states"], "txt": ref["encoder_hidden_states"]},
                inputs=lambda own, _: {
                    "hidden_states": own["img"], "encoder_hidden_states": own["txt"], "temb": own["vec"],
                    **{f"image_rotary_emb.{i}": own[f"rope.{i}"].repeat(1, 2) for i in range(2)},
                },
            ),
        ),
    )  # fmt: skip


def test_every_module_of_the_transformer_equals_diffusers() -> None:
    (result,) = run_case(case(), Options()).components
    assert result.passed, result


def pipelines(port: Path, **options: Any) -> PipelineResult:
    whole = CASES.pipelines["GlmImagePipeline"]
    return compare_pipelines(whole, port, Request(whole.prompt, 0, 2, 1.5), **options)


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with quiet_libraries():
        yield write_port(tmp_path_factory.mktemp("glm") / "tiny")


def test_an_honest_pipeline_agrees_at_every_stage(port: Path) -> None:
    result = pipelines(port)
    assert result.stages and all(v.passed for v in result.stages) and not result.missing and not result.notes
    assert result.pixels_changed == 0 and [v.name for v in result.guards if not v.passed] == [NOISE]
    names = [v.name for v in result.stages]
    tokens = [name for name in names if name.startswith("vision_language_encoder") and "->" in name]
    assert len(tokens) == 2 * 2 + 16 * 16 + 1  # of the picture, of the small one before it, and one that ends it
    assert names.index(tokens[-1]) < names.index("text_encoder input_ids") < names.index("sigmas")
    assert names.index("step 1 latents") < names.index("decoder sample") and names[-1] == "image"
    assert all(v.max_abs64 < 1e-11 for v in result.stages)


@pytest.mark.slow
def test_tokens_of_another_seed_are_found(port: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = GlmImageBeforeDenoisingStage._sample
    monkeypatch.setattr(
        GlmImageBeforeDenoisingStage, "_sample", lambda self, text, seed, batch: right(self, text, seed + 1, batch)
    )
    result = pipelines(port)
    assert not result.passed and result.first_failing is not None and result.first_failing.name == "draw 0"
