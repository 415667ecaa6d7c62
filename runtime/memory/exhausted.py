"""Running out of memory, as an error that names the stage and the flags that help."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from porter.core.errors import ResourceError

_WORDS = ("can't allocate memory", "not enough memory", "cannot allocate memory", "unable to mmap", "bad_alloc")


class Tried(NamedTuple):
    """What a run already does to need less.

    Attributes:
        stage: where it ran out; None while weights are loaded.
        native: whether a native pipeline runs, which knows offload and other weights.
    """

    stage: str | None = None
    native: bool = False
    offload: str = "none"
    weights: str | None = None
    tiling: bool = False
    batch_size: int = 1
    dtype: torch.dtype | None = None
    compiled: bool = False


def ran_out(error: BaseException) -> bool:
    """Whether an error, or one that it was made of, says that memory ran out, on either device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    said = isinstance(error, RuntimeError | OSError) and any(word in str(error).lower() for word in _WORDS)
    return said or (error.__cause__ is not None and ran_out(error.__cause__))


def advice(tried: Tried) -> list[str]:
    """Flags that were not tried yet, those first that cost least."""
    found = []
    if tried.compiled:
        found.append("no --compile")
    if tried.native and tried.offload == "none":
        found.append("--offload component")
    if tried.native and tried.offload != "layer":
        found.append("--offload layer")
    if tried.native and not tried.tiling and tried.stage in ("decoding", "image_vae_encoding"):
        found.append("--vae-tiling")
    if tried.batch_size > 1:
        found.append(f"--batch-size {tried.batch_size // 2}")
    if tried.dtype in (None, torch.float32):
        found.append("--dtype bfloat16")
    if tried.native and tried.weights is None and tried.stage in (None, "denoising"):
        found.append("--quality lossy --weights fp8")
    return [*found, "smaller --height and --width", "another --device"]


@contextmanager
def out_of_memory(tried: Callable[[], Tried] = Tried) -> Iterator[None]:
    """Running out of memory, on either device, as our error.

    Args:
        tried: what the run that is stopped was.

    Raises:
        ResourceError: with what helps, in the order to try it.
    """
    try:
        yield
    except Exception as error:
        if not ran_out(error):
            raise
        known, text = tried(), str(error)
        where = f" in the stage {known.stage}" if known.stage else " while the weights were loaded" * known.native
        raise ResourceError(
            f"out of memory{where}", found=text.splitlines()[0] if text else None, hint=", or ".join(advice(known))
        ) from error
