"""The native Wan pipelines against diffusers' own on the same folder, step by step."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanPipeline as Reference
from PIL import Image
from torch import Tensor

from conversions.wan.pipeline import NEGATIVE, WanPipelineConfig
from conversions.wan.pipeline_i2v import WanI2VPipelineConfig
from conversions.wan.prompt import clean
from porter.core.errors import BadInputError, UsageError
from runtime.pipeline import ComposedPipelineBase
from runtime.registry import describe, load
from runtime.request import Req
from tests.conversions.wan.ports import write_port

PROMPT = "a large red circle &amp;amp; a   blue square"
ROUNDING = 2e-5  # absolute, after four steps from noise of deviation 1
KINDS = ("t2v", "a14b", "5b", "i2v", "flf2v", "i2v-a14b", "i2v-5b")
PICTURES = [
    Image.fromarray(np.random.default_rng(i).integers(0, 255, (50, 70, 3), dtype=np.uint8), "RGB") for i in range(2)
]


@pytest.fixture(scope="module")
def ports(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Any, ComposedPipelineBase]]:
    """kind -> (folder, diffusers' pipeline, ours)."""
    made: dict[str, tuple[Path, Any, ComposedPipelineBase]] = {}

    def port(kind: str) -> tuple[Path, Any, ComposedPipelineBase]:
        if kind not in made:
            folder = tmp_path_factory.mktemp("ports") / kind
            theirs = write_port(folder, kind)
            made[kind] = folder, theirs, load(folder, dtype=torch.float32, device="cpu")
        return made[kind]

    return port


def settings(kind: str, **more: Any) -> dict[str, Any]:
    """What both are asked for."""
    asked: dict[str, Any] = {
        "height": 32,
        "width": 48,
        "num_frames": 9,
        "num_inference_steps": 4,
        "guidance_scale": 4.0,
    }
    return asked | ({"guidance_scale_2": 2.5} if "a14b" in kind else {}) | more


def pictures(kind: str) -> list[Image.Image]:
    return PICTURES if kind in ("flf2v", "i2v-a14b") else PICTURES[:1] if "i2v" in kind else []


@torch.no_grad()
def run_theirs(pipe: Any, given: list[Image.Image], seeds: list[int], negative: str, **asked: Any) -> Any:
    """(latents after each step, video (B, 3, F, H, W) in [0, 1]).

    The text is embedded by WanPipeline's function: the other's does not run without ftfy.
    """
    steps: list[Tensor] = []

    def after(pipe: Any, step: int, t: Any, kept: dict[str, Tensor]) -> dict[str, Tensor]:
        steps.append(kept["latents"].clone())
        return kept

    rows = [Reference._get_t5_prompt_embeds(pipe, [text] * len(seeds), 1, 512, "cpu") for text in (PROMPT, negative)]
    asked |= dict(zip(("image", "last_image"), given, strict=False))
    video = pipe(
        prompt_embeds=rows[0], negative_prompt_embeds=rows[1], output_type="pt", callback_on_step_end=after,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds], **asked,
    ).frames  # fmt: skip
    return steps, video.transpose(1, 2)


_answers: dict[int, Any] = {}


def theirs_of(kind: str, ports: Any) -> Any:
    """What diffusers answers to `settings(kind)`, computed once."""
    pipe = ports(kind)[1]
    if id(pipe) not in _answers:
        _answers[id(pipe)] = run_theirs(pipe, pictures(kind), [3], "green", **settings(kind))
    return _answers[id(pipe)]


def run_ours(pipe: ComposedPipelineBase, given: list[Image.Image], **asked: Any) -> tuple[dict[str, Any], Req]:
    """(tensors by tap, finished request)."""
    seen: dict[str, dict[str, Tensor]] = {}
    tap = lambda name, tensors: seen.update({name: {k: t.clone() for k, t in tensors.items()}})  # noqa: E731
    asked |= {"image": given[:1]} if given else {}
    asked |= {"last_image": given[1]} if len(given) > 1 else {}
    return seen, pipe.generate(PROMPT, taps=[tap], **asked)


