"""Released models of one architecture, told by a file's names and shapes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]


@dataclass(frozen=True)
class Variant:
    """A released model of an architecture, told by one file's names and shapes.

    Attributes:
        has, lacks: tensor names or templates that stand in the file, or do not.
        shapes: name or template -> shape, None for any size; for a template, the first tensor's.
        counts: template -> how many tensors it has.
    """

    name: str
    repo: str | None = None
    has: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    shapes: Mapping[str, tuple[int | None, ...]] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)

    def fits(self, shapes: Shapes, templates: Mapping[str, Counter[Shape]]) -> bool:
        """Whether every condition holds."""

        def shape_of(name: str) -> Shape | None:
            return shapes.get(name) or next(iter(templates.get(name, ())), None)

        return (
            all(name in shapes or name in templates for name in self.has)
            and not any(name in shapes or name in templates for name in self.lacks)
            and all(_same(shape_of(name), wanted) for name, wanted in self.shapes.items())
            and all(templates.get(name, Counter()).total() == count for name, count in self.counts.items())
        )

    @property
    def sized(self) -> bool:
        """Whether a condition of it is a size: a depth, or all dims of a tensor."""
        return bool(self.counts) or any(None not in shape for shape in self.shapes.values())

    def evidence(self) -> list[str]:
        """The conditions, as short words."""
        return [
            *(f"has {name}" for name in self.has),
            *(f"lacks {name}" for name in self.lacks),
            *(f"{n} is [{', '.join('?' if s is None else str(s) for s in shape)}]" for n, shape in self.shapes.items()),
            *(f"{count} x {name}" for name, count in self.counts.items()),
        ]


def _same(found: Shape | None, wanted: tuple[int | None, ...]) -> bool:
    return found is not None and len(found) == len(wanted) and all(
        w is None or w == f for f, w in zip(found, wanted, strict=True)
    )  # fmt: skip
