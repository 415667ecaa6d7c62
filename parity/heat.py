"""The heat map of a report: modules in order of execution against metrics, grouped by block, coloured by magnitude."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from parity.compare import DIFFERS, IDENTICAL, OVER, PRECISION, ROUNDING, SKIPPED

LEVELS = 18  # 0 for an exact zero, 1 for 1e-16 and less, 17 for one and more: a colour for each decade
_GRAVITY = {IDENTICAL: 0, ROUNDING: 1, PRECISION: 2, DIFFERS: 3, OVER: 3, SKIPPED: 4}
# A block is what a module's path names up to its first number, or else up to the first name that ends in one.
_NUMBERED = (re.compile(r"^(.*?(?:^|\.)\d+)\."), re.compile(r"^(.*?\d)\."))

MODULES = (
    ("input", "what it receives: difference in float64, free-running"),
    ("float32", "what it answers: difference in float32, free-running"),
    ("float64", "the same in float64, which decides"),
    ("reset", "difference in float64 when it gets the reference's own input"),
    ("ref. noise", "the reference's float32 against its own float64"),
    ("own noise", "the candidate's float32 against its own float64"),
    ("scaled", "difference in float32 over max(1, the largest value)"),
    ("1 − cos", "one less the cosine of both answers; printed, never decisive"),
)
BEFORE = "before the steps"
STAGES = (MODULES[1], MODULES[2], *MODULES[4:])


@dataclass(frozen=True)
class Cell:
    """One number; `level` is its colour (None: there is no number), `bad` that the verdict behind it fails."""

    value: float | None
    bad: bool = False

    @property
    def level(self) -> int | None:
        if self.value is None:
            return None
        if self.value <= 0:
            return 0
        return min(max(math.floor(math.log10(self.value)) + 17, 1), LEVELS - 1)


@dataclass(frozen=True)
class Row:
    """One call of a module, or one stage; `call` is (pass, module, number of the call).

    `own` says that it fails although it got the reference's input.
    """

    group: str
    name: str
    status: str
    passed: bool
    cells: tuple[Cell, ...]
    guilty: bool = False
    own: bool = False
    call: tuple[str, str, int] = ("", "", 0)


@dataclass
class Group:
    """Neighbouring rows of one block, and the largest of each of their numbers; `open`: unfolded from the start."""

    name: str
    rows: list[Row] = field(default_factory=list)
    open: bool = False

    @property
    def cells(self) -> tuple[Cell, ...]:
        return tuple(
            Cell(_largest(c.value for c in column), any(c.bad for c in column))
            for column in zip(*(r.cells for r in self.rows), strict=True)
        )

    @property
    def status(self) -> str:
        return _gravest(r.status for r in self.rows)

    @property
    def passed(self) -> bool:
        return all(r.passed for r in self.rows)

    @property
    def guilty(self) -> bool:
        return any(r.guilty for r in self.rows)


def module_groups(component: dict[str, Any]) -> list[Group]:
    """A component result's modules, one row a call, in order of execution."""
    events: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for event in component["modules"]:
        events.setdefault((event["pass"], event["reference"], event["call"]), []).append(event)
    several = len({of for of, _, _ in events}) > 1
    blocks = {_block(path) for _, path, _ in events}
    again = {(of, path) for of, path, call in events if call}
    guilty = component["guilty"] or {}
    rows = []
    for (of, path, call), found in events.items():
        block = _block(path) or (path if path in blocks else "")
        received, answered = ([e for e in found if e["kind"] == kind] for kind in ("in", "out"))
        free, resets = [e["free"] for e in answered], [e["reset"] for e in answered if e["reset"]]
        entered = [e["free"] for e in received]
        name = (path.removeprefix(block + ".") if block else path) or "the model"
        rows.append(Row(
            f"{of} · {block}" if several and block else block or (of if several else ""),
            f"{name} call {call}" if (of, path) in again else name,
            _gravest(e["free"]["status"] for e in found),
            all(e["free"]["passed"] for e in found),
            (_cell(entered, "max_abs64"), _cell(free, "max_abs"), _cell(free, "max_abs64"),
             _cell(resets, "max_abs64"), *_context(free)),
            guilty.get("reference") == path and guilty.get("pass") == of and guilty.get("call") == call,
            any(not v["passed"] for v in resets),
            (of, path, call),
        ))  # fmt: skip
    return _grouped(rows)


