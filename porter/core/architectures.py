"""Known architectures, told by the templates of their tensor names; the facts stand in each family's `layouts.json`.

A template is a tensor name with its indices left open (`double_blocks.{}.img_attn.qkv.weight`). A file is compared with
every known architecture by the share of templates that both have; what it has alone and what it lacks is kept, so that
a guess always comes with the names that speak for and against it.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property, lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from porter.core.checkpoint import TensorInfo
from porter.core.errors import BadInputError
from porter.core.variants import Shape, Shapes, Variant

LAYOUTS_SCHEMA = "porter.layouts/1"
_MEMBERS = 4  # numbered groups of names that may each be a model
SURE = 0.85  # from this score on a file is called by the architecture's name
ALIKE = 0.9  # share of templates that have the recorded sizes, from which on a file is called a released model's name
_INDEX = re.compile(r"(?:(?<=\.)|^)\d+(?=\.|$)")


@lru_cache(maxsize=1 << 15)
def template(name: str) -> str:
    """A tensor name with its indices left open: `blocks.3.attn.weight` -> `blocks.{}.attn.weight`."""
    return _INDEX.sub("{}", name)


def shapes_of(header: Mapping[str, TensorInfo]) -> dict[str, Shape]:
    """Name -> shape of a header's tensors."""
    return {name: info.shape for name, info in header.items()}


def fold(shapes: Shapes) -> dict[str, Counter[Shape]]:
    """Names with shapes -> how often each shape occurs under each template, in order of appearance."""
    found: dict[str, Counter[Shape]] = {}
    for name, shape in shapes.items():
        found.setdefault(template(name), Counter())[tuple(shape)] += 1
    return found


@dataclass(frozen=True)
class Architecture:
    """One component in one layout, as the code that wrote its checkpoints has it.

    Attributes:
        family: the family's name; None for components that families share.
        component: the component's key in a model_index.json.
        model: the released model where an architecture has several.
        made: the code and version or commit that the facts were made with.
        derived: how they were derived, where the original code could not be run.
        recorded: template -> [count, shape] for each shape, as the file has it.
        drops: beginnings of names that a file may have besides, and that count neither way: the recipe leaves them out.
    """

    family: str | None
    component: str
    layout: str
    class_name: str
    model: str | None
    made: str
    derived: str | None
    recorded: Mapping[str, Any] = field(repr=False)
    variants: tuple[Variant, ...]
    drops: tuple[str, ...] = ()

    @cached_property
    def templates(self) -> dict[str, tuple[tuple[int, Shape], ...]]:
        """template -> (count, shape) for each shape; made when first asked for, as a plan looks at few of the known."""
        return {
            name: tuple((int(count), tuple(shape)) for count, shape in kinds) for name, kinds in self.recorded.items()
        }

    def variant(self, shapes: Shapes, folded: Mapping[str, Counter[Shape]] | None = None) -> Variant | None:
        """The first variant whose conditions all hold; `folded` is `fold(shapes)`, where the caller has it already.

        A variant without sizes of its own is called only where the sizes are the recorded ones.
        """
        folded = fold(shapes) if folded is None else folded
        fitting = (variant for variant in self.variants if variant.fits(shapes, folded))
        return next((each for each in fitting if each.sized or _closeness(folded, self) >= ALIKE), None)

    def released(self, shapes: Shapes) -> str | None:
        """The name of the released model that has these tensors, in these sizes; None where none is known."""
        folded = fold(shapes)
        if found := self.variant(shapes, folded):
            return found.name
        if self.variants:  # they are every released model of the layout
            return None
        return self.model if _closeness(folded, self) >= ALIKE else None


class Guess(NamedTuple):
    """An architecture and how well a file fits it: the share of all templates of both that both have."""

    architecture: Architecture
    score: float
    missing: tuple[str, ...]
    extra: tuple[str, ...]


@cache
def architectures() -> tuple[Architecture, ...]:
    """Every architecture in the catalogue's `layouts.json` files, in a stable order.

    Raises:
        BadInputError: a file of the catalogue is damaged.
    """
    root = Path(next(iter(import_module("conversions").__path__)))
    files = [*sorted(root.glob("*/layouts.json")), *sorted(root.glob("common/*/layouts.json"))]
    return tuple(
        entry for file in files for entry in _read(file, None if file.parent.parent != root else file.parent.name)
    )


