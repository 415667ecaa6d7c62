"""The memory estimate: sizes and workloads, stages, verdicts, what it says when it does not know; JSON both ways."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from porter.core.described import full_config
from porter.core.errors import BadInputError, UsageError
from porter.core.formulas import facts_of
from porter.core.memory import RESERVE, Memory, estimate, formula_of
from porter.core.workload import Workload, default_workload, latents_of, parse_bytes

GB = 10**9


@dataclass(frozen=True)
class Part:
    """A component as a plan knows it."""

    name: str
    class_name: str | None
    config: Mapping[str, Any] = field(default_factory=dict)
    parameters: int | None = None
    dtypes: Mapping[str, int] = field(default_factory=dict)
    library: str | None = "diffusers"
    bytes: int = 0


VAE = {"block_out_channels": [128, 256, 512, 512], "latent_channels": 16, "force_upcast": True}
T5 = {"model_type": "t5", "d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "d_kv": 64,
      "feed_forward_proj": "gated-gelu"}  # fmt: skip


def flux(dtype: str = "BF16") -> list[Part]:
    """FLUX.1-dev by its published sizes."""
    element = 4 if dtype == "F32" else 2
    sizes = {"transformer": 11_901_408_320, "text_encoder_2": 4_762_310_656, "vae": 83_819_683}

    def part(name: str, class_name: str, config: dict[str, Any], library: str = "diffusers") -> Part:
        size = sizes[name] * element
        return Part(name, class_name, config, sizes[name], {dtype: size}, library, size)

    return [
        part("text_encoder_2", "T5EncoderModel", T5, "transformers"),
        part("transformer", "FluxTransformer2DModel", {"guidance_embeds": True}),
        part("vae", "AutoencoderKL", VAE),
        Part("scheduler", "FlowMatchEulerDiscreteScheduler"),
    ]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GB", 24 * GB),
        ("24GiB", 24 * 2**30),
        ("80G", 80 * GB),
        ("512 MiB", 2**29),
        ("1.5kB", 1500),
        ("3000000", 3000000),
    ],
)
def test_sizes_are_read_with_their_units(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text", ["", "GB", "24XB", "-1GB", "0", "0.0001B", "1e9", "24 GB of it", "9" * 40, "nan", "24gb", "24", "80000"]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_bytes(text)
    assert "--device-memory" in str(caught.value)


@pytest.mark.parametrize(
    ("class_name", "config", "spatial", "temporal"),
    [
        ("AutoencoderKL", VAE, 8, 1),
        ("AutoencoderKLFlux2", {}, 8, 1),
        ("AutoencoderDC", {}, 32, 1),
        ("AutoencoderKLWan", {}, 8, 4),
        ("AutoencoderKLWan", {"scale_factor_spatial": 16, "scale_factor_temporal": 4, "patch_size": 2}, 16, 4),
        ("AutoencoderKLHunyuanVideo", {}, 8, 4),
        ("AutoencoderKLLTXVideo", {}, 32, 8),
        ("AutoencoderKLMochi", {}, 8, 6),
        ("AutoencoderKLCogVideoX", {"block_out_channels": [128, 256, 256, 512]}, 8, 4),
        ("AutoencoderKLQwenImage", {}, 8, 4),
    ],
)
def test_an_autoencoders_config_gives_its_compression(
    class_name: str, config: dict[str, Any], spatial: int, temporal: int
) -> None:
    work = latents_of(full_config("diffusers", class_name, config), Workload(height=512, width=768, frames=25))
    assert (work.spatial, work.temporal) == (spatial, temporal)
    assert (work.latent_height, work.latent_width) == (512 // spatial, 768 // spatial)
    assert work.latent_frames == 24 // temporal + 1


def test_defaults_are_the_installed_pipelines_own() -> None:
    parts = [Part("transformer", "WanTransformer3DModel"), Part("vae", "AutoencoderKLWan")]
    work, assumed = default_workload("WanPipeline", parts)
    assert (work.height, work.width, work.frames, work.text_tokens, work.temporal) == (480, 832, 81, 512, 4)
    assert not work.guidance  # its two passes run one after the other
    assert "height 480 (WanPipeline.__call__)" in assumed

    work, assumed = default_workload("StableDiffusionXLPipeline", [
        Part("unet", "UNet2DConditionModel", {"sample_size": 128}), Part("vae", "AutoencoderKL", VAE),
        Part("text_encoder", "CLIPTextModel", {"max_position_embeddings": 77}, library="transformers"),
    ])  # fmt: skip
    assert (work.height, work.width, work.text_tokens, work.guidance, work.upcasts) == (1024, 1024, 77, True, True)
    assert work.denoised.batch == 2 and any("guidance" in line for line in assumed)


def test_a_pipeline_that_takes_its_sizes_from_the_denoiser_is_followed() -> None:
    config = {"sample_height": 60, "sample_width": 90, "sample_frames": 49}
    parts = [Part("transformer", "CogVideoXTransformer3DModel", config), Part("vae", "AutoencoderKLCogVideoX")]
    work, assumed = default_workload("CogVideoXPipeline", parts)
    assert (work.height, work.width, work.frames, work.guidance) == (480, 720, 49, True)
    assert "frames 49 (the denoiser's sample_frames)" in assumed
    assert not any("text tokens" in line for line in assumed)  # nothing here reads a text


def test_what_the_user_says_is_no_assumption() -> None:
    parts = [Part("transformer", "WanTransformer3DModel"), Part("vae", "AutoencoderKLWan")]
    work, assumed = default_workload("WanPipeline", parts, height=720, width=1280, frames=None, dtype="F32")
    assert (work.height, work.width, work.frames, work.dtype) == (720, 1280, 81, "F32")
    assert not any(line.startswith(("height", "width")) for line in assumed)


def test_an_unknown_pipeline_gets_openly_assumed_sizes() -> None:
    work, assumed = default_workload("NobodysPipeline", [])
    assert (work.height, work.width, work.frames) == (1024, 1024, 1)
    assert any("NobodysPipeline is not installed" in line for line in assumed)
    video, assumed = default_workload("NobodysPipeline", [Part("vae", "AutoencoderKLWan")])
    assert video.frames == 81 and any(line.startswith("frames 81") for line in assumed)


def test_stages_hold_weights_and_the_largest_activation() -> None:
    found = estimate(flux(), Workload(), 80 * GB)
    parts = {part.name: part for part in found.components}
    assert set(parts) == {"text_encoder_2", "transformer", "vae"}  # a scheduler holds nothing
    assert {name: part.stage for name, part in parts.items()} == {
        "text_encoder_2": "text encoding", "transformer": "denoising", "vae": "decoding",
    }  # fmt: skip
    assert found.weights == sum(part.weights for part in parts.values())
    for stage in found.stages:
        own = next(part for part in parts.values() if part.stage == stage.stage)
        assert own.activations
        assert stage.resident == found.weights + own.activations
        assert stage.component_offload == own.weights + own.activations
    assert parts["transformer"].blocks == 19 + 38
    assert parts["vae"].blocks == 1  # nothing repeats: layer offload keeps all of it


@pytest.mark.parametrize(
    ("device", "fits", "said"),
    [
        ("48GB", "yes", "all on the device: decoding needs"),
        ("26GB", "with component offload", "with component offload: denoising needs 24.3 GB"),
        ("8GB", "with layer offload", "with layer offload: decoding needs"),
        ("1MB", "no", "all on the device: decoding needs 35.1 GB, too much; "),
        ("1MB", "no", "of 1.0 MB, less 1.0 GB for the device's own"),
        ("2GB", "no", "of 2.0 GB, less 1.0 GB for the device's own; an autoencoder in tiles needs less"),
    ],
)
def test_the_verdict_names_the_first_way_that_fits(device: str, fits: str, said: str) -> None:
    found = estimate(flux(), Workload(), parse_bytes(device))
    assert found.fits == fits and said in found.reason
    assert found.left_out == ()


def test_the_verdict_leaves_the_device_its_own() -> None:
    need = max(stage.resident for stage in estimate(flux(), Workload()).stages)
    assert estimate(flux(), Workload(), need + RESERVE).fits == "yes"
    assert estimate(flux(), Workload(), need + RESERVE - 1).fits == "with component offload"
    assert estimate(flux(), Workload()).fits == "unknown"


def test_a_class_without_a_formula_is_said_openly() -> None:
    assert formula_of("NobodysTransformer") is None
    size = 4 * GB
    unknown = Part("transformer", "NobodysTransformer", {}, size // 2, {"BF16": size}, "diffusers", size)
    known = [part for part in flux() if part.name != "transformer"]
    found = estimate([unknown, *known], Workload(), 48 * GB)
    part = next(part for part in found.components if part.name == "transformer")
    assert part.activations is None and "no formula for NobodysTransformer" in part.note
    assert found.fits == "unknown" and found.left_out == ("transformer",)
    assert "leaves out the activations of transformer" in found.reason
    assert estimate([unknown, *known], Workload(), 2 * GB).fits == "no"  # too much even without what is left out

    encoder = Part("text_encoder", "NobodysEncoder", {}, size // 2, {"BF16": size}, "transformers", size)
    found = estimate([encoder, *flux()], Workload(), 80 * GB)
    assert found.fits == "yes" and "leaves out the activations of text_encoder" in found.reason


HOSTILE = [None, "many", [], [1] * 10**5, {}, -(10**3), 10**400, float("nan"), float("inf"), 10**13, "x" * 10**6]


@pytest.mark.parametrize("value", HOSTILE, ids=lambda value: type(value).__name__ + repr(value)[:6])
@pytest.mark.parametrize("class_name", ["FluxTransformer2DModel", "WanTransformer3DModel", "AutoencoderKL"])
def test_a_config_that_does_not_tell_is_no_crash(class_name: str, value: Any) -> None:
    keys = ("num_attention_heads", "patch_size", "in_channels", "ffn_dim", "block_out_channels", "latent_channels",
            "num_layers", "spatio_temporal_scaling", "temperal_downsample", "spatial_expansions", "sample_size",
            "scale_factor_spatial", "force_upcast")  # fmt: skip
    part = Part("vae", class_name, dict.fromkeys(keys, value), 10, {"BF16": 20}, "diffusers", 20)
    (found,) = estimate([part], Workload(), 80 * GB).components
    assert found.activations is None and "its config does not say" in found.note
    work, _ = default_workload("WanPipeline", [part, replace(part, name="transformer")])
    assert 0 < work.latent_height <= work.height and 0 < work.latent_frames <= work.frames


@pytest.mark.parametrize("value", ["many", [1, 2], (1, 2)])
def test_no_formula_multiplies_text_or_lists(value: Any) -> None:
    fact = facts_of({"key": value})["key"]
    assert fact == (value if isinstance(value, str) else tuple(value))
    for multiply in (lambda: 3 * fact, lambda: fact * 3):
        with pytest.raises(TypeError):
            multiply()


@pytest.mark.parametrize(
    "wrong", [{"dtype": "INT4"}, {"height": 0}, {"width": -8}, {"frames": 0}, {"batch": 10**9}, {"text_tokens": -1}]
)
def test_an_impossible_workload_is_a_usage_error(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Workload(**wrong)


def test_weights_take_the_workloads_dtype_and_quantised_ones_stay() -> None:
    sizes = {"F32": 400, "BF16": 20, "F8_E4M3": 7, "I32": 12}
    part = Part("transformer", "NobodysTransformer", {}, 120, sizes, "diffusers", 439)
    assert estimate([part], Workload(dtype="BF16")).weights == 200 + 20 + 7 + 12
    assert estimate([part], Workload(dtype="F32")).weights == 400 + 40 + 7 + 12


def test_parameters_that_stay_in_float32_are_counted_so() -> None:
    wo = 24 * 4096 * 10240
    by_dtype = {dtype: estimate(flux(), Workload(dtype=dtype)).components[0] for dtype in ("BF16", "F16")}
    assert by_dtype["F16"].weights - by_dtype["BF16"].weights == 2 * wo
    assert "1007 million parameters stay in float32" in by_dtype["F16"].note


def test_an_autoencoder_that_is_upcast_decodes_in_float32() -> None:
    plain, upcast = (
        next(part for part in estimate(flux("F16"), Workload(dtype="F16", upcasts=up)).components if part.name == "vae")
        for up in (False, True)
    )
    assert upcast.weights == 2 * plain.weights and upcast.activations == 2 * (plain.activations or 0)
    assert "force_upcast" in upcast.note


def test_a_prompt_is_cut_to_what_its_encoder_has_positions_for() -> None:
    clip = Part("text_encoder", "CLIPTextModel", {"model_type": "clip_text_model", "max_position_embeddings": 77,
                "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
                1000, {"BF16": 2000}, "transformers", 2000)  # fmt: skip
    short, long = (estimate([clip], Workload(text_tokens=tokens)).components[0].activations for tokens in (77, 512))
    assert short and short == long


def test_guidance_doubles_the_denoiser_alone() -> None:
    one, two = (estimate(flux(), replace(Workload(), guidance=guided)).components for guided in (False, True))
    grown = {a.name: (b.activations or 0) / (a.activations or 1) for a, b in zip(one, two, strict=True)}
    assert grown["transformer"] == pytest.approx(2, rel=0.02)
    assert grown["text_encoder_2"] == grown["vae"] == 1


def test_an_estimate_survives_json() -> None:
    found = estimate(flux(), Workload(), 24 * GB, ("height 1024 (assumed)",))
    document = json.loads(json.dumps(found.to_json()))
    assert Memory.from_json(document) == found
    for spoil in (
        {"fits": None, "more": 1},
        {**document, "stages": [{"stage": "denoising"}]},
        {k: v for k, v in document.items() if k != "reserve"},
    ):
        with pytest.raises(BadInputError):
            Memory.from_json(spoil)
