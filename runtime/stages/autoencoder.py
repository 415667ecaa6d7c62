"""The autoencoder as encoding and decoding use it: on the device, in its precision, in tiles where asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from porter.core.errors import UsageError
from runtime.config import PipelineConfig
from runtime.memory import using

from .text_encoding import module_dtype

_WAYS = {"vae_tiling": "tiling", "vae_slicing": "slicing"}


@contextmanager
def autoencoding(vae: Any, config: PipelineConfig) -> Iterator[None]:
    """Have `vae` ready to encode and to decode.

    Raises:
        UsageError: tiles or slices that its class cannot make.
    """
    with using(vae):
        if config.vae_precision is not None and module_dtype(vae) != (wanted := getattr(torch, config.vae_precision)):
            vae.to(wanted)
        for field, way in _WAYS.items():
            asked = getattr(config, field)
            if asked and not can(vae, way):
                raise UsageError(
                    f"{type(vae).__name__} knows no {way}", expected=f"no --vae-{way}", found=f"--vae-{way}",
                    hint=f"leave out --vae-{way}; --offload component takes less memory",
                )  # fmt: skip
            if can(vae, way):
                getattr(vae, f"{'enable' if asked else 'disable'}_{way}")()
        yield


def can(vae: Any, way: str) -> bool:
    """Whether an autoencoder's class works in tiles (`tiling`) or picture by picture (`slicing`)."""
    return hasattr(vae, f"enable_{way}") and hasattr(vae, f"use_{way}")