@pytest.mark.parametrize("kind", KINDS)
def test_every_step_and_the_video_equal_diffusers(kind: str, ports: Any) -> None:
    _, theirs, ours = ports(kind)
    seen, batch = run_ours(ours, pictures(kind), seed=3, negative_prompt="green", **settings(kind))
    steps, video = theirs_of(kind, ports)
    assert len(steps) == 4 and batch.output is not None
    gaps = [float((seen[f"denoising.step.{i}"]["latents"] - latents).abs().max()) for i, latents in enumerate(steps)]
    assert max(gaps) < ROUNDING, gaps
    assert batch.output.shape == (1, 3, 9, 32, 48) and (batch.output - video).abs().max() < ROUNDING
    theirs.scheduler.set_timesteps(4)
    assert torch.equal(seen["timestep_preparation"]["sigmas"], theirs.scheduler.sigmas)
    assert float(video.std()) > 1e-2  # the comparison is not of two grey videos


@pytest.mark.parametrize("kind", ["t2v", "5b", "i2v-a14b", "i2v-5b"])
def test_exact_is_equal_in_every_bit(kind: str, ports: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of those with CLIP's tokens: diffusers multiplies the text as a slice behind them, unaligned in memory."""
    ours, given = ports(kind)[2], pictures(kind)
    monkeypatch.setattr(ours, "quality", "exact")
    _, batch = run_ours(ours, given, seed=3, negative_prompt="green", **settings(kind))
    _, video = theirs_of(kind, ports)
    assert torch.equal(batch.output, video)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["t2v", "flf2v"])
def test_several_videos_use_following_seeds(kind: str, ports: Any) -> None:
    """Also CLIP's tokens are those of each video, which diffusers gets wrong for several videos of one prompt."""
    _, theirs, ours = ports(kind)
    given, asked = pictures(kind), settings(kind, num_inference_steps=2)
    _, batch = run_ours(ours, given, seed=5, num_images=2, negative_prompt="green", **asked)
    _, video = run_theirs(theirs, given, [5, 6], "green", **asked)
    _, second = run_ours(ours, given, seed=6, negative_prompt="green", **asked)
    assert batch.output is not None and second.output is not None
    assert (batch.output - video).abs().max() < ROUNDING
    assert (batch.output[1:] - second.output).abs().max() < ROUNDING
    assert (batch.output[0] - batch.output[1]).abs().max() > 1e-2


def test_the_5b_model_takes_a_picture_or_none(ports: Any) -> None:
    """One folder, called WanPipeline: diffusers needs its other class for the picture."""
    from diffusers import WanImageToVideoPipeline

    _, theirs, ours = ports("5b")
    parts = {name: theirs.components[name] for name in ("tokenizer", "text_encoder", "vae", "scheduler", "transformer")}
    other = WanImageToVideoPipeline(**parts, expand_timesteps=True)
    other.set_progress_bar_config(disable=True)
    seen, batch = run_ours(ours, PICTURES[:1], seed=3, negative_prompt="green", **settings("5b"))
    _, video = run_theirs(other, PICTURES[:1], [3], "green", **settings("5b"))
    assert batch.output is not None and (batch.output - video).abs().max() < ROUNDING
    assert torch.equal(seen["denoising"]["latents"][:, :, :1], batch.latents[:, :, :1])  # type: ignore[index]


def test_in_bfloat16_the_autoencoder_and_the_loop_s_state_stay_float32(ports: Any) -> None:
    folder, _, exact = ports("i2v")
    ours = load(folder, dtype=torch.bfloat16, device="cpu")
    kinds = {name: ours.modules[name].dtype for name in ("transformer", "text_encoder", "image_encoder", "vae")}
    assert kinds.pop("vae") == torch.float32 and set(kinds.values()) == {torch.bfloat16}
    for name, weight in ours.modules["vae"].state_dict().items():
        assert torch.equal(weight, exact.modules["vae"].state_dict()[name]), name
    seen, batch = run_ours(ours, pictures("i2v"), seed=3, negative_prompt="green", **settings("i2v"))
    assert seen["denoising"]["latents"].dtype == torch.float32
    video = theirs_of("i2v", ports)[1]
    assert batch.output is not None and 1e-4 < (batch.output - video).abs().max() < 0.2


