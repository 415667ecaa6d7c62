"""Pictures: from tensors to files with metadata, and contact sheets.  B: images, H, W: pixels."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from porter.core.errors import BadInputError, MissingError, UsageError

KEYWORD = "porter"  # of the PNG text chunk that holds the metadata
DESCRIPTION = 0x010E  # EXIF's ImageDescription


def to_pil(images: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) in [0, 1] -> RGB pictures, rounded to the nearest of 256 levels."""
    pixels = images.detach().permute(0, 2, 3, 1).float().cpu().numpy()
    return [Image.fromarray(np.round(p * 255).astype(np.uint8)) for p in pixels]


def to_pixels(image: Image.Image) -> Tensor:
    """An RGB picture -> (3, H, W) in [-1, 1], as autoencoders take it."""
    levels = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255.0)  # (H, W, 3)
    return 2.0 * levels.permute(2, 0, 1) - 1.0


def png_bytes(image: Image.Image, metadata: Mapping[str, Any] | None = None) -> bytes:
    """A PNG file; `metadata` goes into one text chunk as JSON. The same picture and metadata give the same bytes."""
    info = PngInfo()
    if metadata is not None:
        info.add_itxt(KEYWORD, json.dumps(metadata, ensure_ascii=False, sort_keys=True))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def webp_bytes(image: Image.Image, metadata: Mapping[str, Any] | None = None) -> bytes:
    """A lossless WebP file; `metadata` goes into its EXIF description as JSON."""
    exif = Image.Exif()
    if metadata is not None:
        exif[DESCRIPTION] = json.dumps(metadata, sort_keys=True)  # ASCII, as EXIF has it
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", lossless=True, quality=100, exact=True, **({"exif": exif} if len(exif) else {}))
    return buffer.getvalue()


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The metadata that `png_bytes`, `webp_bytes` or `video.mp4_bytes` wrote.

    Raises:
        MissingError: there is no such file.
        BadInputError: it cannot be read, or holds no metadata of porter's.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingError(f"no such picture: {path}", hint="porter generate <port> <prompt>")
    if path.suffix.lower() == ".mp4":
        from runtime.video import description

        found = description(path)
    else:
        found = _text_of(path)
    try:
        document = json.loads(found) if isinstance(found, str) else None
    except ValueError:
        document = None
    if not isinstance(document, dict):
        expected = f"a PNG text chunk called {KEYWORD}, or a WebP's or MP4's description"
        raise BadInputError(f"{path} holds no metadata of porter's", expected=expected)
    return document


def _text_of(path: Path) -> Any:
    try:
        with Image.open(path) as image:
            image.load()
            return image.info.get(KEYWORD) or image.getexif().get(DESCRIPTION)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadInputError(f"{path} is not a picture that can be read", found=str(error)) from error


def contact_sheet(
    images: Sequence[Image.Image],
    labels: Sequence[str],
    columns: int,
    *,
    cell: int = 192,
    font_size: int = 13,
    gap: int = 12,
) -> Image.Image:
    """Pictures in rows of `columns`, enlarged to `cell` pixels by whole pixels, each with its caption beneath.

    Raises:
        UsageError: no pictures, not one label for each, or no columns.
    """
    if not images or len(images) != len(labels) or columns < 1:
        raise UsageError(
            "a contact sheet needs one label for each picture, and at least one column",
            found=f"{len(images)} pictures, {len(labels)} labels, {columns} columns",
        )
    columns = min(columns, len(images))
    font = ImageFont.load_default(size=font_size)
    texts = [_wrap(label, font, cell) for label in labels]
    line = font_size + 4
    rows = [range(start, min(start + columns, len(images))) for start in range(0, len(images), columns)]
    scaled = [_enlarge(image.convert("RGB"), cell) for image in images]
    heights = [(max(scaled[i].height for i in row), gap // 2 + line * max(len(texts[i]) for i in row)) for row in rows]
    width = gap + columns * (cell + gap)
    sheet = Image.new("RGB", (width, gap + sum(picture + text + gap for picture, text in heights)), "white")
    draw, top = ImageDraw.Draw(sheet), gap
    for row, (picture, text) in zip(rows, heights, strict=True):
        for column, i in enumerate(row):
            left = gap + column * (cell + gap)
            sheet.paste(scaled[i], (left + (cell - scaled[i].width) // 2, top))
            for number, words in enumerate(texts[i]):
                draw.text((left, top + picture + gap // 2 + number * line), words, font=font, fill="black")
        top += picture + text + gap
    return sheet


def _enlarge(image: Image.Image, cell: int) -> Image.Image:
    """The largest whole multiple that fits `cell`; pictures above it shrink smoothly."""
    longest = max(image.size)
    if longest > cell:
        size = (max(1, image.width * cell // longest), max(1, image.height * cell // longest))
        return image.resize(size, Image.Resampling.LANCZOS)
    factor = cell // longest
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _wrap(text: str, font: Any, width: int) -> list[str]:
    """Words in lines no wider than `width` pixels; a word wider than that is broken."""
    lines, current = [], ""
    for word in text.split():
        while word:
            joined = f"{current} {word}".strip()
            if font.getlength(joined) <= width:
                current, word = joined, ""
            elif current:
                lines.append(current)
                current = ""
            else:
                fits = next(n for n in range(len(word), 0, -1) if n == 1 or font.getlength(word[:n]) <= width)
                lines.append(word[:fits])
                word = word[fits:]
    return [*lines, current] if current or not lines else lines
