"""The native Qwen-Image pipelines against diffusers' on the same folders, step by step."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from conversions.qwen_image.case import diffusers_port
from conversions.qwen_image.model import QwenImageTransformer
from conversions.qwen_image.pipeline import EntryClass
from conversions.qwen_image.pipeline_base import QwenImagePipelineConfig
from conversions.qwen_image.pipeline_edit import QwenImageEditPipelineConfig, QwenImageEditPlusPipelineConfig, _sides
from porter.core.errors import UsageError
from runtime.pipeline import ComposedPipelineBase
from runtime.registry import load
from runtime.request import Req
from tests.conversions.qwen_image.ports import write_port

PROMPT, NEGATIVE = "a large red circle on the left, on a blue background", "green"
ROUNDING = 5e-6  # absolute
AREA = 128 * 128  # pixels of given pictures here, instead of a million
NAMES = [cls.pipeline_name for cls in EntryClass]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[ComposedPipelineBase, Any]]:
    """Pipeline class -> ours and diffusers' of one port; that for several pictures is of the 2511 variant."""
    found: dict[str, Any] = {}
    for name in NAMES:
        more = {"zero_cond_t": True} if "Plus" in name else {}
        port = write_port(tmp_path_factory.mktemp("ports") / name, name, **more)
        found[name] = load(port, dtype=torch.float32, device="cpu"), diffusers_port(port, torch.float32)
        config = found[name][0].config
        if isinstance(config, QwenImageEditPipelineConfig):
            config.encoded_area, config.seen_area = AREA, AREA if config.most_pictures else AREA // 4
    return found