def test_without_guidance_one_pass_a_step(ports: Any) -> None:
    _, theirs, ours = ports("t2v")
    asked = settings("t2v", guidance_scale=1.0, num_inference_steps=2)
    calls: list[int] = []
    handle = ours.modules["transformer"].register_forward_hook(lambda *_: calls.append(1))
    _, batch = run_ours(ours, [], seed=3, **asked)
    handle.remove()
    _, video = run_theirs(theirs, [], [3], "", **asked)
    assert len(calls) == 2 and batch.output is not None
    assert (batch.output - video).abs().max() < ROUNDING


def test_one_frame_is_a_picture_and_other_sizes_work(ports: Any) -> None:
    _, theirs, ours = ports("t2v")
    for change in ({"num_frames": 1}, {"height": 48, "width": 16}):
        asked = settings("t2v", num_inference_steps=2) | change
        _, batch = run_ours(ours, [], seed=3, negative_prompt="green", **asked)
        _, video = run_theirs(theirs, [], [3], "green", **asked)
        assert batch.output is not None and (batch.output - video).abs().max() < ROUNDING


def test_the_second_denoiser_runs_below_the_boundary(ports: Any) -> None:
    _, _, ours = ports("a14b")
    order: list[str] = []
    names = ("transformer", "transformer_2")
    handles = [ours.modules[n].register_forward_hook(lambda *_, n=n: order.append(n)) for n in names]
    _, batch = run_ours(ours, [], seed=3, **settings("a14b", num_inference_steps=6))
    for handle in handles:
        handle.remove()
    high = int((batch.timesteps >= 875).sum())  # type: ignore[operator]
    assert 0 < high < 6 and order == ["transformer"] * 2 * high + ["transformer_2"] * 2 * (6 - high)


def test_prompts_are_cleaned_and_long_ones_reported(ports: Any) -> None:
    _, _, ours = ports("t2v")
    assert clean(" a &amp;amp; b\n\tc ") == ("a & b c", False)
    assert clean("é")[1] == (importlib.util.find_spec("ftfy") is None)
    asked = settings("t2v", num_inference_steps=1, guidance_scale=1.0)
    _, batch = run_ours(ours, [], max_sequence_length=4, **asked)
    assert [line.split()[0] for line in batch.warnings] == ["text_encoder"]
    tokens, mask = batch.prompt_embeds[0], batch.prompt_masks[0]
    assert tokens.shape[1] == 4 and mask is None
    _, batch = run_ours(ours, [], **asked)
    assert batch.warnings == [] and not batch.prompt_embeds[0][0, 100:].any() and batch.prompt_embeds[0][0, 0].any()


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("t2v", (480, 832, 81, 16, 50, 5.0, None)),
        ("a14b", (720, 1280, 81, 16, 40, 4.0, 3.0)),
        ("i2v", (None, None, 81, 16, 40, 5.0, None)),
        ("flf2v", (None, None, 81, 16, 50, 5.0, None)),
        ("i2v-a14b", (None, None, 81, 16, 40, 3.5, 3.5)),
    ],
)
def test_defaults_are_the_originals(kind: str, expected: tuple[Any, ...], ports: Any) -> None:
    params = describe(ports(kind)[0]).sampling_params
    found = params.height, params.width, params.num_frames, params.fps, params.num_inference_steps
    assert (*found, params.guidance_scale, params.guidance_scale_2) == expected
    prefix = "镜头晃动，" if kind in ("i2v", "flf2v") else ""
    assert params.negative_prompt == prefix + NEGATIVE


def test_a_video_has_its_pictures_shape(ports: Any) -> None:
    for kind, size in (("i2v", (528, 736)), ("i2v-a14b", (800, 1136))):
        config = describe(ports(kind)[0]).config
        assert config.default_size(Req(image=PICTURES[:1])) == size


