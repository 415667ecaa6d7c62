"""What a pipeline is asked for: dtype, size, frames, batch; with the pipeline's own defaults, read and not imported."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from porter.core.calls import OTHERS
from porter.core.compression import LARGEST, compression, number
from porter.core.defaults import CallSource, Computed, call_source
from porter.core.described import (
    Described,
    full_config,
    is_decoder,
    sample_frames,
    sample_size,
    target_size,
    text_tokens,
)
from porter.core.errors import UsageError

# Bytes of one element, by safetensors dtype code.
ELEMENT: Mapping[str, int] = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_UNITS = {"": 1, "B": 1} | {
    f"{letter}{end}": (1024 if end == "iB" else 1000) ** power
    for power, letter in enumerate("KMGT", 1)
    for end in ("", "B", "iB")
}
_LEAST_PLAIN = 10**6  # no device has less; a smaller number without a unit lacks it
_SIDE, _VIDEO_FRAMES = 1024, 81  # where nothing says a size
_FRAMES = ("num_frames", "segment_frame_length")  # the latter where a pipeline makes a video piece by piece
_PIXELS = (3, 6)  # channels of a denoiser that works on pictures themselves, or on two at once
_NOBODY = "no default is known"


@dataclass(frozen=True)
class Workload:
    """One call of a pipeline, and what its autoencoder makes of it.

    Attributes:
        dtype: safetensors code of the dtype that weights are loaded in and computed with: F32, F16, BF16.
        height, width: of the picture, in pixels.
        frames: of the video; 1 for a picture.
        batch: sequences in one forward; the denoiser gets twice as many where guidance is batched.
        guidance: whether the denoiser computes both passes of classifier-free guidance in one forward.
        text_tokens: tokens of a prompt, after padding.
        spatial: pixels per latent position, each way.
        temporal: frames per latent frame, the first frame standing alone.
        frame_timesteps: whether the denoiser is given a timestep for each latent frame (diffusion forcing).
        upcasts: whether the pipeline decodes in float32 after float16 where `force_upcast` is in the config.
        text_mask: whether a text encoder is given an attention mask.
        hidden_states: whether a text encoder is asked for the output of every layer.
        text_cache: whether a language model keeps keys and values for tokens to come.
        text_calls: the last three for each text encoder by its component's name, where the pipeline's source says it.
        guessed: names of sizes that nothing says; no verdict is built on them.
    """

    dtype: str = "BF16"
    height: int = 1024
    width: int = 1024
    frames: int = 1
    batch: int = 1
    guidance: bool = False
    text_tokens: int = 512
    spatial: int = 8
    temporal: int = 1
    frame_timesteps: bool = False
    upcasts: bool = False
    text_mask: bool = True
    hidden_states: bool = True
    text_cache: bool = True
    text_calls: Mapping[str, Mapping[str, bool]] = field(default_factory=dict)
    guessed: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.dtype not in ELEMENT:
            raise UsageError(f"unknown dtype {self.dtype!r}", expected=", ".join(ELEMENT), hint="--dtype BF16")
        for name in ("height", "width", "frames", "batch", "spatial", "temporal", "text_tokens"):
            least = 0 if name == "text_tokens" else 1
            if not least <= (value := getattr(self, name)) <= LARGEST:
                raise UsageError(
                    f"{name} is {value}", expected=f"a whole number from {least} to {LARGEST}", hint=f"--{name} 512"
                )

    @property
    def element(self) -> int:
        """Bytes of one number of `dtype`."""
        return ELEMENT[self.dtype]

    @property
    def latent_height(self) -> int:
        return max(1, self.height // self.spatial)

    @property
    def latent_width(self) -> int:
        return max(1, self.width // self.spatial)

    @property
    def latent_frames(self) -> int:
        return (self.frames - 1) // self.temporal + 1

    @property
    def denoised(self) -> Workload:
        """The workload of one forward of the denoiser: its batch holds both passes of guidance, where it does."""
        return replace(self, batch=2 * self.batch, guidance=False) if self.guidance else self

    def asked(self, encoder: str) -> Workload:
        """The workload of one forward of a text encoder, as its pipeline asks it."""
        how = self.text_calls.get(encoder, {})
        mask, states = how.get("text_mask", self.text_mask), how.get("hidden_states", self.hidden_states)
        return replace(self, text_mask=mask, hidden_states=states, text_cache=how.get("text_cache", self.text_cache))


def parse_bytes(text: str) -> int:
    """Bytes of `24GB`, `24GiB`, `80G`, `512 MiB` or a plain number; `G` and `GB` are 10^9, `GiB` is 2^30.

    Raises:
        UsageError: not a positive size, or a plain number too small to be meant as bytes.
    """
    found = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,6})?)\s*([kKMGT]?(?:i?B)?)\s*", text)
    unit = _UNITS.get(found[2].replace("k", "K")) if found else None
    size = int(float(found[1]) * unit) if found and unit else 0
    if size <= 0:
        raise UsageError(
            f"not an amount of memory: {text!r}",
            expected="a size such as 24GB, 24GiB or 80G",
            hint="--device-memory 24GB",
        )
    if found and not found[2] and size < _LEAST_PLAIN:
        raise UsageError(
            f"{text.strip()} bytes of memory: the unit is missing", expected="a size such as 24GB, 24GiB or 80G",
            found=repr(text), hint=f"--device-memory {text.strip()}GB",
        )  # fmt: skip
    return size


def latents_of(config: Mapping[str, Any], work: Workload) -> Workload:
    """`work` with the compression of an autoencoder, from its full config (`porter.core.compression`)."""
    spatial, temporal = compression(config)
    return replace(work, spatial=spatial or work.spatial, temporal=temporal)


def default_workload(
    pipeline_class: str | None, components: Iterable[Described], family_pipeline: str | None = None, **given: Any
) -> tuple[Workload, tuple[str, ...]]:
    """The call that a user makes who sets nothing but `given`, and every assumption as a line.

    Defaults are literals of the installed pipeline's `__call__`; else what its constructor sets; else the denoiser's
    `sample_size` times the autoencoder's compression, or its `target_size`; else 1024 x 1024, and 81 frames for a
    video, which are guesses.

    Args:
        family_pipeline: whose call is taken where `pipeline_class` is unknown or not installed.
        given: fields of Workload; None counts as not given.
    """
    parts, assumed = list(components), []
    known = {key: value for key, value in given.items() if value is not None}
    call = call_source(pipeline_class) if pipeline_class else None
    caller, source = pipeline_class, f"{pipeline_class}.__call__"
    if pipeline_class and call is None:
        assumed.append(f"{pipeline_class} is not installed: its defaults are not known")
    if call is None and family_pipeline and (call := call_source(family_pipeline)):
        caller, source = family_pipeline, f"as {family_pipeline} is called"
    figures = call.numbers if call else {}
    work, line = _latents(parts, figures)
    assumed += [line] if line else []
    literal = {key: value for key, value in (call.defaults if call else {}).items() if not isinstance(value, Computed)}
    sizes = call.sizes if call else {}
    square = sizes.get("sample_size", 0) * work.spatial
    area = target_size(parts, work.spatial) or (0, 0)
    sound = call is not None and not call.knows("height") and any("audio" in key for key in call.defaults)
    sample = (not sound and sample_size(parts, work.spatial)) or (0, 0)  # of a sound it is no picture's
    chosen: dict[str, Any] = {}
    guessed: list[str] = []
    for key, own, target in zip(("height", "width"), sample, area, strict=True):
        options = (
            (literal.get(key) or figures.get(key), source), (sizes.get(key) or square, f"{caller}'s constructor"),
            (own, "the denoiser's sample_size"), (target, "the denoiser's target_size, at 16:9"),
            (figures.get("sample", 0) * work.spatial, f"{caller}'s constructor"),
            (_SIDE, _NOBODY),
        )  # fmt: skip
        _choose(key, options, known, chosen, assumed, guessed)
    if _makes_video(call, work, parts):
        frames = (
            *((literal.get(key), source) for key in _FRAMES), sample_frames(parts), (figures.get("frames"), source),
            (_VIDEO_FRAMES, _NOBODY),
        )  # fmt: skip
        _choose("frames", frames, known, chosen, assumed, guessed)
    tokens = literal.get("max_sequence_length", figures.get("tokens"))
    chosen["text_tokens"] = tokens if isinstance(tokens, int) else text_tokens(parts) or work.text_tokens
    if "text_tokens" not in known and any(part.name.startswith("text") for part in parts):
        assumed.append(f"{chosen['text_tokens']} text tokens ({source if isinstance(tokens, int) else 'assumed'})")
    scale = literal.get("guidance_scale")
    chosen["guidance"] = bool(call and call.batches_guidance and isinstance(scale, int | float) and scale > 1)
    if chosen["guidance"] and "guidance" not in known:
        assumed.append(f"classifier-free guidance: the denoiser's batch is doubled ({source}: guidance_scale {scale})")
    chosen["frame_timesteps"] = bool(call and call.frame_timesteps)
    if chosen["frame_timesteps"] and "frame_timesteps" not in known:
        assumed.append(f"diffusion forcing: a timestep for each latent frame ({caller})")
    chosen["upcasts"] = bool(call and call.upcasts_decoder)
    asked = call.text_calls if call else {}
    said = {part.name: asked.get(part.name, asked.get(OTHERS)) for part in parts if part.name.startswith("text_enc")}
    chosen["text_calls"] = {name: dict(how) for name, how in said.items() if how is not None}
    return replace(work, **(chosen | {"guessed": tuple(guessed)} | known)), tuple(assumed)


def _choose(
    key: str, options: Iterable[tuple[int | None, str]], known: Mapping[str, Any], chosen: dict[str, Any],
    assumed: list[str], guessed: list[str],
) -> None:  # fmt: skip
    """Notes the first option that says a size, and why; a guess too, unless the user gave it."""
    chosen[key], why = next((value, why) for value, why in options if value)
    if key not in known:
        assumed.append(f"{key} {chosen[key]} ({why})")
        guessed += [key] if why == _NOBODY else []


def _latents(parts: Iterable[Described], figures: Mapping[str, int]) -> tuple[Workload, str | None]:
    """A workload with the autoencoder's compression, and what was assumed for it."""
    parts, work = list(parts), Workload()
    coder = min((part for part in parts if is_decoder(part)), key=lambda part: part.name != "vae", default=None)
    if coder is not None:
        told = latents_of(full_config(coder.library, coder.class_name, coder.config), work)
        if coder.config:
            return told, None
        if told.spatial > 1:  # a class's default of no compression says nothing
            return told, f"{coder.name}: its config is not here: {_positions(told)}, its class's default"
    elif any(
        number(part.config.get("in_channels")) in _PIXELS for part in parts if part.name in ("unet", "transformer")
    ):
        return replace(work, spatial=1), "no autoencoder: one pixel per latent position"
    work = replace(work, spatial=figures.get("spatial", work.spatial), temporal=figures.get("temporal", work.temporal))
    lacks = "no autoencoder" if coder is None else f"{coder.name}: its config is not here"
    return work, f"{lacks}: {_positions(work)}"


def _positions(work: Workload) -> str:
    return f"{work.spatial} pixels{f' and {work.temporal} frames' if work.temporal > 1 else ''} per latent position"


def _makes_video(call: CallSource | None, work: Workload, parts: Iterable[Described]) -> bool:
    """By the call's parameters; without a call by the latents, or by the denoiser's class."""
    if call is not None:
        return any(call.knows(key) for key in _FRAMES)
    return work.temporal > 1 or any(
        part.library == "diffusers" and ("3D" in str(part.class_name) or "Video" in str(part.class_name))
        for part in parts
    )
