"""The native Stable Diffusion 3 pipeline against diffusers' on the same folder, step by step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conversions.sd3.model import SD3Transformer
from conversions.sd3.pipeline import SD3Pipeline, SD3PipelineConfig, SD3TextEncodingStage
from porter.core.errors import UsageError
from runtime.registry import entry_class, load, model_configs
from runtime.request import Req
from tests.conversions.sd3.ports import LARGE_35, MEDIUM, MEDIUM_35, diffusers_pipeline, write_port

PROMPT = "a large red circle on the left, on a blue background"
ROUNDING = 2e-5  # absolute, of latents up to 5; two halves in one batch already differ from one after the other
Sides = tuple[SD3Pipeline, Any]


@pytest.fixture(scope="module")
def ports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("ports")
    kinds: dict[str, dict[str, Any]] = {
        "medium": {"variant": MEDIUM},
        "3.5 large": {"variant": LARGE_35, "t5": False},
        "3.5 medium": {"variant": MEDIUM_35, "use_dynamic_shifting": True, "base_image_seq_len": 16},
    }
    return {name: write_port(folder / name.replace(" ", "-"), **kind) for name, kind in kinds.items()}


@pytest.fixture(scope="module")
def sides(ports: dict[str, Path]) -> dict[str, Sides]:
    """Port -> our pipeline and diffusers'."""
    found = {}
    for name, port in ports.items():
        native = load(port, dtype=torch.float32, device="cpu")
        assert isinstance(native, SD3Pipeline)
        found[name] = native, diffusers_pipeline(port)
    return found


def run_theirs(pipe: Any, seeds: list[int], **options: Any) -> tuple[list[Tensor], Tensor]:
    """(latents after each step, image (B, 3, H, W) in [0, 1])."""
    steps: list[Tensor] = []

    def after(pipe: Any, step: int, t: Any, kept: dict[str, Tensor]) -> dict[str, Tensor]:
        steps.append(kept["latents"].clone())
        return kept

    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    defaults = {"max_sequence_length": 32}
    image = pipe(**defaults | options, generator=generators, output_type="pt", callback_on_step_end=after).images
    return steps, image


def run_ours(pipeline: SD3Pipeline, **fields: Any) -> tuple[dict[str, dict[str, Tensor]], Req]:
    """(tensors by tap, finished request)."""
    seen: dict[str, dict[str, Tensor]] = {}
    tap = lambda name, tensors: seen.update({name: {k: t.clone() for k, t in tensors.items()}})  # noqa: E731
    return seen, pipeline.generate(**{"max_sequence_length": 32} | fields, taps=[tap])


SKIP = {"skip_guidance_layers": [1], "skip_layer_guidance_stop": 0.8, "skip_layer_guidance_scale": 1.5}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {  # port, options of both, settings of the model
    "medium": ("medium", {"num_inference_steps": 3, "guidance_scale": 7.0}, {}),
    "3.5 large, no T5": ("3.5 large", {"num_inference_steps": 3, "guidance_scale": 3.5}, {}),
    "3.5 medium, shifted by size": ("3.5 medium", {"num_inference_steps": 3, "guidance_scale": 4.5}, {}),
    "no guidance": ("medium", {"num_inference_steps": 2, "guidance_scale": 1.0}, {}),
    "negative": ("medium", {"num_inference_steps": 2, "guidance_scale": 4.0, "negative_prompt": "green"}, {}),
    "size": ("3.5 medium", {"num_inference_steps": 2, "guidance_scale": 4.0, "height": 48, "width": 96}, {}),
    "sigmas": ("medium", {"sigmas": [1.0, 0.7, 0.2], "num_inference_steps": 3, "guidance_scale": 4.0}, {}),
    "skip layers": ("3.5 medium", {"num_inference_steps": 5, "guidance_scale": 4.5}, SKIP),
}


@pytest.mark.parametrize("case", CASES)
def test_every_step_and_the_image_equal_diffusers(sides: dict[str, Sides], case: str) -> None:
    port, options, settings = CASES[case]
    native, theirs = sides[port]
    seen, batch = run_ours(native, prompt=PROMPT, seed=3, extra=settings, **options)
    steps, image = run_theirs(theirs, [3], prompt=PROMPT, **options, **settings)
    assert len(steps) == options["num_inference_steps"]
    for i, latents in enumerate(steps):
        assert (seen[f"denoising.step.{i}"]["latents"] - latents).abs().max() < ROUNDING, f"step {i}"
    assert batch.output is not None and batch.warnings == []
    assert (batch.output - image).abs().max() < ROUNDING
    assert torch.equal(seen["timestep_preparation"]["sigmas"], theirs.scheduler.sigmas)
    assert float(image.std()) > 1e-2  # the comparison is not of two flat pictures