@pytest.mark.parametrize(
    ("kind", "change", "named"),
    [
        ("t2v", {"image": PICTURES[:1]}, "image"),
        ("t2v", {"num_frames": 8}, "num_frames"),
        ("t2v", {"height": 40}, "height"),
        ("i2v", {"image": None}, "image"),
        ("i2v", {"last_image": PICTURES[1]}, "last_image"),
        ("i2v-5b", {"last_image": PICTURES[1]}, "last_image"),
        ("flf2v", {"last_image": None}, "between two pictures"),
        ("i2v-a14b", {"num_frames": 1}, "num_frames"),
    ],
)
def test_what_a_model_cannot_make_is_refused_by_name(kind: str, change: Any, named: str, ports: Any) -> None:
    _, _, ours = ports(kind)
    given = pictures(kind)
    fields = {"image": given[:1] or None, "last_image": given[1] if len(given) > 1 else None}
    with pytest.raises(UsageError, match=named):
        ours.generate(PROMPT, **settings(kind) | fields | change)


def test_a_second_scale_without_a_second_denoiser_is_said(ports: Any) -> None:
    _, _, ours = ports("t2v")
    _, batch = run_ours(ours, [], **settings("t2v", num_inference_steps=1, guidance_scale=1.0, guidance_scale_2=3.0))
    assert batch.warnings == ["guidance_scale_2 3 is ignored: this model does not take it"]


@pytest.mark.parametrize(
    ("kind", "change", "named"),
    [
        ("a14b", {"transformer_2": [None, None]}, "lacks transformer_2"),
        ("t2v", {"boundary_ratio": "0.9"}, "boundary_ratio"),
        ("t2v", {"expand_timesteps": 1}, "expand_timesteps"),
        ("i2v", {"image_encoder": [None, None]}, "lacks image_encoder"),
    ],
)
def test_a_port_that_contradicts_itself_is_refused(
    kind: str, change: dict[str, Any], named: str, ports: Any, tmp_path: Path
) -> None:
    folder = ports(kind)[0]
    for each in folder.iterdir():
        (tmp_path / each.name).symlink_to(each)
    index = json.loads((folder / "model_index.json").read_text())
    (tmp_path / "model_index.json").unlink()
    (tmp_path / "model_index.json").write_text(json.dumps(index | change))
    with pytest.raises(BadInputError, match=named):
        load(tmp_path, dtype=torch.float32, device="cpu")


def test_a_denoiser_beyond_no_boundary_is_left_out_loudly(ports: Any, tmp_path: Path) -> None:
    theirs = ports("a14b")[1]
    theirs.register_to_config(boundary_ratio=None)
    try:
        theirs.save_pretrained(tmp_path)
    finally:
        theirs.register_to_config(boundary_ratio=0.875)
    ours = load(tmp_path, dtype=torch.float32, device="cpu")
    assert list(ours.transformers) == ["transformer"] and "transformer_2 is not used" in ours.warnings[0]


FAULTS: dict[str, tuple[str, str, Any]] = {
    "statistics": ("t2v", "get_decode_scale_and_shift", lambda self: (torch.ones(1), torch.zeros(1))),
    "second scale": ("a14b", "cfg_scale", lambda self, batch, step, t: batch.guidance_scale),
    "boundary": ("a14b", "select_transformer", lambda self, known, batch, t: "transformer"),
    "time of a given frame": ("i2v-5b", "scale_timestep", lambda self, t, batch: t),
    "given frame": ("i2v-5b", "post_denoising_loop", lambda self, latents, batch: latents),
    "mask": (
        "i2v", "prepare_model_input",
        lambda self, x, batch: torch.cat((x, batch.image_latents.roll(1, 2)), 1),
    ),
    "last picture": (
        "flf2v", "prepare_image_latents",
        lambda self, vae, batch, *more: _i2v(self, vae, Req(**vars(batch) | {"last_image": None}), *more),
    ),
}  # fmt: skip
_i2v = WanI2VPipelineConfig.prepare_image_latents


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_seen(fault: str, ports: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, callback, wrong = FAULTS[fault]
    _, theirs, ours = ports(kind)
    monkeypatch.setattr(
        WanI2VPipelineConfig if "i2v" in kind or kind == "flf2v" else WanPipelineConfig, callback, wrong
    )
    given = pictures(kind)
    _, batch = run_ours(ours, given, seed=3, negative_prompt="green", **settings(kind))
    _, video = run_theirs(theirs, given, [3], "green", **settings(kind))
    assert batch.output is not None and (batch.output - video).abs().max() > 10 * ROUNDING
