"""What a call of diffusers returned -> pictures or videos.  B: results, F: frames, H, W: pixels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from porter.core.errors import CheckFailed, UsageError
from runtime.calls import PICTURES, VIDEOS


def fields_of(made: Any) -> dict[str, Any]:
    """What a call returned by name; a lone tuple's first value counts as pictures."""
    if isinstance(made, Mapping):
        return dict(made)
    if hasattr(made, "__dataclass_fields__"):
        return {name: getattr(made, name) for name in made.__dataclass_fields__}
    return {"images": made[0] if isinstance(made, tuple) and made else made}


def to_tensor(made: Mapping[str, Any], name: str, *, video: bool, count: int) -> Tensor:
    """(B, 3, H, W), or (B, 3, F, H, W) of videos, in [0, 1], of what a call returned.

    Args:
        made: what `fields_of` said.
        name: of the pipeline.
        count: results that were asked for.

    Raises:
        UsageError: it is something else.
        CheckFailed: it is not finite, or out of range.
    """
    found = next((made[field] for field in (*VIDEOS, *PICTURES) if made.get(field) is not None), None)
    tensor = _stacked(found)
    axes = 5 if video else 4
    if tensor is not None and video and tensor.ndim == 4 and count == 1:
        tensor = tensor[None]  # one video's frames
    whole = _channels_second(tensor) if tensor is not None and tensor.ndim == axes else None
    if whole is None or whole.shape[0] != count:
        raise UsageError(
            f"{name} makes no {'videos' if video else 'pictures'} that can be written",
            expected=f"{count} of 3 colours", found=_described(made, tensor), hint="run it with diffusers",
        )  # fmt: skip
    if not bool(((whole >= 0) & (whole <= 1)).all()):
        odd = int((~whole.isfinite()).sum())
        raise CheckFailed(
            f"denoising: {name} ended in pictures that are none", expected="numbers from 0 to 1",
            found=f"{odd} of {whole.numel()} values are not finite" if odd else f"{float(whole.min()):g} to "
            f"{float(whole.max()):g}", hint="run it again with --dtype float32",
        )  # fmt: skip
    return whole


def further(made: Mapping[str, Any]) -> list[str]:
    """Names of what a call returned beside pictures, which no file holds."""
    known = {*PICTURES, *VIDEOS, "nsfw_content_detected", "nsfw_detected", "watermark_detected"}
    return sorted(name for name, value in made.items() if value is not None and name not in known)


def blackened(made: Mapping[str, Any]) -> list[int]:
    """Which results a safety checker withheld."""
    flags: Any = next((f for n in ("nsfw_content_detected", "nsfw_detected") if (f := made.get(n)) is not None), [])
    return np.flatnonzero(np.asarray(flags, dtype=bool)).tolist()


def _stacked(found: Any) -> Tensor | None:
    """Nested lists of pictures, arrays or tensors as one tensor; floats from 0 to 1."""
    if isinstance(found, Image.Image):
        found = np.asarray(found.convert("RGB"))
    if isinstance(found, np.ndarray):
        found = torch.from_numpy(np.ascontiguousarray(found))
    if isinstance(found, Tensor):
        return found / 255 if found.dtype == torch.uint8 else found if found.is_floating_point() else None
    if not isinstance(found, list | tuple) or not found:
        return None
    parts = [_stacked(each) for each in found]
    shapes = {None if part is None else part.shape for part in parts}
    return torch.stack(parts) if len(shapes) == 1 and None not in shapes else None  # type: ignore[arg-type]


def _channels_second(tensor: Tensor) -> Tensor | None:
    """The axis of colours in the second place, three of them; None: there is no such axis."""
    places = (1, 3) if tensor.ndim == 4 else (2, 1, 4)  # diffusers' own order first
    for colours in (3, 1):  # grey ones are as RGB pictures have them
        for place in places:
            if tensor.shape[place] == colours:
                moved = tensor.movedim(place, 1)
                return moved.expand(-1, 3, *(-1,) * (moved.ndim - 2))
    return None


def _described(made: Mapping[str, Any], tensor: Tensor | None) -> str:
    names = ", ".join(name for name, value in made.items() if value is not None) or "nothing"
    return names if tensor is None else f"{names} of shape {tuple(tensor.shape)}"