def _read(file: Path, family: str | None) -> list[Architecture]:
    try:
        document = json.loads(file.read_bytes())
        if document["schema"] != LAYOUTS_SCHEMA:
            raise ValueError(f"schema {document['schema']}")
        return [_entry(entry, family) for entry in document["layouts"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInputError(f"{file} is damaged", found=str(error), hint="install porter again") from error


def _entry(entry: Mapping[str, Any], family: str | None) -> Architecture:
    variants = [
        Variant(v["name"], v.get("repo"), tuple(v.get("has", ())), tuple(v.get("lacks", ())),
                {n: tuple(s) for n, s in v.get("shapes", {}).items()}, v.get("counts", {}))
        for v in entry.get("variants", ())
    ]  # fmt: skip
    return Architecture(
        family, entry["component"], entry["layout"], entry["class"], entry.get("model"), entry["made"],
        entry.get("derived"), entry["templates"], tuple(variants), tuple(entry.get("drops", ())),
    )  # fmt: skip


@cache
def _by_template() -> dict[str, list[int]]:
    index: dict[str, list[int]] = {}
    for number, known in enumerate(architectures()):
        for name in known.recorded:
            index.setdefault(name, []).append(number)
    return index


def guesses(shapes: Shapes, limit: int = 3) -> list[Guess]:
    """The best fitting architectures, best first; those that share nothing with the file are left out.

    A template counts as shared when its tensors have as many dims on both sides (a linear stored as a convolution is
    another layout).
    """
    folded, index = fold(shapes), _by_template()
    shared: Counter[int] = Counter()
    for name, kinds in folded.items():
        ranks = {len(shape) for shape in kinds}
        for number in index.get(name, ()):
            if any(len(shape) in ranks for _, shape in architectures()[number].recorded[name]):
                shared[number] += 1
    found = []
    for number, common in shared.items():
        known = architectures()[number]
        dropped = sum(name.startswith(known.drops) for name in folded)
        score = common / (len(known.recorded) + len(folded) - dropped - common)
        found.append((score, _closeness(folded, known), number))
    best = sorted(found, key=lambda item: (-item[0], -item[1], item[2]))[:limit]
    return [
        Guess(architectures()[number], score, tuple(n for n in architectures()[number].templates if n not in folded),
              tuple(n for n in folded if n not in architectures()[number].templates
                    and not n.startswith(architectures()[number].drops)))
        for score, _, number in best
    ]  # fmt: skip


def _closeness(folded: Mapping[str, Counter[Shape]], known: Architecture) -> float:
    """Share of the known templates whose shapes are all the same: orders models of one architecture."""
    same = sum(
        {shape: count for count, shape in kinds} == dict(folded[name])
        for name, kinds in known.templates.items()
        if name in folded
    )
    return same / max(1, len(known.templates))


class Part(NamedTuple):
    """Tensors of one file under one prefix: an all-in-one checkpoint has several."""

    prefix: str
    shapes: dict[str, Shape]
    guesses: list[Guess]

    @property
    def sure(self) -> Guess | None:
        """The best guess where it is good enough to be called a match."""
        return self.guesses[0] if self.guesses and self.guesses[0].score >= SURE else None


def parts(shapes: Shapes, *, depth: int = 4) -> list[Part]:
    """A file's tensors, taken apart at the prefixes under which known architectures stand.

    Tensors that fit nothing stay together, as the last part, with the guesses for all of them.
    """
    whole = Part("", dict(shapes), guesses(shapes))
    if whole.sure or depth == 0:
        return [whole]
    groups: dict[str, dict[str, Shape]] = {}
    for name, shape in shapes.items():
        head, dot, rest = name.partition(".")
        groups.setdefault(head if dot else "", {})[rest if dot else name] = shape
    found: list[Part] = []
    left: dict[str, Shape] = {}
    for head, inner in groups.items():
        # Numbers stand for blocks, of which there are many; a few are members of a list of models.
        inside = bool(head) and (not head.isdigit() or len(groups) <= _MEMBERS)
        below = parts(inner, depth=depth - 1) if inside else []
        if any(part.sure for part in below):
            for part in below:
                prefix = f"{head}.{part.prefix}"
                if part.sure:
                    found.append(part._replace(prefix=prefix))
                else:
                    left |= {prefix + name: shape for name, shape in part.shapes.items()}
        else:
            left |= {f"{head}.{name}" if head else name: shape for name, shape in inner.items()}
    if not found:
        return [whole]
    return [*found, *([Part("", left, guesses(left))] if left else [])]


def telling(best: Guess, other: Guess, shapes: Shapes, limit: int = 2) -> list[str]:
    """Templates of the file that `best` knows and `other` does not: what tells the two apart."""
    known, rival = best.architecture.templates, other.architecture.templates
    only = [name for name in dict.fromkeys(map(template, shapes)) if name in known and name not in rival]
    return only[:limit] or [f"lacks {name}" for name in rival if name not in known and name in other.missing][:limit]