@pytest.mark.parametrize("port", ["medium", "3.5 large", "3.5 medium"])
def test_exact_without_guidance_is_equal_in_every_bit(
    sides: dict[str, Sides], port: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    native, theirs = sides[port]
    options: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": 2, "guidance_scale": 1.0}
    monkeypatch.setattr(native, "quality", "exact")
    seen, batch = run_ours(native, seed=4, **options)
    steps, image = run_theirs(theirs, [4], **options)
    assert all(torch.equal(seen[f"denoising.step.{i}"]["latents"], latents) for i, latents in enumerate(steps))
    assert torch.equal(batch.output, image)  # type: ignore[arg-type]


@pytest.mark.parametrize("port", ["medium", "3.5 large"])
def test_text_embeddings_and_noise_equal_diffusers(sides: dict[str, Sides], port: str) -> None:
    native, theirs = sides[port]
    given: dict[str, Tensor] = {}
    handle = native.modules["transformer"].register_forward_pre_hook(
        lambda module, args, kwargs: given.update(kwargs) if not given else None, with_kwargs=True
    )
    seen, _ = run_ours(native, prompt=PROMPT, seed=11, num_inference_steps=1)
    handle.remove()
    with torch.no_grad():
        tokens, _, pooled, _ = theirs.encode_prompt(PROMPT, None, None, max_sequence_length=32)
    noise = theirs.prepare_latents(1, 4, 64, 64, torch.float32, "cpu", [torch.Generator().manual_seed(11)])
    assert torch.equal(given["encoder_hidden_states"], tokens) and tokens.shape == (1, 64, 96)
    assert torch.equal(given["pooled_projections"], pooled)
    assert torch.equal(seen["latent_preparation"]["latents"], noise)


def test_several_prompts_and_images_equal_diffusers_and_each_alone(sides: dict[str, Sides]) -> None:
    native, theirs = sides["medium"]
    prompts = [PROMPT, "a dot"]
    options: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 4.0}
    _, batch = run_ours(native, prompt=prompts, negative_prompt=["", "a long green line"], seed=5, **options)
    _, image = run_theirs(theirs, [5, 6], prompt=prompts, negative_prompt=["", "a long green line"], **options)
    _, alone = run_ours(native, prompt="a dot", negative_prompt="a long green line", seed=6, **options)
    _, twice = run_ours(native, prompt=PROMPT, seed=5, num_images=2, **options)
    assert batch.output is not None and alone.output is not None and twice.output is not None
    assert (batch.output - image).abs().max() < ROUNDING
    assert (batch.output[1:] - alone.output).abs().max() < ROUNDING
    assert (batch.output[:1] - twice.output[:1]).abs().max() < ROUNDING
    assert (twice.output[0] - twice.output[1]).abs().max() > 1e-2


def test_guidance_seed_prompt_and_skipped_layers_all_matter(sides: dict[str, Sides]) -> None:
    native, _ = sides["3.5 medium"]
    plain: dict[str, Any] = {"prompt": PROMPT, "seed": 1, "guidance_scale": 3.5, "num_inference_steps": 3}
    first = run_ours(native, **plain)[1].output
    assert first is not None
    again = run_ours(native, **plain)[1].output
    assert torch.equal(first, again)  # type: ignore[arg-type]
    changes = {"guidance_scale": 1.0}, {"seed": 2}, {"prompt": "two green squares"}, {"extra": SKIP}
    for change in (*changes, {"negative_prompt": "green"}):
        other = run_ours(native, **plain | change)[1].output
        assert (first - other).abs().max() > 1e-3, change  # type: ignore[operator]


