"""What a pipeline is asked for: dtype, size, frames, batch; with the pipeline's own defaults, read and not imported."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from porter.core.defaults import Computed, call_source, class_source, config_source
from porter.core.errors import UsageError

# Bytes of one element, by safetensors dtype code.
ELEMENT: Mapping[str, int] = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_UNITS = {"": 1, "B": 1} | {
    f"{letter}{end}": (1024 if end == "iB" else 1000) ** power
    for power, letter in enumerate("KMGT", 1)
    for end in ("", "B", "iB")
}
_VIDEO_FRAMES = 81
LARGEST = 10**6  # of any size in a workload or a config; what is larger is a mistake, or meant to hurt


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
        upcasts: whether the pipeline decodes in float32 after float16 where `force_upcast` is in the config.
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
    upcasts: bool = False

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


class Described(Protocol):
    """What is known of a component without its weights."""

    @property
    def name(self) -> str: ...
    @property
    def library(self) -> str | None: ...
    @property
    def class_name(self) -> str | None: ...
    @property
    def config(self) -> Mapping[str, Any]: ...


def parse_bytes(text: str) -> int:
    """Bytes of `24GB`, `24GiB`, `80G`, `512 MiB` or a plain number; `G` and `GB` are 10^9, `GiB` is 2^30.

    Raises:
        UsageError: not a positive size.
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
    return size


