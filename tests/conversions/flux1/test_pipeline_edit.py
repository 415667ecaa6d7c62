"""The native Kontext and Fill pipelines against diffusers' on the same folder, step by step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from conversions.flux1 import pipeline_fill, pipeline_kontext
from conversions.flux1.pipeline_fill import FillLatentPreparationStage, FluxFillPipeline, FluxFillPipelineConfig
from conversions.flux1.pipeline_kontext import PREFERRED, FluxKontextPipeline, FluxKontextPipelineConfig
from porter.core.errors import BadInputError, UsageError
from runtime.loader import quiet_libraries
from runtime.registry import load
from runtime.request import Req
from runtime.stages import LatentPreparationStage
from tests.conversions.flux1.test_pipeline import PROMPT, ROUNDING, run_ours
from tests.runtime.ports import write_port

KONTEXT, FILL = "FluxKontextPipeline", "FluxFillPipeline"
SIZE = {"height": 48, "width": 80}
AREA = {"max_area": 48 * 80}  # diffusers' Kontext keeps the size that is asked for where it has this area


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Nothing in it is symmetric."""
    image = Image.new("RGB", (width, height), (200, 180, 40))
    draw = ImageDraw.Draw(image)
    draw.ellipse((width // 8, height // 6, width // 2, height // 2), (20, 60, 220))
    draw.line((0, height, width, height // 3), (240, 240, 240), 3)
    return image.convert(mode)


def mask(width: int, height: int, mode: str = "L") -> Image.Image:
    image = Image.new("L", (width, height))
    draw = ImageDraw.Draw(image)
    draw.rectangle((width // 3, height // 4, width // 5 * 4, height), 255)
    draw.ellipse((0, 0, width // 4, height // 4), 120)  # nearer to black
    return image.convert(mode)


def reference(folder: Path, name: str, dtype: torch.dtype = torch.float32) -> Any:
    with quiet_libraries():
        pipe = getattr(diffusers, name).from_pretrained(folder, low_cpu_mem_usage=False, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def ports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("ports")
    return {name: write_port(folder / name, pipeline=name, filled=name == FILL) for name in (KONTEXT, FILL)}


@pytest.fixture(scope="module")
def native(ports: dict[str, Path]) -> dict[str, Any]:
    return {name: load(path, dtype=torch.float32, device="cpu") for name, path in ports.items()}


@pytest.fixture(scope="module")
def theirs(ports: dict[str, Path]) -> dict[str, Any]:
    return {name: reference(path, name) for name, path in ports.items()}


def run_theirs(pipe: Any, seeds: list[int], **options: Any) -> tuple[list[Tensor], Tensor, Tensor]:
    """(latents after each step, what the transformer got in the first, image (B, 3, H, W) in [0, 1])."""
    steps: list[Tensor] = []
    given: list[Tensor] = []

    def after(pipe: Any, step: int, t: Any, kept: dict[str, Tensor]) -> dict[str, Tensor]:
        steps.append(kept["latents"].clone())
        return kept

    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    hook = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: given.append(kwargs["hidden_states"]), with_kwargs=True
    )
    defaults = {"max_sequence_length": 32, "prompt": PROMPT, "num_inference_steps": 2}
    try:
        image = pipe(**defaults | options, generator=generators, output_type="pt", callback_on_step_end=after).images
    finally:
        hook.remove()
    return steps, given[0], image


def check(
    pipeline: Any,
    pipe: Any,
    ours: dict[str, Any],
    other: dict[str, Any],
    seeds: tuple[int, ...] = (3,),
    rounding: float = ROUNDING,
) -> Req:
    """Both sides agree at every step, and paint something."""
    seen, batch = run_ours(pipeline, **{"prompt": PROMPT, "seed": seeds[0], "num_inference_steps": 2} | ours)
    steps, given, image = run_theirs(pipe, list(seeds), **other)
    own = [seen["latent_preparation"]["latents"]]
    own += [seen["image_vae_encoding"]["image_latents"]] if "image_vae_encoding" in seen else []
    along = 2 if isinstance(pipeline, FluxFillPipeline) else 1
    assert (torch.cat(own, dim=along) - given).abs().max() < rounding
    assert torch.equal(own[0], given[:, : own[0].shape[1], : own[0].shape[2]])  # the noise: the same draws
    assert len(steps) == sum(name.startswith("denoising.step.") for name in seen)
    for i, latents in enumerate(steps):
        assert (seen[f"denoising.step.{i}"]["latents"] - latents).abs().max() < rounding, f"step {i}"
    assert batch.output is not None and batch.output.shape == image.shape
    assert (batch.output - image).abs().max() < rounding
    assert float(image.std()) > 1e-2
    return batch


# --- Kontext ---------------------------------------------------------------------------------------------------------

OWN_SIZE = {"auto_resize": False}


@pytest.mark.parametrize(
    ("given", "options"),
    [
        ((80, 48), {"guidance_scale": 2.5}),
        ((50, 71), {"guidance_scale": 0.0, "num_inference_steps": 3}),  # another shape than the result's; rounded down
        ((33, 26), {"negative_prompt": "green", "true_cfg_scale": 3.0}),
        (None, {}),
    ],
    ids=["as large", "upright", "true cfg", "no picture"],
)
def test_kontext_equals_diffusers_at_every_step(
    native: dict[str, Any], theirs: dict[str, Any], given: tuple[int, int] | None, options: dict[str, Any]
) -> None:
    image = picture(*given) if given else None
    ours = options | SIZE | ({"image": [image], "extra": OWN_SIZE} if image else {})
    check(native[KONTEXT], theirs[KONTEXT], ours, options | SIZE | AREA | {"image": image, "_auto_resize": False})


def test_one_picture_serves_several_prompts_and_images(native: dict[str, Any], theirs: dict[str, Any]) -> None:
    image, prompts = picture(64, 40), [PROMPT, "a green square"]
    ours = SIZE | {"prompt": prompts, "num_images": 2, "image": [image], "extra": OWN_SIZE}
    other = SIZE | AREA | {"prompt": prompts, "num_images_per_prompt": 2, "image": image, "_auto_resize": False}
    batch = check(native[KONTEXT], theirs[KONTEXT], ours, other, (5, 6, 7, 8))
    _, alone = run_ours(
        native[KONTEXT], seed=8, num_inference_steps=2, **ours | {"prompt": prompts[1], "num_images": 1}
    )
    assert batch.output is not None and alone.output is not None
    assert (batch.output[3:] - alone.output).abs().max() < ROUNDING


def test_an_unnamed_size_is_square_with_the_area_asked_for(native: dict[str, Any], theirs: dict[str, Any]) -> None:
    image = picture(64, 40)
    ours = {"image": [image], "extra": OWN_SIZE | {"max_area": 53 * 53}}
    batch = check(native[KONTEXT], theirs[KONTEXT], ours, {"image": image, "_auto_resize": False, "max_area": 53 * 53})
    assert (batch.height, batch.width) == (48, 48)
    config, defaults = native[KONTEXT].config, native[KONTEXT].sampling_params
    assert config.default_size(Req(extra=defaults.extra)) == (1024, 1024)
    assert (defaults.num_inference_steps, defaults.guidance_scale) == (28, 3.5)


def test_pictures_are_brought_to_the_nearest_preferred_size(tmp_path: Path) -> None:
    folder = write_port(tmp_path / "port", pipeline=KONTEXT, widths=(8,) * 6)  # 32 pixels a latent position
    ours, size = load(folder, dtype=torch.float32, device="cpu"), {"height": 128, "width": 192}
    image = picture(200, 130)
    seen, batch = run_ours(ours, prompt=PROMPT, seed=3, num_inference_steps=1, image=[image], **size)  # type: ignore[arg-type]
    assert seen["image_vae_encoding"]["image_latents"].shape == (1, (1248 // 64) * (832 // 64), 16)
    options = size | {"num_inference_steps": 1, "image": image, "max_area": 128 * 192}
    _, given, other = run_theirs(reference(folder, KONTEXT), [3], **options)
    assert (seen["image_vae_encoding"]["image_latents"] - given[:, 6:]).abs().max() < ROUNDING
    assert batch.output is not None and (batch.output - other).abs().max() < ROUNDING


def test_preferred_sizes_are_those_of_diffusers() -> None:
    from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS as KNOWN

    assert sorted(PREFERRED) == sorted(KNOWN)
    config = FluxKontextPipelineConfig(vae_config={"block_out_channels": (1,) * 4})
    for width, height in ((640, 480), (481, 1003), (3000, 900), (77, 76), (16, 4000), (830, 560)):
        across, down = width // 16 * 16, height // 16 * 16
        _, *wanted = min((abs(across / down - w / h), w, h) for w, h in KNOWN)
        req = Req(image=[picture(width, height)], extra={"auto_resize": True})
        assert config.picture_size(req) == (wanted[1] // 16 * 16, wanted[0] // 16 * 16)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_pictures_of_other_kinds_are_made_rgb(native: dict[str, Any], mode: str) -> None:
    odd = picture(40, 40, mode)
    results = []
    for image in (odd, odd.convert("RGB")):
        _, batch = run_ours(
            native[KONTEXT], prompt=PROMPT, num_inference_steps=1, image=[image], extra=OWN_SIZE, **SIZE
        )
        results.append(batch.output)
    assert torch.equal(*results)


@pytest.mark.parametrize("fault", ["ids", "place", "order", "cut", "mode", "shift", "size", "resampling"])
def test_planted_faults_are_seen_in_kontext(
    native: dict[str, Any], theirs: dict[str, Any], fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = FluxKontextPipelineConfig
    if fault == "ids":  # the picture's first coordinate
        right = pipeline_kontext.grid
        monkeypatch.setattr(pipeline_kontext, "grid", lambda first, *size: right(0, *size))
    elif fault == "place":  # rows for columns
        right = pipeline_kontext.grid
        monkeypatch.setattr(pipeline_kontext, "grid", lambda first, height, width: right(first, width, height))
    elif fault == "order":
        wrong = lambda self, latents, batch: torch.cat((batch.image_latents, latents), dim=1)  # noqa: E731
        monkeypatch.setattr(config, "prepare_model_input", wrong)
    elif fault == "cut":
        monkeypatch.setattr(config, "post_model", lambda self, x, batch: x[:, -batch.latents.shape[1] :])
    elif fault == "mode":
        monkeypatch.setattr(
            diffusers.models.autoencoders.vae.DiagonalGaussianDistribution, "mode", lambda self: self.mean + self.std
        )
    elif fault == "shift":
        monkeypatch.setattr(config, "normalise", lambda self, latents: latents * 0.7)
    elif fault == "size":
        monkeypatch.setattr(config, "picture_size", lambda self, batch: (40, 64))
    else:
        resize = Image.Image.resize
        monkeypatch.setattr(Image.Image, "resize", lambda self, size, _: resize(self, size, Image.Resampling.BILINEAR))
    image = picture(75, 55)
    _, batch = run_ours(
        native[KONTEXT], prompt=PROMPT, seed=3, num_inference_steps=2, image=[image], extra=OWN_SIZE, **SIZE
    )
    monkeypatch.undo()
    _, _, other = run_theirs(theirs[KONTEXT], [3], image=image, _auto_resize=False, **SIZE, **AREA)
    assert batch.output is not None
    assert (batch.output - other).abs().max() > 10 * ROUNDING


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"image": [picture(40, 40)] * 2}, "image"),
        ({"image": [picture(40, 7)]}, "image"),
        ({"image": ["picture.png"]}, "image"),
        ({"mask_image": mask(40, 40)}, "mask_image"),
        ({"extra": {"max_area": 63}}, "max_area"),
        ({"extra": {"max_area": 2.0**12}}, "max_area"),
        ({"extra": {"max_area": True}}, "max_area"),
        ({"extra": {"auto_resize": "no"}}, "auto_resize"),
        ({"extra": {"area": 4096}}, "area"),
        ({"image_latents": torch.zeros(1, 4, 16)}, "image_latents"),
    ],
)
def test_kontext_refuses_by_name(native: dict[str, Any], fields: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError) as error:
        run_ours(native[KONTEXT], prompt=PROMPT, num_inference_steps=1, **SIZE, **fields)
    assert str(error.value).startswith(f"{named}: ") and named in str(error.value.expected)


def test_a_model_without_guidance_embedding_takes_none(tmp_path: Path) -> None:
    folder = write_port(tmp_path / "port", pipeline=KONTEXT, guidance=False)
    ours = load(folder, dtype=torch.float32, device="cpu")
    options: dict[str, Any] = SIZE | {"image": [picture(40, 24)], "extra": OWN_SIZE}
    other = SIZE | AREA | {"image": picture(40, 24), "_auto_resize": False}
    check(ours, reference(folder, KONTEXT), options, other)


# --- Fill ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "kind", "options"),
    [
        ((80, 48), "L", {"guidance_scale": 30.0}),
        ((50, 71), "RGB", {"guidance_scale": 1.0, "num_inference_steps": 3}),
        ((96, 64), "1", {"height": 64, "width": 32}),
        ((40, 40), "L", {"sigmas": [1.0, 0.3]}),
    ],
    ids=["as large", "resized", "bilevel mask, another size", "sigmas"],
)
def test_fill_equals_diffusers_at_every_step(
    native: dict[str, Any], theirs: dict[str, Any], given: tuple[int, int], kind: str, options: dict[str, Any]
) -> None:
    image, where = picture(*given), mask(*given, mode=kind)
    ours = SIZE | options | {"image": [image], "mask_image": where}
    check(native[FILL], theirs[FILL], ours, SIZE | options | {"image": image, "mask_image": where})


def test_each_image_of_a_batch_is_what_diffusers_makes_of_it_alone(
    native: dict[str, Any], theirs: dict[str, Any]
) -> None:
    image, where, prompts = picture(64, 40), mask(64, 40), [PROMPT, "a green square"]
    ours = SIZE | {"prompt": prompts, "num_images": 2, "image": [image], "mask_image": where}
    _, batch = run_ours(native[FILL], seed=5, num_inference_steps=2, **ours)
    assert batch.output is not None
    for i, prompt in enumerate((*prompts[:1] * 2, *prompts[1:] * 2)):
        _, _, alone = run_theirs(theirs[FILL], [5 + i], prompt=prompt, image=image, mask_image=where, **SIZE)
        assert (batch.output[i : i + 1] - alone).abs().max() < ROUNDING


def test_fill_guides_by_a_negative_prompt(native: dict[str, Any]) -> None:
    fields: dict[str, Any] = SIZE | {"prompt": PROMPT, "image": [picture(64, 40)], "mask_image": mask(64, 40)}
    fields |= {"num_inference_steps": 2}
    outputs = [
        native[FILL].generate(**fields | guided).output
        for guided in (
            {},
            {"negative_prompt": PROMPT, "true_cfg_scale": 3.0},
            {"negative_prompt": "green", "true_cfg_scale": 3.0},
        )
    ]
    assert (outputs[0] - outputs[1]).abs().max() < ROUNDING  # both predictions are one
    assert (outputs[0] - outputs[2]).abs().max() > 1e-3


def test_the_defaults_of_fill(native: dict[str, Any]) -> None:
    defaults = native[FILL].sampling_params
    assert (defaults.num_inference_steps, defaults.guidance_scale, defaults.extra) == (50, 30.0, {})


@pytest.mark.parametrize("fault", ["draws", "generator", "inverted", "threshold", "mask packing", "order", "shift"])
def test_planted_faults_are_seen_in_fill(
    native: dict[str, Any], theirs: dict[str, Any], fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, where = FluxFillPipelineConfig, mask(75, 55)
    if fault == "draws":  # the noise first
        monkeypatch.setattr(FillLatentPreparationStage, "forward", LatentPreparationStage.forward)
    elif fault == "generator":  # a sample that ignores it
        sample = diffusers.models.autoencoders.vae.DiagonalGaussianDistribution.sample
        monkeypatch.setattr(
            diffusers.models.autoencoders.vae.DiagonalGaussianDistribution,
            "sample",
            lambda self, generator: sample(self, torch.Generator().manual_seed(0)),
        )
    elif fault == "inverted":
        where = Image.eval(where, lambda level: 255 - level)
    elif fault == "threshold":
        where = where.point(lambda level: 255 if level > 100 else 0)
    elif fault == "mask packing":
        right = torch.pixel_unshuffle
        wrong = lambda x, factor: right(x.mT.contiguous(), factor).mT  # noqa: E731
        monkeypatch.setattr(pipeline_fill.torch, "pixel_unshuffle", wrong)
    elif fault == "order":
        wrong = lambda self, latents, batch: torch.cat((latents, batch.image_latents.roll(16, -1)), -1)  # noqa: E731
        monkeypatch.setattr(config, "prepare_model_input", wrong)
    else:
        monkeypatch.setattr(config, "normalise", lambda self, latents: latents * 0.7)
    image = picture(75, 55)
    _, batch = run_ours(
        native[FILL], prompt=PROMPT, seed=3, num_inference_steps=2, image=[image], mask_image=where, **SIZE
    )
    monkeypatch.undo()
    _, _, other = run_theirs(theirs[FILL], [3], image=image, mask_image=mask(75, 55), **SIZE)
    assert batch.output is not None
    assert (batch.output - other).abs().max() > 10 * ROUNDING


GIVEN: dict[str, Any] = {"image": [picture(40, 40)], "mask_image": mask(40, 40)}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        (GIVEN | {"image": None}, "image"),
        (GIVEN | {"image": [picture(40, 40)] * 2}, "image"),
        (GIVEN | {"mask_image": None}, "mask_image"),
        (GIVEN | {"mask_image": "mask.png"}, "mask_image"),
        (GIVEN | {"sigmas": [0.8]}, "sigmas"),
        (GIVEN | {"extra": {"max_area": 4096}}, "max_area"),
    ],
)
def test_fill_refuses_by_name(native: dict[str, Any], fields: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError) as error:
        run_ours(native[FILL], prompt=PROMPT, **SIZE, **{"num_inference_steps": 1} | fields)
    assert str(error.value).startswith(f"{named}: ") and named in str(error.value.expected)


def test_fill_refuses_a_transformer_of_another_pipeline(tmp_path: Path) -> None:
    folder = write_port(tmp_path / "port", pipeline=FILL)
    with pytest.raises(BadInputError, match="also takes a picture and a mask") as error:
        load(folder, dtype=torch.float32, device="cpu")
    assert "in_channels 96" in str(error.value.expected) and "in_channels 16" in str(error.value.found)


# --- both ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [KONTEXT, FILL])
def test_batches_in_float64(ports: dict[str, Path], name: str) -> None:
    """diffusers' Fill gets the picture once for each image, so that it draws for each."""
    ours, pipe = load(ports[name], dtype=torch.float64, device="cpu"), reference(ports[name], name, torch.float64)
    image, where, prompts = picture(64, 40), mask(64, 40), [PROMPT, "a green square"]
    given: dict[str, Any] = SIZE | {"prompt": prompts, "num_images": 2, "image": [image]}
    given |= {"mask_image": where} if name == FILL else {"extra": OWN_SIZE}
    other: dict[str, Any] = SIZE | {"prompt": prompts, "num_images_per_prompt": 2}
    fill = {"image": [image] * 4, "mask_image": [where] * 4}
    other |= fill if name == FILL else AREA | {"image": image, "_auto_resize": False}
    check(ours, pipe, given, other, (5, 6, 7, 8), rounding=1e-11)


@pytest.mark.parametrize("name", [KONTEXT, FILL])
def test_half_precision_runs(ports: dict[str, Path], name: str) -> None:
    pipeline = load(ports[name], dtype=torch.bfloat16, device="cpu")
    assert isinstance(pipeline, FluxKontextPipeline | FluxFillPipeline)
    fields: dict[str, Any] = {"image": [picture(64, 40)]} | (
        {"mask_image": mask(64, 40)} if name == FILL else {"extra": OWN_SIZE}
    )
    batch = pipeline.generate(PROMPT, num_inference_steps=2, **SIZE, **fields)
    assert batch.output is not None and batch.output.dtype == torch.bfloat16
    assert batch.image_latents is not None and batch.image_latents.dtype == torch.bfloat16
