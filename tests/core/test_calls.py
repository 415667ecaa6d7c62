"""What a plan takes a pipeline's call to be: whose defaults, which latents, how encoders are asked; and guesses."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from porter.commands._memory import left_out
from porter.core.calls import numbers, text_calls
from porter.core.defaults import call_source
from porter.core.described import target_size
from porter.core.memory import Memory, Workload, estimate
from porter.core.workload import default_workload
from tests.core.test_memory import GB, T5, VAE, Part, flux

DENOISER = Part("transformer", "WanTransformer3DModel", {}, 14 * 10**9, {"BF16": 28 * GB}, "diffusers", 28 * GB)


def test_without_a_pipeline_the_familys_call_is_taken_and_said() -> None:
    work, assumed = default_workload(None, [DENOISER], "WanPipeline")
    assert (work.height, work.width, work.frames, work.spatial, work.temporal) == (480, 832, 81, 8, 4)
    assert "frames 81 (as WanPipeline is called)" in assumed and "height 480 (as WanPipeline is called)" in assumed
    assert "no autoencoder: 8 pixels and 4 frames per latent position" in assumed
    assert work.guessed == ()

    _, assumed = default_workload("NobodysPipeline", [DENOISER], "WanPipeline")
    assert any("NobodysPipeline is not installed" in line for line in assumed)
    assert "frames 81 (as WanPipeline is called)" in assumed
    work, _ = default_workload("LTXPipeline", [DENOISER], "WanPipeline")  # its own call comes first
    assert (work.height, work.width) == (512, 704)


@pytest.mark.parametrize(
    ("pipeline", "size", "forced"),
    [
        ("WanVACEPipeline", (480, 832, 81), False),
        ("WanAnimatePipeline", (720, 1280, 77), False),  # frames of a segment
        ("SkyReelsV2Pipeline", (544, 960, 97), False),
        ("SkyReelsV2DiffusionForcingPipeline", (544, 960, 97), True),
    ],
)
def test_videos_are_as_long_as_their_pipelines_make_them(
    pipeline: str, size: tuple[int, int, int], forced: bool
) -> None:
    work, assumed = default_workload(pipeline, [Part("vae", "AutoencoderKLWan", {"scale_factor_spatial": 8})])
    assert (work.height, work.width, work.frames) == size and work.guessed == ()
    assert work.frame_timesteps is forced and any("timestep for each" in line for line in assumed) is forced
    assert not work.guidance  # both passes run one after the other


def test_a_size_that_nobody_says_is_a_guess_and_gives_no_verdict() -> None:
    work, assumed = default_workload(None, [DENOISER])
    assert work.guessed == ("height", "width", "frames") and "frames 81 (no default is known)" in assumed
    told, _ = default_workload(None, [DENOISER], height=480, width=832, frames=81)
    assert told.guessed == ()

    certain = estimate(flux(), Workload(), 80 * GB)
    guessed = estimate(flux(), Workload(guessed=("height", "width")), 80 * GB)
    assert (certain.fits, guessed.fits) == ("yes", "unknown")
    assert "height and width: only guessed, say --height N --width N" in guessed.reason
    assert certain.stages == guessed.stages
    # Two of 57 blocks, or an encoder's, are too much for 1.5 GB whatever the size is; 2 GB may do for a small picture.
    fits = {room: estimate(flux(), Workload(guessed=("height",)), int(room * GB)).fits for room in (1.5, 2)}
    assert fits == {1.5: "no", 2: "unknown"} and estimate(flux(), Workload(), 2 * GB).fits == "no"


def test_a_config_that_is_not_here_is_said_and_not_guessed() -> None:
    parts = [replace(part, config={}) if part.name == "transformer" else part for part in flux()]
    found = estimate(parts, Workload(), 80 * GB)
    part = next(part for part in found.components if part.name == "transformer")
    assert part.activations is None and part.missing == "config" and part.blocks == 1
    assert "its config is not here" in part.note and "layer offload is counted with all of it" in part.note
    assert found.fits == "unknown" and found.left_out == ("transformer",)
    assert left_out(found.to_json()) == "transformer (its config is not here or does not say)"
    small = estimate(parts, Workload(), 20 * GB)
    assert small.fits == "unknown" and "the blocks of transformer are not known" in small.reason

    nameless = replace(DENOISER, class_name="NobodysTransformer")
    (part,) = estimate([nameless], Workload()).components
    assert part.missing == "formula"


def test_latents_are_those_of_the_picture() -> None:
    sound = Part("audio_vae", "AutoencoderKLLTX2Audio", {"ch_mult": [1, 2, 4]})
    scaling, kinds = [True] * 4, ["spatial", "temporal", "spatiotemporal", "spatiotemporal"]
    config = {"spatio_temporal_scaling": scaling, "downsample_type": kinds, "patch_size": 4, "patch_size_t": 1}
    work, _ = default_workload("LTX2Pipeline", [sound, Part("vae", "AutoencoderKLLTX2Video", config)])
    assert (work.spatial, work.temporal, work.frames) == (32, 8, 121)

    work, _ = default_workload(None, [sound, Part("video_vae", "AutoencoderKLWan", {"scale_factor_spatial": 16})])
    assert (work.spatial, work.temporal) == (16, 4)

    work, assumed = default_workload(None, [Part("vae", "AutoencoderKL"), DENOISER])
    assert "vae: its config is not here: 8 pixels per latent position" in assumed
    assert not any("no autoencoder" in line for line in assumed)

    pixels = Part("unet", "UNet2DConditionModel", {"in_channels": 3, "sample_size": 64})
    work, assumed = default_workload("IFPipeline", [pixels])
    assert (work.height, work.width, work.spatial, work.guidance) == (64, 64, 1, True)
    assert "no autoencoder: one pixel per latent position" in assumed


def test_frames_are_the_denoisers_own_where_the_call_leaves_them_open() -> None:
    unet = Part("unet", "UNetSpatioTemporalConditionModel", {"num_frames": 14, "sample_size": None})
    work, assumed = default_workload("StableVideoDiffusionPipeline", [unet, Part("vae", "AutoencoderKL", VAE)])
    assert (work.height, work.width, work.frames) == (576, 1024, 14)
    assert "frames 14 (the denoiser's num_frames)" in assumed


def test_a_denoisers_area_and_a_constructors_length_of_prompts_are_followed() -> None:
    parts = [Part("transformer", "HunyuanVideo15Transformer3DModel", {"target_size": 960})]
    parts += [Part("vae", "AutoencoderKLHunyuanVideo15", {"latent_channels": 32}), Part("text_encoder", None)]
    work, assumed = default_workload("HunyuanVideo15Pipeline", parts)
    assert (work.height, work.width, work.frames, work.text_tokens) == (720, 1280, 121, 1000)
    assert (work.spatial, work.temporal, work.guidance, work.guessed) == (16, 4, False, ())
    assert "height 720 (the denoiser's target_size, at 16:9)" in assumed
    assert "1000 text tokens (HunyuanVideo15Pipeline.__call__)" in assumed


@pytest.mark.parametrize(
    ("side", "size"),
    [(320, (240, 416)), (640, (480, 848)), (848, (640, 1120)), (3, None), (10**9, None), ("640", None)],
)
def test_an_area_gives_the_size_that_the_pipeline_finds(side: Any, size: tuple[int, int] | None) -> None:
    """Against what `HunyuanVideo15ImageProcessor.calculate_default_height_width(9, 16, side)` answers."""
    assert target_size([Part("transformer", "NobodysTransformer", {"target_size": side})], 16) == size


def test_a_pipeline_that_makes_sound_has_no_pictures_size() -> None:
    unet = Part("unet", "UNet2DConditionModel", {"sample_size": 128})
    work, assumed = default_workload("AudioLDMPipeline", [unet, Part("vae", "AutoencoderKL", VAE)])
    assert not any("not installed" in line for line in assumed)  # it stands among the deprecated ones
    assert work.guessed == ("height", "width")


@pytest.mark.parametrize(
    ("pipeline", "encoder", "mask", "states", "cache"),
    [
        ("FluxPipeline", "text_encoder_2", False, False, True),
        ("StableDiffusion3Pipeline", "text_encoder_2", False, True, True),  # asked in a loop, under no name
        ("StableDiffusion3Pipeline", "text_encoder_3", False, False, True),
        ("StableDiffusionPipeline", "text_encoder", False, False, True),
        ("WanPipeline", "text_encoder", True, False, True),  # the mask is the second argument
        ("AuraFlowPipeline", "text_encoder", True, False, True),  # `**text_inputs`
        ("SanaPipeline", "text_encoder", True, False, True),
        ("HunyuanVideoPipeline", "text_encoder", True, True, True),
        ("Flux2KleinPipeline", "text_encoder", True, True, False),
    ],
)
def test_text_encoders_are_asked_as_the_installed_pipeline_asks_them(
    pipeline: str, encoder: str, mask: bool, states: bool, cache: bool
) -> None:
    work, _ = default_workload(pipeline, [Part(encoder, "SomeEncoder", library="transformers")])
    asked = work.asked(encoder)
    assert (asked.text_mask, asked.hidden_states, asked.text_cache) == (mask, states, cache)
    assert work.asked("another") == work


def test_the_estimate_follows_how_an_encoder_is_asked() -> None:
    plain = Workload(text_calls={"text_encoder_2": {"text_mask": False, "hidden_states": False, "text_cache": True}})
    masked, bare = (
        next(part.activations or 0 for part in estimate(flux(), work).components if part.name == "text_encoder_2")
        for work in (Workload(), plain)
    )
    bias = 2 * T5["num_heads"] * 512 * 512
    assert bias * 0.99 < masked - bare < bias * 1.01
    found = estimate(flux(), replace(plain, guessed=("height",)), 24 * GB)
    assert Memory.from_json(json.loads(json.dumps(found.to_json()))) == found


@pytest.mark.parametrize(
    ("source", "found"),
    [
        (b"self.text_encoder(ids, attention_mask=None)[0]", {"text_encoder": (False, False, True)}),
        (b"x = text_encoder(ids.to(a(b)), use_cache=False, output_hidden_states=True)", {"": (False, True, False)}),
        (b"move_text_encoder(self.text_encoder)", {}),
        (b"self.text_encoder(" + b"(" * 5000, {}),
        (b"", {}),
    ],
)
def test_calls_are_read_from_text(source: bytes, found: dict[str, Any]) -> None:
    assert {name: tuple(how.values()) for name, how in text_calls(source).items()} == found


def test_numbers_are_read_from_text() -> None:
    call = call_source("ZImagePipeline")
    assert call is not None and call.numbers["height"] == call.numbers["width"] == 1024
    several = b'        self.vae_scale_factor_temporal = (\n            a if getattr(self, "vae") else 4\n        )\n'
    assert numbers(several) == {"temporal": 4}
    assert numbers(b"        self.vae_scale_factor = 2 ** len(self.vae.config.block_out_channels)\n") == {}