def full_config(library: str | None, class_name: str | None, config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with its class's own defaults for what it leaves out, where the library is installed."""
    model_type = config.get("model_type")
    if library == "transformers":
        source = config_source(model_type) if isinstance(model_type, str) else None
    else:
        source = class_source(library, class_name) if library and class_name else None
    defaults = source.defaults if source else {}
    return {key: value for key, value in defaults.items() if not isinstance(value, Computed)} | dict(config)


def latents_of(config: Mapping[str, Any], work: Workload) -> Workload:
    """`work` with the compression of an autoencoder, from its full config.

    What the config says outright comes first; else each level but the last halves the picture, and levels that are said
    to compress time do so by their factor. Patches of the autoencoder count too.
    """
    patch, patch_t = (_number(config.get(key)) or 1 for key in ("patch_size", "patch_size_t"))
    halved = sum(map(bool, _row(config.get("spatio_temporal_scaling"))))
    spatial = _named(config, "spatial_compression_ratio", "scale_factor_spatial", "ffactor_spatial")
    if spatial is None and halved:
        spatial = patch * 2**halved
    if spatial is None and (steps := _row(config.get("spatial_expansions"))):
        spatial = math.prod(_number(step) or 1 for step in steps)
    if spatial is None:
        widths = _row(config.get("block_out_channels")) or _row(config.get("encoder_block_out_channels"))
        spatial = 2 ** (len(widths) - 1) if widths else None
    temporal = _named(config, "temporal_compression_ratio", "scale_factor_temporal", "ffactor_temporal")
    if temporal is None and halved:
        temporal = patch_t * 2**halved
    if temporal is None and (steps := _row(config.get("temporal_expansions"))):
        temporal = math.prod(_number(step) or 1 for step in steps)
    if temporal is None:
        temporal = 2 ** sum(map(bool, _row(config.get("temperal_downsample"))))
    return replace(work, spatial=min(spatial or work.spatial, LARGEST), temporal=min(temporal, LARGEST))


def default_workload(
    pipeline_class: str | None, components: Iterable[Described], **given: Any
) -> tuple[Workload, tuple[str, ...]]:
    """The call that a user makes who sets nothing but `given`, and every assumption as a line.

    Defaults are literals of the installed pipeline's `__call__`; else the denoiser's `sample_size` times the
    autoencoder's compression; else 1024 x 1024, and 81 frames for a video.

    Args:
        given: fields of Workload; None counts as not given.
    """
    parts = list(components)
    known = {key: value for key, value in given.items() if value is not None}
    work, assumed = Workload(), []
    coder = next((part for part in parts if is_decoder(part)), None)
    told = latents_of(full_config(coder.library, coder.class_name, coder.config), work) if coder is not None else work
    if coder is not None and (coder.config or told.spatial > 1):
        work = told
    else:  # without a config, a class's default of no compression says nothing
        assumed.append(f"no autoencoder: {work.spatial} pixels per latent position")
    call = call_source(pipeline_class) if pipeline_class else None
    if pipeline_class and call is None:
        assumed.append(f"{pipeline_class} is not installed: its defaults are not known")
    literal = {key: value for key, value in (call.defaults if call else {}).items() if not isinstance(value, Computed)}
    source = f"{pipeline_class}.__call__"
    sizes = call.sizes if call else {}
    square = sizes.get("sample_size", 0) * work.spatial
    sample = _sample_size(parts, work.spatial) or (0, 0)
    chosen: dict[str, Any] = {}
    for key, own in zip(("height", "width"), sample, strict=True):
        options = (
            (literal.get(key), source), (sizes.get(key) or square, f"{pipeline_class}'s constructor"),
            (own, "the denoiser's sample_size"), (1024, "no default is known"),
        )  # fmt: skip
        chosen[key], why = next((value, why) for value, why in options if value)
        if key not in known:
            assumed.append(f"{key} {chosen[key]} ({why})")
    video = bool(call and call.knows("num_frames")) or (work.temporal > 1 and call is None)
    choices = (
        (literal.get("num_frames"), source), (_sample_frames(parts), "the denoiser's sample_frames"),
        (_VIDEO_FRAMES, "no default is known"),
    )  # fmt: skip
    chosen["frames"], why = next((value, why) for value, why in choices if value) if video else (1, "")
    if video and "frames" not in known:
        assumed.append(f"frames {chosen['frames']} ({why})")
    tokens = literal.get("max_sequence_length")
    chosen["text_tokens"] = tokens if isinstance(tokens, int) else _text_tokens(parts) or work.text_tokens
    if "text_tokens" not in known and any(part.name.startswith("text") for part in parts):
        assumed.append(f"{chosen['text_tokens']} text tokens ({source if isinstance(tokens, int) else 'assumed'})")
    scale = literal.get("guidance_scale")
    chosen["guidance"] = bool(call and call.batches_guidance and isinstance(scale, int | float) and scale > 1)
    if chosen["guidance"] and "guidance" not in known:
        assumed.append(f"classifier-free guidance: the denoiser's batch is doubled ({source}: guidance_scale {scale})")
    chosen["upcasts"] = bool(call and call.upcasts_decoder)
    return replace(work, **(chosen | known)), tuple(assumed)


def is_decoder(part: Described) -> bool:
    """Whether a component turns latents into pictures."""
    return part.name.split("_")[0] in ("vae", "vqvae", "movq") or str(part.class_name).startswith("Autoencoder")


def _sample_size(parts: Iterable[Described], spatial: int) -> tuple[int, int] | None:
    """(height, width) in pixels that the denoiser was made for, where its config says so."""
    for part in parts:
        if part.library != "diffusers" or is_decoder(part):
            continue
        config = full_config(part.library, part.class_name, part.config)
        size = config.get("sample_size")
        pairs = [(config.get("sample_height"), config.get("sample_width")), _row(size) or (size, size)]
        for high, wide in (tuple(map(_number, pair)) for pair in pairs if len(pair) == 2):
            if high and wide and max(high, wide) * spatial <= LARGEST:
                return high * spatial, wide * spatial
    return None


def _sample_frames(parts: Iterable[Described]) -> int | None:
    """Frames that the denoiser was made for, where its config says so."""
    return next((frames for part in parts if (frames := _number(part.config.get("sample_frames")))), None)


def _text_tokens(parts: Iterable[Described]) -> int | None:
    """Longest prompt that a tokenizer's or a text encoder's own config names, where that is a prompt's length."""
    lengths = [
        part.config.get(key)
        for part in parts
        for key in ("max_position_embeddings", "model_max_length")
        if part.name.startswith(("text_encoder", "tokenizer"))
    ]
    return max((n for n in lengths if isinstance(n, int) and 0 < n <= 512), default=None)


def _named(config: Mapping[str, Any], *keys: str) -> int | None:
    return next((value for key in keys if (value := _number(config.get(key)))), None)


def _number(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= LARGEST else None


def _row(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) and len(value) <= 16 else ()
