"""Where results go, and how they appear there: complete or not at all, each with what it takes to make it again."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from porter.core.atomic import replace_bytes
from porter.core.errors import ResourceError, UsageError
from runtime.image import png_bytes, to_pil, webp_bytes
from runtime.video import check_encoder, frames_of, mp4_bytes

FORMATS = ("png", "webp", "mp4")
SCHEMA = "porter.image/1"
MAX_NAME = 200  # bytes; file systems take 255, and a temporary name is longer
DEFAULT_FPS = 16


@dataclass(frozen=True)
class Target:
    """One result's file, and its sidecar where metadata is written."""

    file: Path
    sidecar: Path | None

    @property
    def preview(self) -> Path:
        """Where the picture is shown while it is made."""
        return self.file.with_name(f"{self.file.stem}.preview.png")

    @property
    def files(self) -> list[Path]:
        """All that is written."""
        return [self.file] if self.sidecar is None else [self.file, self.sidecar]


def format_of(out: Path | None, wanted: str | None, video: bool) -> str:
    """The format of the results.

    Raises:
        UsageError: pictures as MP4, a name that says another format, or no encoder.
    """
    ending = out.suffix.lower().lstrip(".") if out is not None else ""
    named = ending if ending in FORMATS else None
    chosen = wanted or named or ("mp4" if video else "png")
    if named and wanted and named != wanted:
        raise UsageError(f"{out} is no {wanted} file", expected=f"a name that ends with .{wanted}", found=f".{named}")
    if chosen == "mp4":
        if not video:
            raise UsageError("this model makes pictures, not videos", expected="png | webp", found="mp4")
        check_encoder()
    return chosen


def targets_of(
    out: Path | None, names: Sequence[str], kind: str, *, metadata: bool, overwrite: bool, frames: bool
) -> list[Target]:
    """A target for each of `names`, the file name without its ending.

    Args:
        frames: each result is a folder of numbered pictures: a video that is not written as one.

    Raises:
        UsageError: something is there already, a name is too long, or several results share one file.
        ResourceError: the folder cannot be written.
    """
    out = out if out is not None else Path("videos" if kind == "mp4" or frames else "images")
    if out.suffix.lower() == f".{kind}":
        if len(names) > 1:
            raise UsageError(
                f"{len(names)} results do not fit into one file", expected="a folder", found=str(out),
                hint=f"-o {shlex.quote(str(out.with_suffix('')))}",
            )  # fmt: skip
        files = [out]
    else:
        files = [out / (f"{name}" if frames else f"{name}.{kind}") for name in names]
    if twice := {f for f in files if files.count(f) > 1} if len(files) < 5000 else set():
        raise UsageError(f"two results would be called {sorted(twice)[0].name}", hint="give them names or other seeds")
    longest = max(files, key=lambda file: len(os.fsencode(file.name)))
    if len(os.fsencode(longest.name)) > MAX_NAME:
        raise UsageError(f"the name is too long: {longest.name[:40]}…", hint="a shorter name with -o")
    targets = [Target(file, _sidecar(file, frames) if metadata else None) for file in files]
    taken = [f for target in targets for f in target.files]
    if not overwrite and (there := [f for f in taken if f.exists()]):
        raise UsageError(
            f"{there[0]} is already there" + (f", and {len(there) - 1} more" if len(there) > 1 else ""),
            hint="--overwrite to replace, or another folder with -o",
        )
    _check_writable(targets[0].file.parent, taken, frames)
    return targets


def _sidecar(file: Path, frames: bool) -> Path:
    return file.with_name(f"{file.name}.json") if frames else file.with_suffix(".json")


def _check_writable(wanted: Path, files: Sequence[Path], frames: bool) -> None:
    folder = wanted
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    blocked = [f for f in files if f.is_dir() and not frames]
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK) or blocked:
        raise ResourceError(
            f"nothing can be written to {wanted}",
            found=f"{blocked[0]} is a folder" if blocked
            else f"{folder} is {'not writable' if folder.is_dir() else 'not a folder'}",
            hint="name another folder with -o",
        )  # fmt: skip


def slug(prompt: str) -> str:
    """A prompt's beginning as a file name."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower())[:48].strip("-") or "image"


def write(target: Target, output: Tensor, kind: str, fps: int | None, about: Mapping[str, Any]) -> dict[str, Any]:
    """Write one result and its sidecar; each appears complete or not at all.

    Args:
        output: (3, H, W), or (3, F, H, W) of a video, in [0, 1].

    Returns:
        What the job's document says of it.

    Raises:
        ResourceError: it cannot be written.
    """
    frames = frames_of(output) if output.ndim == 4 else None
    picture = to_pil(output[None])[0] if frames is None else None
    pixels = picture.tobytes() if picture is not None else np.ascontiguousarray(frames).tobytes()
    known = {"schema": SCHEMA, **about, "pixels_sha256": hashlib.sha256(pixels).hexdigest()}
    inside = known if target.sidecar is not None else None
    try:
        target.file.parent.mkdir(parents=True, exist_ok=True)
        if frames is not None and kind != "mp4":
            return _write_frames(target, frames, kind, known)
        if picture is not None:
            data = (png_bytes if kind == "png" else webp_bytes)(picture, inside)
        else:
            assert frames is not None
            data = mp4_bytes(frames, fps or DEFAULT_FPS, inside)
        digest = hashlib.sha256(data).hexdigest()
        if target.sidecar is not None:
            _write_json(target.sidecar, {**known, "file": target.file.name, "file_sha256": digest})
        replace_bytes(target.file, data)
    except OSError as error:
        raise _unwritable(target.file, error) from error
    return {"file": str(target.file), "sidecar": str(target.sidecar) if target.sidecar else None,
            "pixels_sha256": known["pixels_sha256"], "file_sha256": digest}  # fmt: skip


def _write_frames(target: Target, frames: Any, kind: str, known: Mapping[str, Any]) -> dict[str, Any]:
    """A video as a folder of numbered pictures; the sidecar appears last, when all are there."""
    target.file.mkdir(exist_ok=True)
    from PIL import Image

    for number, frame in enumerate(frames):
        data = (png_bytes if kind == "png" else webp_bytes)(Image.fromarray(frame), None)
        replace_bytes(target.file / f"{number:05d}.{kind}", data)
    if target.sidecar is not None:
        _write_json(target.sidecar, {**known, "file": target.file.name, "frames": len(frames)})
    return {"file": str(target.file), "sidecar": str(target.sidecar) if target.sidecar else None,
            "pixels_sha256": known["pixels_sha256"], "file_sha256": None}  # fmt: skip


def write_preview(target: Target, output: Tensor) -> None:
    """Show a picture (3, H, W), or the middle frame of a video (3, F, H, W), beside where it will be."""
    shown = output[:, output.shape[1] // 2] if output.ndim == 4 else output
    try:
        target.preview.parent.mkdir(parents=True, exist_ok=True)
        replace_bytes(target.preview, png_bytes(to_pil(shown[None])[0]))
    except OSError as error:
        raise _unwritable(target.preview, error) from error


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    replace_bytes(path, (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode())


def _unwritable(file: Path, error: OSError) -> ResourceError:
    return ResourceError(
        f"{file} cannot be written", found=error.strerror or str(error), hint="name another folder with -o"
    )