@pytest.fixture
def small_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers' pipelines with the areas above; one has them as constants, one within a call."""
    edit = importlib.import_module("diffusers.pipelines.qwenimage.pipeline_qwenimage_edit")
    plus = importlib.import_module("diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus")
    for module in (edit, plus):
        whole = module.calculate_dimensions
        monkeypatch.setattr(
            module, "calculate_dimensions", lambda area, ratio, f=whole: f(AREA if area == 1024 * 1024 else area, ratio)
        )
    monkeypatch.setattr(plus, "VAE_IMAGE_SIZE", AREA)
    monkeypatch.setattr(plus, "CONDITION_IMAGE_SIZE", AREA // 4)


def picture(seed: int, width: int, height: int) -> Image.Image:
    levels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(levels)


PICTURES = [picture(0, 40, 56), picture(1, 90, 48)]


def run_theirs(pipe: Any, seeds: list[int], **options: Any) -> tuple[list[Tensor], Tensor]:
    """(latents after each step, image (B, 3, H, W) in [0, 1])."""
    steps: list[Tensor] = []

    def after(pipe: Any, step: int, t: Any, kept: dict[str, Tensor]) -> dict[str, Tensor]:
        steps.append(kept["latents"].clone())
        return kept

    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    defaults = {"height": 64, "width": 96, "true_cfg_scale": 1.0, "callback_on_step_end": after}
    return steps, pipe(**defaults | options, generator=generators, output_type="pt").images


def run_ours(pipeline: ComposedPipelineBase, **fields: Any) -> tuple[dict[str, dict[str, Tensor]], Req]:
    """(tensors by tap, finished request)."""
    seen: dict[str, dict[str, Tensor]] = {}
    tap = lambda name, tensors: seen.update({name: {k: t.clone() for k, t in tensors.items()}})  # noqa: E731
    return seen, pipeline.generate(**{"height": 64, "width": 96} | fields, taps=[tap])


def compare(pair: tuple[ComposedPipelineBase, Any], seeds: list[int], **options: Any) -> Req:
    """Every step, the schedule and the picture of the same request on both sides."""
    native, theirs = pair
    ours = {"image": given if isinstance(given := options.get("image"), list | None) else [given]}
    seen, batch = run_ours(native, **options | ours | {"seed": seeds[0]})
    steps, image = run_theirs(theirs, seeds, **{k: v for k, v in options.items() if k != "num_images"})
    assert len(steps) == options["num_inference_steps"]
    for i, latents in enumerate(steps):
        assert (seen[f"denoising.step.{i}"]["latents"] - latents).abs().max() < ROUNDING, f"step {i}"
    assert batch.output is not None and batch.output.shape == image.shape
    assert (batch.output - image).abs().max() < ROUNDING
    assert torch.equal(seen["timestep_preparation"]["sigmas"], theirs.scheduler.sigmas)
    assert float(image.std()) > 1e-2  # the comparison is not of two flat pictures
    return batch


GUIDED = {"negative_prompt": NEGATIVE, "true_cfg_scale": 4.0}
CASES = {
    "plain": {"num_inference_steps": 3},
    "guided": {"num_inference_steps": 3, **GUIDED},
    "other size": {"num_inference_steps": 2, "height": 96, "width": 32},
    "prompts of different lengths": {"num_inference_steps": 2, "prompt": [PROMPT, "", "two squares"], **GUIDED},
    "short": {"num_inference_steps": 2, "max_sequence_length": 40},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_text_to_image_equals_diffusers(pairs: Any, options: dict[str, Any]) -> None:
    options = {"prompt": PROMPT} | options
    count = len(options["prompt"]) if isinstance(options["prompt"], list) else 1
    batch = compare(pairs["QwenImagePipeline"], [3 + i for i in range(count)], **options)
    assert (batch.prompt_masks[0] is None) == (count == 1)


EDITS = {
    "plain": {"num_inference_steps": 2},
    "guided": {"num_inference_steps": 2, **GUIDED},
    "its own size": {"num_inference_steps": 2, "height": None, "width": None},
}


@pytest.mark.parametrize("options", EDITS.values(), ids=EDITS)
@pytest.mark.parametrize("name", NAMES[1:])
def test_editing_equals_diffusers(pairs: Any, small_pictures: None, name: str, options: dict[str, Any]) -> None:
    given = PICTURES if "Plus" in name else PICTURES[0]
    batch = compare(pairs[name], [3], prompt=PROMPT, image=given, **options)
    if "height" in options:
        last = given[-1] if isinstance(given, list) else given
        assert (batch.height, batch.width) == _sides(last, AREA) != (64, 96)


def test_embeddings_and_noise_equal_diffusers_in_every_bit(pairs: Any, small_pictures: None) -> None:
    native, theirs = pairs["QwenImagePipeline"]
    seen, batch = run_ours(native, prompt=[PROMPT, "short"], seed=11, num_inference_steps=2)
    with torch.no_grad():
        tokens, mask = theirs.encode_prompt([PROMPT, "short"])
        generators = [torch.Generator().manual_seed(seed) for seed in (11, 12)]
        noise = theirs.prepare_latents(2, 4, 64, 96, torch.float32, "cpu", generators)
    assert torch.equal(seen["text_encoding"]["prompt_embeds.0"], tokens)
    assert torch.equal(batch.prompt_masks[0], mask.bool())  # type: ignore[arg-type]
    assert torch.equal(seen["latent_preparation"]["latents"], noise)

    native, theirs = pairs["QwenImageEditPlusPipeline"]
    config = native.config
    assert isinstance(config, QwenImageEditPlusPipelineConfig)
    seen, batch = run_ours(native, prompt=PROMPT, image=PICTURES, seed=11, num_inference_steps=2)
    encoded = [theirs.image_processor.preprocess(p, *_sides(p, AREA)).unsqueeze(2) for p in PICTURES]
    with torch.no_grad():
        tokens, mask = theirs.encode_prompt(PROMPT, config.seen(batch))
        _, latents = theirs.prepare_latents(encoded, 1, 4, 64, 96, torch.float32, "cpu", torch.Generator())
    assert torch.equal(seen["text_encoding"]["prompt_embeds.0"], tokens)
    assert torch.equal(batch.image_latents, latents)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NAMES)
def test_several_images_use_following_seeds(pairs: Any, small_pictures: None, name: str) -> None:
    options = {"prompt": PROMPT, "num_inference_steps": 2, "image": PICTURES[:1] if "Edit" in name else None}
    _, batch = run_ours(pairs[name][0], **options, seed=5, num_images=2)
    _, second = run_ours(pairs[name][0], **options, seed=6)
    assert batch.latents is not None and second.latents is not None
    assert (batch.latents[1:] - second.latents).abs().max() < ROUNDING
    assert (batch.latents[0] - batch.latents[1]).abs().max() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_prompts_of_a_batch_equal_each_alone(pairs: Any, name: str) -> None:
    """Editing too, which diffusers does one prompt at a time."""
    options = GUIDED | {"num_inference_steps": 2, "image": PICTURES[:1] if "Edit" in name else None}
    _, batch = run_ours(pairs[name][0], **options, prompt=[PROMPT, "red"], seed=5)
    for i, prompt in enumerate((PROMPT, "red")):
        _, alone = run_ours(pairs[name][0], **options, prompt=prompt, seed=5 + i)
        assert batch.latents is not None and alone.latents is not None
        assert (batch.latents[i] - alone.latents[0]).abs().max() < ROUNDING


def test_seed_prompt_and_pictures_all_matter(pairs: Any) -> None:
    native = pairs["QwenImageEditPlusPipeline"][0]
    plain: dict[str, Any] = {"prompt": PROMPT, "seed": 1, "num_inference_steps": 2, "image": PICTURES}
    first = run_ours(native, **plain)[1].output
    again = run_ours(native, **plain)[1].output
    assert first is not None and torch.equal(first, again)  # type: ignore[arg-type]
    for change in ({"seed": 2}, {"prompt": "two green squares"}, {"image": PICTURES[::-1]}, {"image": PICTURES[:1]}):
        other = run_ours(native, **plain | change)[1].output
        assert (first - other).abs().max() > 1e-4, change


def test_exact_steps_equal_diffusers_in_every_bit_of_bfloat16(tmp_path: Path) -> None:
    port = write_port(tmp_path / "tiny")
    native = load(port, dtype=torch.bfloat16, device="cpu", quality="exact")
    options = {"prompt": [PROMPT, "red"], "num_inference_steps": 2, **GUIDED}
    seen, batch = run_ours(native, **options, seed=3)
    steps, image = run_theirs(diffusers_port(port, torch.bfloat16), [3, 4], **options)
    for i, latents in enumerate(steps):
        assert torch.equal(seen[f"denoising.step.{i}"]["latents"], latents), i
    assert batch.output is not None and (batch.output - image).abs().max() < 0.1


def test_sizes_of_pictures_are_those_of_diffusers() -> None:
    edit = importlib.import_module("diffusers.pipelines.qwenimage.pipeline_qwenimage_edit")
    plus = importlib.import_module("diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus")
    config = QwenImageEditPlusPipelineConfig()
    assert (config.encoded_area, config.seen_area) == (plus.VAE_IMAGE_SIZE, plus.CONDITION_IMAGE_SIZE)
    for width, height in ((1, 1), (3, 2), (640, 481), (17, 100), (1333, 77)):
        width_there, height_there, _ = edit.calculate_dimensions(1024 * 1024, width / height)
        assert _sides(Image.new("RGB", (width, height)), 1024 * 1024) == (height_there, width_there)


def test_diffusers_leaves_out_where_the_tokens_of_pictures_stand(pairs: Any, small_pictures: None) -> None:
    """Once this fails, what `diffusers_port` mends is mended there: https://github.com/huggingface/diffusers/issues/14194"""
    theirs = pairs["QwenImageEditPipeline"][1]
    wide = picture(2, 100, 50)
    with torch.no_grad():
        mended, _ = theirs.encode_prompt(PROMPT, wide)
        hooks, theirs.text_encoder._forward_pre_hooks = theirs.text_encoder._forward_pre_hooks, {}
        plain, _ = theirs.encode_prompt(PROMPT, wide)
        theirs.text_encoder._forward_pre_hooks = hooks
    assert (mended - plain).abs().max() > 1e-4


@contextmanager
def planted(pipeline: ComposedPipelineBase, fault: str) -> Iterator[None]:
    """One of the known causes of noise, in the pipeline's own config."""
    config: Any = pipeline.config
    patch = pytest.MonkeyPatch()
    if fault == "template":
        patch.setattr(config, "dropped", 33)
    elif fault == "guidance":
        patch.setattr(config, "combine_guidance", lambda p, n, scale, batch: n + scale * (p - n))
    elif fault == "schedule shift":
        patch.setattr(config, "prepare_mu", lambda batch: 0.5)
    elif fault == "vae statistics":
        mean, std = config.latent_statistics()
        patch.setattr(config, "latent_statistics", lambda: (mean, std.flip(0)))
    elif fault == "packing":
        right = config.maybe_pack_latents
        patch.setattr(config, "maybe_pack_latents", lambda x, batch: right(x.mT.contiguous().mT.roll(1, -1), batch))
    elif fault == "timestep":
        patch.setattr(config, "scale_timestep", lambda t, batch: t / 999)
    elif fault == "mask":
        right = config._conditions
        without = lambda *given: right(*given) | {"encoder_hidden_states_mask": None}  # noqa: E731
        patch.setattr(config, "_conditions", without)
    elif fault == "rotary":
        shapes = config.image_shapes
        patch.setattr(config, "image_shapes", lambda batch: [(f, w, h) for f, h, w in shapes(batch)])
    elif fault == "picture order":
        right = config.prepare_model_input
        patch.setattr(config, "prepare_model_input", lambda x, batch: right(x, batch).roll(1, 1))
    elif fault == "labels":
        patch.setattr(config, "label", "Image {}: <|vision_start|><|image_pad|><|vision_end|>")
    try:
        yield
    finally:
        patch.undo()


FAULTS = ["template", "guidance", "schedule shift", "vae statistics", "packing", "timestep", "mask", "rotary"]


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_seen(pairs: Any, fault: str) -> None:
    pair = pairs["QwenImagePipeline"]
    options = {"prompt": [PROMPT, "red"], "num_inference_steps": 3, **GUIDED}
    with planted(pair[0], fault), pytest.raises(AssertionError):
        compare(pair, [3, 4], **options)
    compare(pair, [3, 4], **options)


@pytest.mark.parametrize("fault", ["picture order", "labels", "vae statistics"])
def test_planted_faults_of_editing_are_seen(pairs: Any, small_pictures: None, fault: str) -> None:
    pair = pairs["QwenImageEditPlusPipeline"]
    with planted(pair[0], fault), pytest.raises(AssertionError):
        compare(pair, [3], prompt=PROMPT, image=PICTURES, num_inference_steps=2)


# --- warnings and refusals -------------------------------------------------------------------------------------------


def test_a_prompt_that_does_not_fit_is_reported(pairs: Any) -> None:
    native = pairs["QwenImagePipeline"][0]
    _, batch = run_ours(native, prompt="a red circle and " * 80, num_inference_steps=2)
    assert [line.split(" tokens")[0] for line in batch.warnings] == ["text_encoder reads 512 of the prompt's 1488"]
    assert batch.prompt_embeds[0].shape[1] == 512


REFUSED = [
    ("QwenImagePipeline", {"max_sequence_length": 1025}, "max_sequence_length"),
    ("QwenImagePipeline", {"image": PICTURES}, "image"),
    ("QwenImagePipeline", {"height": 72}, "height"),
    ("QwenImagePipeline", {"num_inference_steps": 1}, "num_inference_steps"),
    ("QwenImageEditPipeline", {"image": PICTURES}, "image"),
    ("QwenImageEditPipeline", {}, "image"),
    ("QwenImageEditPipeline", {"image": PICTURES[:1], "prompt": "like <|image_pad|>"}, "prompt"),
    ("QwenImageEditPipeline", {"image": PICTURES[:1], **GUIDED, "negative_prompt": ["<|video_pad|>"]}, "prompt"),
    ("QwenImageEditPipeline", {"image": ["a.png"]}, "image"),
    ("QwenImagePipeline", {"max_sequence_length": "many"}, "max_sequence_length"),
    ("QwenImageEditPlusPipeline", {"image": [picture(0, 2000, 1)]}, "image"),
    ("QwenImageEditPlusPipeline", {"image": PICTURES, "max_sequence_length": 100}, "max_sequence_length"),
]


@pytest.mark.parametrize(("name", "options", "named"), REFUSED, ids=lambda v: v if isinstance(v, str) else "")
def test_what_cannot_be_made_is_refused_by_name(pairs: Any, name: str, options: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        run_ours(pairs[name][0], **{"prompt": PROMPT, "num_inference_steps": 2} | options)


def test_defaults_are_those_of_the_release(pairs: Any) -> None:
    native = pairs["QwenImagePipeline"][0]
    assert isinstance(native.config, QwenImagePipelineConfig)
    assert isinstance(native.modules["transformer"], QwenImageTransformer)
    assert (native.sampling_params.num_inference_steps, native.sampling_params.true_cfg_scale) == (50, 4.0)
    assert native.config.default_size(Req()) == (1024, 1024)
