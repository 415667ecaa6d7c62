"""Stages: contracts, defaults, refusals by field, taps. Real classes throughout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from porter.core.errors import BadInputError, CheckFailed, UsageError
from runtime.config import PipelineConfig, SamplingParams, TextEncoderSpec
from runtime.pipeline import ComposedPipelineBase
from runtime.registry import load, register_configs, register_pipeline
from runtime.request import Req
from runtime.stages import (
    DecodingStage,
    DenoisingStage,
    ImageVAEEncodingStage,
    InputValidationStage,
    LatentPreparationStage,
)

VAE = {"block_out_channels": [1, 1, 1], "sample_size": 64, "latent_channels": 4, "scaling_factor": 1.0}


def validated(batch: Req, **config: Any) -> Req:
    return InputValidationStage(SamplingParams())(batch, PipelineConfig(vae_config=VAE, **config))


@pytest.fixture(scope="module")
def pipeline(bare_port: Path) -> ComposedPipelineBase:
    return load(bare_port, dtype=torch.float32, device="cpu")


def test_unset_takes_the_default_and_zero_stays_zero() -> None:
    batch = validated(Req(prompt=""), should_use_guidance=False)
    assert (batch.seed, batch.height, batch.width, batch.num_inference_steps) == (0, 64, 64, 28)
    assert batch.guidance_scale is None
    given = InputValidationStage(SamplingParams(guidance_scale=3.5))
    config = PipelineConfig(vae_config=VAE, should_use_guidance=True)
    assert given(Req(prompt="x", guidance_scale=0.0), config).guidance_scale == 0
    assert given(Req(prompt="x"), config).guidance_scale == 3.5


BAD: list[tuple[dict[str, Any], str]] = [
    ({"prompt": None}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": 3}, "prompt"),
    ({"height": 50}, "height"),
    ({"width": 0}, "width"),
    ({"width": -64}, "width"),
    ({"seed": -1}, "seed"),
    ({"seed": 2**63}, "seed"),
    ({"num_inference_steps": 0}, "num_inference_steps"),
    ({"num_inference_steps": 2.5}, "num_inference_steps"),
    ({"num_images": 0}, "num_images"),
    ({"num_images": 10**9}, "num_images"),
    ({"height": 2**15}, "height"),
    ({"guidance_scale": float("nan")}, "guidance_scale"),
    ({"guidance_scale": -1.0}, "guidance_scale"),
    ({"negative_prompt": "x"}, "true_cfg_scale"),
    ({"negative_prompt": ["x", "y"], "true_cfg_scale": 2.0}, "negative_prompt"),
    ({"sigmas": [1.0, 0.5], "num_inference_steps": 3}, "sigmas"),
    ({"max_sequence_length": 0}, "max_sequence_length"),
]


@pytest.mark.parametrize(("change", "field"), BAD, ids=[f"{next(iter(c.items()))}" for c, _ in BAD])
def test_a_bad_field_is_refused_by_name(change: dict[str, Any], field: str) -> None:
    fields: dict[str, Any] = {"prompt": "a"} | change
    with pytest.raises(UsageError, match=field) as caught:
        validated(Req(**fields))
    assert caught.value.exit_code == 2
    assert caught.value.expected


def test_a_true_cfg_scale_without_negative_prompt_is_ignored_loudly() -> None:
    assert any("true_cfg_scale 4 is ignored" in line for line in validated(Req(prompt="a", true_cfg_scale=4)).warnings)
    assert not validated(Req(prompt="a", true_cfg_scale=4, negative_prompt="b")).warnings


def test_a_wrong_size_names_sizes_that_work() -> None:
    with pytest.raises(UsageError, match=r"up to 16384, such as 48 or 52"):
        validated(Req(prompt="a", height=50))


def test_a_stage_refuses_what_an_earlier_one_should_have_left(pipeline: ComposedPipelineBase) -> None:
    with pytest.raises(UsageError, match=r"latents.*DenoisingStage needs"):
        pipeline.stages["denoising"](Req(prompt="a"), pipeline.config)
    with pytest.raises(UsageError, match=r"raw_latent_shape.*DecodingStage needs"):
        pipeline.stages["decoding"](Req(prompt="a", latents=torch.zeros(1)), pipeline.config)
    with pytest.raises(UsageError, match=r"generator.*LatentPreparationStage needs"):
        pipeline.stages["latent_preparation"](Req(prompt="a"), pipeline.config)


def test_a_stage_refuses_its_own_broken_output(pipeline: ComposedPipelineBase, monkeypatch: Any) -> None:
    monkeypatch.setattr(type(pipeline.config), "prepare_sigmas", lambda self, batch: [0.5, 1.0])
    with pytest.raises(UsageError, match=r"timesteps.*TimestepPreparationStage must leave"):
        pipeline.generate("a", num_inference_steps=2)


def test_not_a_number_is_a_failed_check_not_a_black_picture(pipeline: ComposedPipelineBase, monkeypatch: Any) -> None:
    monkeypatch.setattr(
        type(pipeline.config), "scale_timestep", lambda self, t, batch: t * (float("nan") if t[0] < 900 else 1e-3)
    )
    with pytest.raises(CheckFailed, match=r"denoising: .* not finite after step 1"):
        pipeline.generate("a", num_inference_steps=3)


def test_a_size_whose_schedule_overflows_is_refused(pipeline: ComposedPipelineBase) -> None:
    batch = Req(prompt="a", height=2**14, width=2**14, num_inference_steps=1)
    with pytest.raises(UsageError, match="height and width"):
        pipeline.stages["timestep_preparation"](batch, pipeline.config)


def test_taps_see_every_stage_and_step_in_order(pipeline: ComposedPipelineBase) -> None:
    seen: list[tuple[str, set[str]]] = []
    pipeline.generate("a", num_inference_steps=2, taps=[lambda name, tensors: seen.append((name, set(tensors)))])
    assert seen == [
        ("text_encoding", {"prompt_embeds.0", "prompt_embeds.1", "pooled_embeds.0"}),
        ("timestep_preparation", {"timesteps", "sigmas"}),
        ("latent_preparation", {"latents"}),
        ("denoising.step.0", {"noise_pred", "latents"}),
        ("denoising.step.1", {"noise_pred", "latents"}),
        ("denoising", {"latents"}),
        ("decoding", {"latents", "image"}),
    ]


def test_given_embeddings_and_latents_are_used(pipeline: ComposedPipelineBase) -> None:
    first = pipeline.generate("a red circle", num_inference_steps=2, seed=4)
    noise: list[torch.Tensor] = []
    pipeline.generate(
        "a red circle",
        num_inference_steps=1,
        seed=4,
        taps=[lambda n, t: noise.append(t["latents"].clone()) if n == "latent_preparation" else None],
    )
    again = pipeline.forward(
        Req(
            prompt_embeds=first.prompt_embeds,
            pooled_embeds=first.pooled_embeds,
            latents=noise[0],
            seed=99,
            num_inference_steps=2,
        )
    )
    assert torch.equal(first.output, again.output)  # type: ignore[arg-type]


def test_two_prompts_and_two_images_each_make_four(pipeline: ComposedPipelineBase) -> None:
    batch = pipeline.generate(["a red circle", "a green square"], num_images=2, num_inference_steps=1, seed=8)
    assert batch.output is not None
    assert batch.output.shape == (4, 3, 64, 64)
    alone = pipeline.generate("a green square", num_inference_steps=1, seed=10).output
    assert (batch.output[2:3] - alone).abs().max() < 5e-6


# torch's own remark on mixed types under autocast, once a process
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")
def test_autocast_tiling_and_vae_precision_run(bare_port: Path) -> None:
    fresh = load(bare_port, dtype=torch.float32, device="cpu")
    plain = fresh.generate("a", num_inference_steps=1).output
    assert plain is not None
    for change in ({"enable_autocast": True}, {"vae_precision": "bfloat16"}):
        for name, value in change.items():
            setattr(fresh.config, name, value)
        found = fresh.generate("a", num_inference_steps=1).output
        assert found is not None
        assert 0 < (found.float() - plain).abs().max() < 0.2, change
    fresh.config.vae_tiling = True
    fresh.generate("a", num_inference_steps=1)
    assert fresh.modules["vae"].use_tiling


def test_wiring_mistakes_are_errors(pipeline: ComposedPipelineBase) -> None:
    with pytest.raises(UsageError, match="two stages called decoding"):
        pipeline.add_stage(DecodingStage(pipeline.modules["vae"]))
    with pytest.raises(BadInputError, match="lacks vae"):
        modules = {name: module for name, module in pipeline.modules.items() if name != "vae"}
        type(pipeline)(modules, pipeline.config, pipeline.sampling_params)
    with pytest.raises(UsageError, match=pipeline.pipeline_name):
        register_pipeline(type(pipeline))
    with pytest.raises(UsageError, match=r"registered twice: .*FLUX\.1-dev"):
        register_configs(
            "Another",
            sampling_param_cls=SamplingParams,
            pipeline_config_cls=PipelineConfig,
            hf_model_paths=("black-forest-labs/FLUX.1-dev",),
        )


def test_a_plain_config_packs_nothing() -> None:
    config = PipelineConfig(vae_config=VAE, text_encoders=(TextEncoderSpec("e", "t"),))
    batch = Req(prompt="a", height=32, width=64)
    latents = torch.zeros(config.prepare_latent_shape(batch))
    assert latents.shape == (1, 4, 8, 16)
    assert config.maybe_pack_latents(latents, batch) is latents
    assert config.get_decode_scale_and_shift() == (1.0, 0.0)


def test_stage_names() -> None:
    module = torch.nn.Linear(1, 1)
    assert LatentPreparationStage(module).name == "latent_preparation"
    assert DenoisingStage({"transformer": module}, None).name == "denoising"
    assert ImageVAEEncodingStage(None, module).name == "image_vae_encoding"


class OneOrTwo(PipelineConfig):
    def images(self) -> tuple[int, int | None]:
        return 1, 2


@pytest.mark.parametrize(("count", "fits"), [(0, False), (1, True), (2, True), (3, False)])
def test_a_pipeline_says_how_many_pictures_it_takes(count: int, fits: bool) -> None:
    stage, request = InputValidationStage(SamplingParams()), Req(prompt="x", image=[Image.new("RGB", (8, 8))] * count)
    if fits:
        assert stage(request, OneOrTwo(vae_config=VAE)) is request
    else:
        with pytest.raises(UsageError, match=r"^image: ") as error:
            stage(request, OneOrTwo(vae_config=VAE))
        assert error.value.expected == "image: 1 to 2 pictures"


def test_a_condition_on_another_device_is_refused_by_name(pipeline: ComposedPipelineBase) -> None:
    first = pipeline.generate("a", num_inference_steps=1)
    elsewhere = [t.to("meta") for t in first.pooled_embeds]
    batch = Req(prompt_embeds=first.prompt_embeds, pooled_embeds=elsewhere, latents=torch.zeros(1, 64, 16),
                timesteps=torch.ones(1))  # fmt: skip
    with pytest.raises(UsageError, match=r"pooled_embeds.*DenoisingStage needs") as caught:
        pipeline.stages["denoising"](batch, pipeline.config)
    assert "on cpu" in str(caught.value.expected) and "on meta" in str(caught.value.found)


def test_results_as_pictures_frame_after_frame() -> None:
    video = torch.arange(2 * 3 * 4 * 2 * 2).reshape(2, 3, 4, 2, 2) / 96
    frames = Req(output=video).pictures()
    assert len(frames) == 8 and frames[5].getpixel((1, 0)) == tuple((video[1, :, 1, 0, 1] * 255).round().int().tolist())
    with pytest.raises(UsageError, match="no output"):
        Req(prompt="a").pictures()