def test_what_would_have_no_effect_is_said(sides: dict[str, Sides]) -> None:
    native, _ = sides["medium"]
    _, batch = run_ours(native, prompt=PROMPT, guidance_scale=1.0, num_inference_steps=1, extra=SKIP)
    assert batch.warnings == ["skip_guidance_layers is ignored: guidance_scale 1 is not above 1"]
    _, batch = run_ours(native, prompt="a red circle and " * 30, num_inference_steps=1)
    cut = [line.split()[0] for line in batch.warnings]
    assert sorted(cut) == ["text_encoder", "text_encoder_2", "text_encoder_3"]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"height": 104}, "height"),
        ({"width": 60}, "width"),
        ({"max_sequence_length": 513}, "max_sequence_length"),
        ({"guidance_scale": 1.0, "negative_prompt": "green"}, "guidance_scale"),
        ({"extra": {"skip_guidance_layers": [3]}}, "skip_guidance_layers"),
        ({"extra": {"skip_guidance_layers": "1"}}, "skip_guidance_layers"),
        ({"extra": {"skip_layer_guidance_stop": "late"}}, "skip_layer_guidance_stop"),
        ({"extra": {"skip_layers": [1]}}, "skip_layers"),
    ],
    ids=str,
)
def test_a_request_that_cannot_be_met_is_refused_by_field(
    sides: dict[str, Sides], fields: dict[str, Any], named: str
) -> None:
    with pytest.raises(UsageError, match=f"^{named}: not what InputValidationStage needs"):
        sides["3.5 medium"][0].generate(PROMPT, **fields)


def test_released_models_are_told_apart() -> None:
    entry_class("StableDiffusion3Pipeline")
    found = {}
    for name, transformer in (("medium", MEDIUM), ("large", LARGE_35), ("medium 3.5", MEDIUM_35)):
        model = model_configs("StableDiffusion3Pipeline", {"transformer": transformer}).sampling_param_cls()
        found[name] = model.num_inference_steps, model.guidance_scale
    assert found == {"medium": (28, 7.0), "large": (28, 3.5), "medium 3.5": (40, 4.5)}
    turbo = {"transformer": {**LARGE_35, "_name_or_path": "stabilityai/stable-diffusion-3.5-large-turbo"}}
    assert model_configs("StableDiffusion3Pipeline", turbo).sampling_param_cls().num_inference_steps == 4


@pytest.mark.parametrize(
    "fault",
    ["vae shift", "schedule shift", "guidance", "padding", "pooled", "last hidden state", "positions", "skip layers"],
)
def test_planted_faults_are_seen(sides: dict[str, Sides], fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above is sharp enough for the known causes of noise."""
    config, (native, theirs) = SD3PipelineConfig, sides["3.5 medium"]
    right = config._conditions
    if fault == "vae shift":
        monkeypatch.setattr(config, "get_decode_scale_and_shift", lambda self: (0.7, 0.0))
    elif fault == "schedule shift":
        monkeypatch.setattr(config, "prepare_mu", lambda self, batch: 0.5)
    elif fault == "guidance":
        monkeypatch.setattr(config, "combine_guidance", lambda self, p, n, scale, batch: p + scale * (p - n))
    elif fault == "padding":
        left = lambda *a: right(*a) | {"encoder_hidden_states": right(*a)["encoder_hidden_states"].roll(24, 2)}  # noqa: E731
        monkeypatch.setattr(config, "_conditions", left)
    elif fault == "pooled":
        other = lambda *a: right(*a) | {"pooled_projections": right(*a)["pooled_projections"].roll(24, 1)}  # noqa: E731
        monkeypatch.setattr(config, "_conditions", other)
    elif fault == "last hidden state":
        encode = SD3TextEncodingStage.encode

        def last(self: Any, texts: list[str], batch: Req, config: Any) -> Any:
            found = encode(self, texts, batch, config)
            ids = self.tokenize(texts, config.text_encoders[0], batch)
            found.tokens[0] = self.encoders["text_encoder"](ids).last_hidden_state
            return found

        monkeypatch.setattr(SD3TextEncodingStage, "encode", last)
    elif fault == "positions":
        monkeypatch.setattr(
            config, "get_freqs_cis", lambda self, batch, model, device: model.pos_embed.pos_embed[:, :64]
        )
    else:
        monkeypatch.setattr(SD3Transformer, "forward", _deaf(SD3Transformer.forward))
    options: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": 3, "guidance_scale": 4.5}
    _, batch = run_ours(native, seed=3, extra=SKIP, **options)
    _, image = run_theirs(theirs, [3], **options, **SKIP)
    assert batch.output is not None
    assert (batch.output - image).abs().max() > 10 * ROUNDING


def _deaf(forward: Any) -> Any:
    """A forward that runs the layers it was told to skip."""
    return lambda self, skip_layers=(), **given: forward(self, **given)
