"""What a component's name, class and config say of the pipeline's call, without its weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

from porter.core.compression import LARGEST, number, row
from porter.core.defaults import Computed, class_source, config_source

_LARGEST_AREA = 512  # latent positions each way


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


def full_config(library: str | None, class_name: str | None, config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with its class's own defaults for what it leaves out, where the library is installed."""
    model_type = config.get("model_type")
    if library == "transformers":
        source = config_source(model_type) if isinstance(model_type, str) else None
    else:
        source = class_source(library, class_name) if library and class_name else None
    defaults = source.defaults if source else {}
    return {key: value for key, value in defaults.items() if not isinstance(value, Computed)} | dict(config)


def is_autoencoder(part: Described) -> bool:
    """Whether a component decodes latents, of pictures or of sound."""
    kind = str(part.class_name).startswith(("Autoencoder", "AsymmetricAutoencoder"))
    return kind or bool({"vae", "vqvae", "vqgan", "movq"} & set(part.name.split("_")))


def is_decoder(part: Described) -> bool:
    """Whether a component turns latents into pictures."""
    return is_autoencoder(part) and "audio" not in f"{part.name} {part.class_name}".lower()


def _denoisers(parts: Iterable[Described]) -> Iterator[Described]:
    """Components of diffusers with a config that are no autoencoder."""
    return (part for part in parts if part.library == "diffusers" and part.config and not is_autoencoder(part))


def sample_size(parts: Iterable[Described], spatial: int) -> tuple[int, int] | None:
    """(height, width) in pixels that the denoiser was made for, where its config says so."""
    for part in _denoisers(parts):
        config = full_config(part.library, part.class_name, part.config)
        size = config.get("sample_size")
        pairs = [(config.get("sample_height"), config.get("sample_width")), row(size) or (size, size)]
        for high, wide in (tuple(map(number, pair)) for pair in pairs if len(pair) == 2):
            if high and wide and max(high, wide) * spatial <= LARGEST:
                return high * spatial, wide * spatial
    return None


def target_size(parts: Iterable[Described], spatial: int) -> tuple[int, int] | None:
    """(height, width) in pixels of the area that the denoiser was made for, at 16:9, where its config gives its side.

    Of the sizes in whole latent positions that cover no more than that area, the one that is the closest to 16:9 and
    not wider, as pipelines with a `target_size` in their denoiser's config find it.
    """
    configs = (full_config(part.library, part.class_name, part.config) for part in _denoisers(parts))
    sides = (number(config.get("target_size")) for config in configs)
    side = next((side for side in sides if side and side <= _LARGEST_AREA * spatial), 0)
    most = round((side / spatial) ** 2)
    high, wide, sizes = most, 1, []
    while high:
        if max(high, wide) <= 4 * min(high, wide) and 16 * high >= 9 * wide:
            sizes.append((high * spatial, wide * spatial))
        high, wide = (high, wide + 1) if high * (wide + 1) <= most else (high - 1, wide)
    return min(sizes, key=lambda size: size[0] / size[1], default=None)


def sample_frames(parts: Iterable[Described]) -> tuple[int | None, str]:
    """Frames that the denoiser was made for, where its config says so, and the key that does."""
    keys = ("sample_frames", "num_frames")
    told = ((number(part.config.get(key)), key) for key in keys for part in parts if not is_autoencoder(part))
    return next(((frames, f"the denoiser's {key}") for frames, key in told if frames), (None, ""))


def text_tokens(parts: Iterable[Described]) -> int | None:
    """Longest prompt that a tokenizer's or a text encoder's own config names, where that is a prompt's length."""
    lengths = [
        part.config.get(key)
        for part in parts
        for key in ("max_position_embeddings", "model_max_length")
        if part.name.startswith(("text_encoder", "tokenizer"))
    ]
    return max((n for n in lengths if isinstance(n, int) and 0 < n <= 512), default=None)
