"""What a component's name, class and config say of the pipeline's call, without its weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from porter.core.compression import LARGEST, number, row
from porter.core.defaults import Computed, class_source, config_source


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


def sample_size(parts: Iterable[Described], spatial: int) -> tuple[int, int] | None:
    """(height, width) in pixels that the denoiser was made for, where its config says so."""
    for part in parts:
        if part.library != "diffusers" or is_autoencoder(part) or not part.config:
            continue
        config = full_config(part.library, part.class_name, part.config)
        size = config.get("sample_size")
        pairs = [(config.get("sample_height"), config.get("sample_width")), row(size) or (size, size)]
        for high, wide in (tuple(map(number, pair)) for pair in pairs if len(pair) == 2):
            if high and wide and max(high, wide) * spatial <= LARGEST:
                return high * spatial, wide * spatial
    return None


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
