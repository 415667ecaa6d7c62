"""Videos as MP4 files (H.264 through PyAV) with metadata.  F: frames, H, W: pixels.

H.264 is lossy, so a file's frames are not bit by bit what was made; the metadata holds the hash of what was made.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from porter.core.errors import BadInputError, UsageError

CRF = 18  # x264's quality: 18 is taken for visually lossless


def frames_of(video: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """(3, F, H, W) in [0, 1] -> (F, H, W, 3) rounded to the nearest of 256 levels."""
    pixels = video.detach().permute(1, 2, 3, 0).float().cpu().numpy()
    made: np.ndarray[Any, np.dtype[np.uint8]] = np.round(pixels * 255).astype(np.uint8)
    return made


def check_encoder() -> None:
    """Raises UsageError where no MP4 can be written, before anything is computed."""
    _av()


def mp4_bytes(
    frames: np.ndarray[Any, np.dtype[np.uint8]], fps: int, metadata: Mapping[str, Any] | None = None
) -> bytes:
    """An MP4 file of (F, H, W, 3) frames; `metadata` goes into its comment as JSON. The same input, the same bytes.

    Raises:
        UsageError: PyAV is not installed, or a side is odd, which H.264 with halved colour can't hold.
    """
    av = _av()
    _, height, width, _ = frames.shape
    if height % 2 or width % 2:
        raise UsageError("a video needs even sides", expected="even height and width", found=f"{height} x {width}")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        if metadata is not None:
            container.metadata["comment"] = json.dumps(metadata, sort_keys=True)
        stream = container.add_stream("libx264", rate=Fraction(fps))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        # One thread: the bytes depend on how x264 shares its work.
        stream.options = {"crf": str(CRF), "preset": "medium", "threads": "1", "flags": "+bitexact"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def description(path: Path) -> str | None:
    """The comment of an MP4 file, or None.

    Raises:
        BadInputError: it is no video that can be read.
        UsageError: PyAV is not installed.
    """
    av = _av()
    try:
        with av.open(str(path)) as container:
            found: str | None = container.metadata.get("comment")
            return found
    except (av.FFmpegError, OSError, ValueError) as error:
        raise BadInputError(f"{path} is not a video that can be read", found=str(error)[:200]) from error


def _av() -> Any:
    try:
        import av
    except ImportError as error:
        raise UsageError(
            "videos need PyAV", expected="the extra `video`", found="no module av",
            hint="pip install 'diffusion-porter[video]', or --format png for single frames",
        ) from error  # fmt: skip
    return av
