"""Pictures as files: rounding, metadata, contact sheet."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from porter.core.errors import BadInputError, MissingError, UsageError
from runtime.image import contact_sheet, png_bytes, read_metadata, to_pil, to_pixels


def test_levels_are_rounded_not_truncated() -> None:
    levels = torch.arange(256) / 255
    images = (levels - 0.4 / 255).clamp(0, 1).reshape(1, 1, 16, 16).expand(2, 3, 16, 16)
    first, second = to_pil(images)
    assert np.asarray(first)[..., 0].reshape(-1).tolist() == list(range(256))
    assert first.tobytes() == second.tobytes()


def test_equals_diffusers_image_processor() -> None:
    from diffusers.image_processor import VaeImageProcessor

    decoded = torch.randn(1, 3, 24, 40, generator=torch.Generator().manual_seed(0))
    (theirs,) = VaeImageProcessor(vae_scale_factor=8).postprocess(decoded, output_type="pil")
    (ours,) = to_pil((decoded * 0.5 + 0.5).clamp(0, 1))
    assert ours.size == (40, 24)
    assert ours.tobytes() == theirs.tobytes()


def test_pixels_are_those_of_diffusers_image_processor() -> None:
    from diffusers.image_processor import VaeImageProcessor

    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8))
    assert torch.equal(to_pixels(picture), VaeImageProcessor(vae_scale_factor=8).preprocess(picture)[0])


def test_metadata_comes_back_and_bytes_are_deterministic(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 8), "navy")
    about = {"prompt": "rød 赤 <b>", "seed": 3}
    data = png_bytes(image, about)
    assert data == png_bytes(image.copy(), dict(reversed(about.items())))
    (tmp_path / "a.png").write_bytes(data)
    assert read_metadata(tmp_path / "a.png") == about
    with Image.open(tmp_path / "a.png") as found:
        assert found.tobytes() == image.tobytes()


def test_metadata_that_is_not_there_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "plain.png").write_bytes(png_bytes(Image.new("RGB", (8, 8))))
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(BadInputError, match="no metadata"):
        read_metadata(tmp_path / "plain.png")
    with pytest.raises(BadInputError, match=r"text\.png"):
        read_metadata(tmp_path / "text.png")
    with pytest.raises(MissingError):
        read_metadata(tmp_path / "none.png")


def test_contact_sheet_enlarges_by_whole_pixels_and_writes_captions() -> None:
    colours = ["red", "green", "blue", "yellow", "black"]
    images = [Image.new("RGB", (64, 64), colour) for colour in colours]
    labels = ["short", "a caption so long that it has to be wrapped over several lines below its picture", "", "x", "y"]
    sheet = contact_sheet(images, labels, 3, cell=128, gap=10)
    assert sheet.width == 10 + 3 * 138
    for i, colour in enumerate(colours[:3]):
        corner = (10 + 138 * i, 10)
        for point in (corner, (corner[0] + 127, corner[1] + 127)):
            assert sheet.getpixel(point) == Image.new("RGB", (1, 1), colour).getpixel((0, 0))
        assert sheet.getpixel((corner[0] - 1, 10)) == (255, 255, 255)
    pixels = np.asarray(sheet.convert("L"))
    below = [pixels[139 : 139 + 20, 10 + 138 * i : 138 + 138 * i] for i in range(3)]
    assert below[0].min() < 100
    assert below[1].min() < 100
    assert below[2].min() == 255  # no caption, no ink
    assert (pixels[:, 277:285] == 255).all()  # nothing spills into the gap between columns


def test_contact_sheet_shrinks_large_pictures_and_keeps_proportions() -> None:
    sheet = contact_sheet([Image.new("RGB", (1024, 512), "red")], ["wide"], 4, cell=128, gap=10)
    assert sheet.width == 148
    red = np.asarray(sheet)[..., 0].astype(int) - np.asarray(sheet)[..., 2] > 200
    assert red.any(axis=1).sum() == 64
    assert red.any(axis=0).sum() == 128


@pytest.mark.parametrize(("count", "labels", "columns"), [(0, 0, 2), (2, 1, 2), (1, 1, 0)])
def test_contact_sheet_refuses_what_does_not_add_up(count: int, labels: int, columns: int) -> None:
    with pytest.raises(UsageError, match="contact sheet"):
        contact_sheet([Image.new("RGB", (4, 4))] * count, ["a"] * labels, columns)
