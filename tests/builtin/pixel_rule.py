"""The rule that decides, from pixels alone, whether a picture shows what its caption says.

Written against the caption's grammar, not against the code that draws the training scenes: the caption is parsed here,
each pixel is named by its nearest palette colour, connected regions are measured, and each region's outline is compared
with ideal shapes filling its bounding box.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

PALETTE = {
    "red": (220, 30, 35),
    "green": (25, 150, 60),
    "blue": (35, 70, 215),
    "yellow": (250, 215, 40),
    "purple": (140, 45, 165),
    "orange": (245, 135, 25),
    "white": (248, 248, 248),
    "black": (18, 18, 18),
}
NAMES = list(PALETTE)
SHAPES = ("circle", "square", "triangle", "cross")
THING = re.compile(r"a (small|large) (\w+) (circle|square|triangle|cross)")
BACKGROUND = re.compile(r"an? (\w+) background")

SPECK = 14  # regions of fewer pixels are specks; together they may not exceed SPECKS_ALLOWED
SPECKS_ALLOWED = 14
SAME_COLOUR = 0.85  # share of a region's inner pixels that must have its colour
FULL_SHAPE = 0.85  # overlap (intersection over union) with the ideal shape
LARGE_FROM = 9.6  # half extent in pixels from which an object counts as large
NEAR_PALETTE = 48.0  # RGB distance within which a pixel has a palette colour
CRISP = 1.3  # pixels between two colours, per pixel of outline


@dataclass(frozen=True)
class Seen:
    """One region of the picture, measured."""

    shape: str
    overlap: float
    colour: str
    purity: float
    size: str
    x: float
    y: float
    outline: int


def expected(caption: str) -> tuple[str, list[tuple[str, str, str, str]]]:
    """Background and (size, colour, shape, place) for each object; place is like "left", "top left" or "center"."""
    background = BACKGROUND.search(caption)
    things = list(THING.finditer(caption))
    assert background and things, caption
    if len(things) == 1:
        place = re.search(r"(?:in the|on the|at the) (center|(?:top |bottom )?(?:left|right)|top|bottom)", caption)
        assert place, caption
        return background[1], [(*things[0].groups(), place[1])]  # type: ignore[list-item]
    between = caption[things[0].end() : things[1].start()]
    side = re.search(r"left|right|top|bottom|above|below", between)
    assert side, caption
    one = {"above": "top", "below": "bottom"}.get(side[0], side[0])
    other = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}[one]
    return background[1], [(*things[0].groups(), one), (*things[1].groups(), other)]  # type: ignore[list-item]


def judge(picture: NDArray[np.uint8], caption: str) -> list[str]:
    """Everything that is wrong with a (64, 64, 3) picture; an empty list means that all of the caption is right."""
    background, things = expected(caption)
    named, distance = _name_pixels(picture)
    wrong: list[str] = []
    border = np.concatenate([named[0], named[-1], named[:, 0], named[:, -1]])
    if (border == NAMES.index(background)).mean() < 0.9:
        wrong.append("background")
    regions = _regions(named != NAMES.index(background))
    specks = sum(int(r.sum()) for r in regions if r.sum() < SPECK)
    regions = [r for r in regions if r.sum() >= SPECK]
    if specks > SPECKS_ALLOWED:
        wrong.append("specks")
    if len(regions) != len(things):
        return [*wrong, f"{len(regions)} objects"]
    seen = [_measure(region, named) for region in regions]
    for size, colour, shape, place in things:
        here = [s for s in seen if _stands(s, place, alone=len(things) == 1)]
        if len(here) != 1:
            wrong.append("place")
            continue
        if here[0].colour != colour or here[0].purity < SAME_COLOUR:
            wrong.append("colour")
        if here[0].shape != shape or here[0].overlap < FULL_SHAPE:
            wrong.append("shape")
        if here[0].size != size:
            wrong.append("size")
    if blurred(distance, seen) > CRISP:
        wrong.append("blurred")
    return wrong


def blurred(distance: NDArray[np.float64], seen: list[Seen]) -> float:
    """Pixels of no palette colour, per pixel of outline: about 0.7 for an anti-aliased edge, more for a soft one."""
    return float((distance > NEAR_PALETTE).sum()) / max(1, sum(s.outline for s in seen))


def _name_pixels(picture: NDArray[np.uint8]) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    gaps = np.linalg.norm(picture[:, :, None].astype(float) - np.array(list(PALETTE.values()), float), axis=-1)
    return gaps.argmin(-1), gaps.min(-1)


def _regions(mask: NDArray[np.bool_]) -> list[NDArray[np.bool_]]:
    """Regions of `mask` connected over edges, by flood fill."""
    left, found = mask.copy(), []
    while left.any():
        region = np.zeros_like(left)
        stack = [tuple(np.argwhere(left)[0])]
        while stack:
            y, x = stack.pop()
            if 0 <= y < left.shape[0] and 0 <= x < left.shape[1] and left[y, x]:
                left[y, x], region[y, x] = False, True
                stack += [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
        found.append(region)
    return found


def _measure(region: NDArray[np.bool_], named: NDArray[np.intp]) -> Seen:
    ys, xs = np.nonzero(region)
    top, bottom, left, right = ys.min(), ys.max() + 1, xs.min(), xs.max() + 1
    padded = np.pad(region, 1)
    inner = region & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    inner = inner if inner.any() else region
    counts = np.bincount(named[inner], minlength=len(NAMES))
    overlaps = {s: _best_overlap(region, (top, bottom, left, right), s) for s in SHAPES}
    shape = max(overlaps, key=overlaps.__getitem__)
    reach = max(bottom - top, right - left) / 2
    return Seen(
        shape=shape,
        overlap=overlaps[shape],
        colour=NAMES[int(counts.argmax())],
        purity=float(counts.max() / counts.sum()),
        size="large" if reach >= LARGE_FROM else "small",
        x=float(left + right) / 2,
        y=float(top + bottom) / 2,
        outline=int((region & ~inner).sum()),
    )


def _best_overlap(region: NDArray[np.bool_], box: tuple[int, int, int, int], shape: str) -> float:
    """The best overlap with the ideal shape in the region's box, or in one a pixel larger on any side.

    A corner that covers less than half of its pixel, such as a small triangle's apex, is not in the region.
    """
    top, bottom, left, right = box
    padded = np.pad(region, 1)
    return max(
        _overlap(padded[top + 1 - a : bottom + 1 + b, left + 1 - c : right + 1 + d], shape)
        for a, b, c, d in itertools.product((0, 1), repeat=4)
    )


def _overlap(box: NDArray[np.bool_], shape: str) -> float:
    """Intersection over union of a region's bounding box with the ideal shape that fills it."""
    height, width = box.shape
    v = (np.arange(height)[:, None] + 0.5) / height * 2 - 1
    u = (np.arange(width)[None, :] + 0.5) / width * 2 - 1
    ideal = {
        "circle": u * u + v * v <= 1,
        "square": np.ones_like(box),
        "triangle": np.abs(u) <= (v + 1) / 2,
        "cross": np.minimum(np.abs(u) + 0 * v, np.abs(v) + 0 * u) <= 0.34,
    }[shape]
    return float((box & ideal).sum() / (box | ideal).sum())


def _stands(seen: Seen, place: str, *, alone: bool) -> bool:
    column = "left" if seen.x < 24 else "right" if seen.x > 40 else ""
    row = "top" if seen.y < 24 else "bottom" if seen.y > 40 else ""
    if alone:
        return " ".join(filter(None, (row, column))) == place.replace("center", "")
    return place in (row, column)
