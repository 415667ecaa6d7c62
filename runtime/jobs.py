"""What `porter generate` is asked for: one job, and the pictures or videos that it consists of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from porter.core.errors import BadInputError, MissingError, UsageError
from porter.core.strictjson import parse_json
from runtime.image import read_metadata
from runtime.registry import RunOptions

# Fields of a request that make a result, beside prompt and seed: what metadata holds and `from_metadata` repeats.
FIELDS = (
    "negative_prompt", "height", "width", "num_frames", "fps", "num_inference_steps", "guidance_scale",
    "guidance_scale_2", "true_cfg_scale", "max_sequence_length",
)  # fmt: skip
_LINES = ("prompt", "seed", "name", *FIELDS)  # what a line of a prompt file may say
MAX_PROMPTS = 100_000
MAX_PROMPT_BYTES = 1 << 20


@dataclass(frozen=True)
class Ask:
    """One picture or video: `fields` are those of `Req` that differ from its defaults."""

    prompt: str
    seed: int | None = None
    name: str | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class GenerateJob:
    """What is asked for; None is unset.

    Attributes:
        asks: the pictures in order; each is made `num_images` times with following seeds.
        images, mask, last_image: files of given pictures, the same for every ask.
        batch_size: how many are made at once; it changes no number by more than rounding.
        image_format: `png`, `webp` or `mp4`; None: by the name of `out`, else png, of videos mp4.
        preview_every: write a preview after so many steps; 0: none.
        repeats: metadata of a result that this job repeats.
    """

    port: str
    asks: Sequence[Ask]
    seed: int | None = None
    num_images: int = 1
    batch_size: int = 1
    images: tuple[Path, ...] = ()
    mask: Path | None = None
    last_image: Path | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    options: RunOptions = field(default_factory=RunOptions)
    loras: tuple[tuple[Path, float], ...] = ()
    out: Path | None = None
    image_format: str | None = None
    overwrite: bool = False
    metadata: bool = True
    preview_every: int = 0
    repeats: Mapping[str, Any] | None = None


def check_text(text: str | None) -> None:
    """Raises UsageError: letters that no UTF-8 text has, or a text beyond any prompt."""
    if text and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise UsageError("the prompt is not UTF-8", found=ascii(text)[:80], hint="type it again in a UTF-8 terminal")
    if text and len(text.encode()) > MAX_PROMPT_BYTES:
        raise UsageError("the prompt is longer than any model reads", found=f"{len(text.encode())} bytes")


def read_prompts(path: Path, fields: Mapping[str, Any]) -> list[Ask]:
    """A prompt file: a prompt per line, or (`.jsonl`) an object per line with `prompt` and fields of its own.

    Args:
        fields: what holds for every line that does not say otherwise.

    Raises:
        MissingError: there is no such file.
        BadInputError: it is not UTF-8, empty, too long, or a line is not what it should be; the line is named.
    """
    if not path.is_file():
        raise MissingError(f"no such prompt file: {path}", expected="a text file with a prompt per line, or a .jsonl")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise BadInputError(f"{path} is not UTF-8", found=str(error)) from error
    numbered = [(i, line) for i, line in enumerate(lines, 1) if line.strip()]
    if not numbered or len(numbered) > MAX_PROMPTS:
        raise BadInputError(f"{path} holds {len(numbered)} prompts", expected=f"1 to {MAX_PROMPTS}")
    if path.suffix.lower() != ".jsonl":
        return [Ask(line.strip(), fields=fields) for _, line in numbered]
    return [_line(path, number, line, fields) for number, line in numbered]


def _line(path: Path, number: int, line: str, fields: Mapping[str, Any]) -> Ask:
    where = f"{path}:{number}"
    try:
        found = parse_json(line.encode())
    except (ValueError, RecursionError) as error:
        raise BadInputError(f"{where} is not JSON", found=str(error)[:200]) from error
    if not isinstance(found, dict) or not isinstance(found.get("prompt"), str):
        raise BadInputError(f"{where} has no prompt", expected='{"prompt": "...", "seed": 1, ...}', found=line[:80])
    if unknown := sorted(found.keys() - set(_LINES)):
        raise BadInputError(
            f"{where} has the unknown key {unknown[0]}", expected=", ".join(_LINES), found=", ".join(unknown)
        )
    seed, name = found.get("seed"), found.get("name")
    if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool)):
        raise BadInputError(f"{where}: seed is no whole number", expected="a whole number", found=str(seed)[:40])
    if name is not None and (not isinstance(name, str) or not name or "/" in name or name.startswith(".")):
        raise BadInputError(f"{where}: name is no file name", expected="a name without a path", found=repr(name)[:60])
    own = {key: value for key, value in found.items() if key in FIELDS and value is not None}
    return Ask(found["prompt"], seed, name, {**fields, **own})


def read_settings(texts: Sequence[str]) -> dict[str, Any]:
    """`NAME=VALUE` settings: VALUE as JSON, or the text itself, or a picture where it is `@FILE`.

    Raises:
        UsageError: a text without a name, or a name twice.
        MissingError, BadInputError: a picture.
    """
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier() or name in found:
            raise UsageError(f"--set {text}", expected="NAME=VALUE, each name once", found=text[:80])
        if value.startswith("@"):
            found[name] = read_image(Path(value[1:]))
            continue
        try:
            found[name] = parse_json(value.encode())
        except (ValueError, RecursionError):
            found[name] = value
    return found


def read_image(path: Path) -> Image.Image:
    """A given picture, RGB, turned as its camera held it.

    Raises:
        MissingError: there is no such file.
        BadInputError: it is no picture that can be read, or one of absurd size.
    """
    from PIL import ImageOps

    if not path.is_file():
        raise MissingError(f"no such picture: {path}", hint="name an existing file with --image")
    try:
        with Image.open(path) as opened:
            turned: Image.Image = ImageOps.exif_transpose(opened)
            return turned.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadInputError(f"{path} is not a picture that can be read", found=str(error)[:200]) from error


def sha256_of(image: Image.Image) -> str:
    """sha256 of a picture's pixels: what metadata says of a given picture."""
    return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()


def asks_of_metadata(path: Path) -> tuple[list[Ask], dict[str, Any]]:
    """The ask that repeats a result, from its file or its sidecar, and all that it says.

    Raises:
        MissingError, BadInputError: no such file, or it does not say how it was made.
    """
    if path.suffix.lower() == ".json":
        if not path.is_file():
            raise MissingError(f"no such file: {path}", hint="name a picture, a video or a sidecar that porter wrote")
        try:
            about = parse_json(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise BadInputError(f"{path} is not JSON", found=str(error)[:200]) from error
    else:
        about = read_metadata(path)
    if not isinstance(about, dict) or not str(about.get("schema", "")).startswith("porter.image/"):
        raise BadInputError(
            f"{path} does not say how it was made", expected='"schema": "porter.image/…"', found=str(about)[:60]
        )
    prompt, seed = about.get("prompt"), about.get("seed")
    if not isinstance(prompt, str) or not isinstance(seed, int):
        raise BadInputError(f"{path} names no prompt and seed", found=json.dumps([prompt, seed])[:80])
    return [Ask(prompt, seed, fields={n: about[n] for n in FIELDS if about.get(n) is not None})], about


def dtype_of(name: str | None) -> torch.dtype | None:
    """A torch dtype by its name."""
    return None if name is None else getattr(torch, name)
