"""The little world that `builtin:tiny-flux` paints: flat backgrounds with one or two plain shapes, and captions.

A scene is drawn procedurally (64 x 64, edges anti-aliased by 4 x 4 supersampling) and described by one of several
sentence templates. Two-object captions name the objects in either order, so that neither word order nor the set of
words tells which colour belongs to which shape or side: the caption has to be read.

Combinations are held out of training by hash: a one-object scene by its (shape, colour, background), a two-object
scene by its (shape, colour, shape, colour). `is_held_out` decides; the trainer never draws a held-out scene.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IMAGE_SIZE = 64
SUPERSAMPLING = 4

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 35),
    "green": (25, 150, 60),
    "blue": (35, 70, 215),
    "yellow": (250, 215, 40),
    "purple": (140, 45, 165),
    "orange": (245, 135, 25),
    "white": (248, 248, 248),
    "black": (18, 18, 18),
}
SHAPES = ("circle", "square", "triangle", "cross")
SIZES: dict[str, float] = {"small": 8.0, "large": 12.0}  # half extent in pixels

# Centre of an object alone in the picture, in pixels.
PLACES: dict[str, tuple[float, float]] = {
    "in the center": (32, 32),
    "on the left": (16, 32),
    "on the right": (48, 32),
    "at the top": (32, 16),
    "at the bottom": (32, 48),
    "in the top left corner": (16, 16),
    "in the top right corner": (48, 16),
    "in the bottom left corner": (16, 48),
    "in the bottom right corner": (48, 48),
}
# The two places of a pair, first object first.
PAIRS: dict[str, tuple[tuple[float, float], tuple[float, float]]] = {
    "side by side": ((16, 32), (48, 32)),
    "stacked": ((32, 16), (32, 48)),
}


@dataclass(frozen=True)
class Thing:
    """One object. `place` is a key of PLACES; in a pair it is the side on which the object stands."""

    shape: str
    colour: str
    size: str
    place: str

    @property
    def noun(self) -> str:
        return f"{self.size} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """A background colour with one object, or two (left then right, or top then bottom)."""

    background: str
    things: tuple[Thing, ...]

    @property
    def combination(self) -> str:
        if len(self.things) == 1:
            return f"{self.things[0].shape} {self.things[0].colour} {self.background}"
        return " ".join(f"{t.shape} {t.colour}" for t in self.things)


def is_held_out(scene: Scene) -> bool:
    """True for the tenth of all combinations that training never sees."""
    return hashlib.sha256(scene.combination.encode()).digest()[0] < 26


def random_scene(rng: random.Random, objects: int) -> Scene:
    """A scene with `objects` (1 or 2) objects; no colour repeats between an object and its background."""
    background = rng.choice(list(COLOURS))
    colours = [c for c in COLOURS if c != background]
    sides = rng.choice([("on the left", "on the right"), ("at the top", "at the bottom")])
    places = [rng.choice(list(PLACES))] if objects == 1 else list(sides)
    things = tuple(Thing(rng.choice(SHAPES), rng.choice(colours), rng.choice(list(SIZES)), place) for place in places)
    return Scene(background, things)


def held_out_captions(count: int, objects: int, seed: int = 7) -> list[tuple[Scene, str]]:
    """`count` distinct held-out scenes with captions; the same ones for the same arguments."""
    rng = random.Random(seed * 1000 + objects)
    found: dict[Scene, str] = {}
    while len(found) < count:
        scene = random_scene(rng, objects)
        if is_held_out(scene):
            found.setdefault(scene, caption(scene, rng))
    return list(found.items())


def caption(scene: Scene, rng: random.Random) -> str:
    """One of several sentences that describe the scene completely."""
    if len(scene.things) == 1:
        thing = scene.things[0]
        what = f"a {thing.noun} {thing.place}"
    else:
        first, second = scene.things
        side_by_side = first.place == "on the left"
        one, other = f"a {first.noun}", f"a {second.noun}"
        what = rng.choice(
            [
                f"{one} {first.place} and {other} {second.place}",
                f"{other} {second.place} and {one} {first.place}",
                f"{one} {'left of' if side_by_side else 'above'} {other}",
                f"{other} {'right of' if side_by_side else 'below'} {one}",
            ]
        )
    ground = f"{'an' if scene.background[0] in 'aeiou' else 'a'} {scene.background} background"
    return rng.choice([f"{what}, on {ground}", f"{ground} with {what}"])


def draw(scene: Scene, rng: random.Random, *, loose: bool = False) -> NDArray[np.uint8]:
    """Paint the scene -> (64, 64, 3) uint8, RGB. Objects stand off their place by up to a pixel each way.

    With `loose` by up to two, in fractions of a pixel, and vary in size: an autoencoder should see every edge, but a
    small denoiser that has to choose among so many outlines draws a mixture of them.
    """
    image = np.tile(np.array(COLOURS[scene.background], np.float32), (IMAGE_SIZE, IMAGE_SIZE, 1))
    for thing in scene.things:
        x, y = PLACES[thing.place]
        if loose:
            reach = SIZES[thing.size] * rng.uniform(0.92, 1.08)
            right, down = rng.uniform(-2, 2), rng.uniform(-2, 2)
        else:
            reach, right, down = SIZES[thing.size], rng.randint(-1, 1), rng.randint(-1, 1)
        covered = _coverage(thing.shape, x + right, y + down, reach)[..., None]
        image = image * (1 - covered) + np.array(COLOURS[thing.colour], np.float32) * covered
    return np.round(image).astype(np.uint8)


def _coverage(shape: str, x: float, y: float, reach: float) -> NDArray[np.float32]:
    """Share of each pixel that a shape of half extent `reach` around (x, y) covers -> (64, 64) in 0..1."""
    points = (np.arange(IMAGE_SIZE * SUPERSAMPLING, dtype=np.float32) + 0.5) / SUPERSAMPLING
    u, v = (points[None, :] - x) / reach, (points[:, None] - y) / reach
    if shape == "circle":
        inside = u * u + v * v <= 1
    elif shape == "square":
        inside = np.maximum(abs(u), abs(v)) <= 0.9
    elif shape == "triangle":  # upright, apex on top
        inside = (v <= 0.85) & (abs(u) <= (v + 1) / 1.85)
    elif shape == "cross":
        inside = (np.minimum(abs(u), abs(v)) <= 0.34) & (np.maximum(abs(u), abs(v)) <= 1)
    else:
        raise ValueError(f"unknown shape {shape!r}; expected one of {SHAPES}")
    blocks = inside.reshape(IMAGE_SIZE, SUPERSAMPLING, IMAGE_SIZE, SUPERSAMPLING)
    covered: NDArray[np.float32] = blocks.mean(axis=(1, 3), dtype=np.float32)
    return covered