def stage_groups(pipeline: dict[str, Any]) -> list[Group]:
    """A pipeline result's stages in order, each step a group."""
    rows: list[Row] = []
    for stage in pipeline["stages"]:
        step = re.match(r"(step \d+) (.+)", stage["name"])
        cells = (_cell([stage], "max_abs"), _cell([stage], "max_abs64"), *_context([stage]))
        name = step[2] if step else stage["name"]
        around = "after the steps" if rows and rows[-1].group != BEFORE else BEFORE
        rows.append(Row(step[1] if step else around, name, stage["status"], stage["passed"], cells))
    return _grouped(rows)


def named(metrics: Sequence[tuple[str, str]], dtype: str) -> list[tuple[str, str]]:
    """Metrics with their explanations, of a run in `dtype`."""
    return [(name.replace("float32", dtype), about.replace("float32", dtype)) for name, about in metrics]


def shade(level: int, dark: bool) -> tuple[str, str]:
    """Background and text colour of a level, both `#rrggbb`: pale to strong, with whichever text contrasts more."""
    low, high = ((27, 33, 43), (122, 178, 255)) if dark else ((246, 248, 251), (10, 61, 125))
    part = level / (LEVELS - 1)
    mixed = tuple(round(a + (b - a) * part) for a, b in zip(low, high, strict=True))
    return _hex(mixed), _hex(max(((0, 0, 0), (255, 255, 255)), key=lambda text: contrast(mixed, text)))


def contrast(one: Sequence[int], other: Sequence[int]) -> float:
    """The contrast ratio of two colours as WCAG defines it, 1 to 21."""
    first, second = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (first + 0.05) / (second + 0.05)


def _luminance(color: Sequence[int]) -> float:
    linear = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in color]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _hex(color: Sequence[int]) -> str:
    return "#" + "".join(f"{c:02x}" for c in color)


def _block(path: str) -> str:
    return next((found[1] for pattern in _NUMBERED if (found := pattern.match(path))), "")


def _context(verdicts: Sequence[dict[str, Any]]) -> tuple[Cell, ...]:
    """Noise of each side, the scaled difference, and the distance of the cosine from one."""
    apart = [1 - v["cosine"] for v in verdicts if v["cosine"] is not None]
    rest = ("noise_reference", "noise_candidate", "scaled")
    return (*(Cell(_largest(v[key] for v in verdicts)) for key in rest), Cell(_largest(max(0.0, x) for x in apart)))


def _cell(verdicts: Sequence[dict[str, Any]], key: str) -> Cell:
    return Cell(_largest(v[key] for v in verdicts), any(not v["passed"] for v in verdicts))


def _largest(values: Iterable[float | None]) -> float | None:
    return max((v for v in values if v is not None), default=None)


def _gravest(statuses: Iterable[str]) -> str:
    return max(statuses, key=lambda status: _GRAVITY[status])


def _grouped(rows: Iterable[Row]) -> list[Group]:
    groups: list[Group] = []
    for row in rows:
        if not groups or groups[-1].name != row.group:
            groups.append(Group(row.group))
        groups[-1].rows.append(row)
    # A fault spoils everything behind it, so only what is at fault itself is unfolded, or else where it begins.
    for group in groups:
        group.open = any(r.guilty or r.own for r in group.rows)
    for group in [g for g in groups if not g.passed][:1]:
        group.open = group.open or not any(g.open for g in groups)
    return groups
