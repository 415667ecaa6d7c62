"""Error curves of a report: geometry of a logarithmic chart that stretches to any width."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from parity.heat import Group
from parity.wording import sci

WIDTH, HEIGHT = 1000.0, 220.0
TITLES = 400  # more points than this are too close together to point at; the heat map has their numbers
DOTS, EDGES = 200, 60  # more dots hide their lines, more block borders the curves


@dataclass(frozen=True)
class Curve:
    """One line: what it shows, its style in the page, its values in order (None: there is none)."""

    name: str
    style: str
    values: list[float | None]


@dataclass(frozen=True)
class Chart:
    """What the template draws; coordinates are those of a box WIDTH x HEIGHT, `grid` has its heights in percent."""

    curves: list[dict[str, str]]
    grid: list[tuple[float, str]]
    edges: list[float]
    guilty: list[float]
    titles: list[tuple[float, float, str]]
    first: str
    last: str
    summary: str


def module_chart(component: dict[str, Any], groups: Sequence[Group], dtype: str = "float32") -> Chart | None:
    """Answers of a component's modules in order of execution, run in `dtype`; None where none was compared."""
    events = [e for e in component["modules"] if e["kind"] == "out"]
    if not events:
        return None
    free = [e["free"] for e in events]
    curves = _free(free, dtype)
    if any(e["reset"] for e in events):
        reset = [e["reset"]["max_abs64"] if e["reset"] else None for e in events]
        curves.insert(2, Curve("float64, input reset to the reference's", "reset", reset))
    group = {row.call: number for number, found in enumerate(groups) for row in found.rows}
    at = [group[e["pass"], e["reference"], e["call"]] for e in events]
    faults = {row.call for found in groups for row in found.rows if row.guilty}
    guilty = [i for i, e in enumerate(events) if (e["pass"], e["reference"], e["call"]) in faults]
    starts = [i for i in range(1, len(at)) if at[i] != at[i - 1]]
    return chart([e["reference"] for e in events], curves, edges=starts, guilty=guilty)


def step_chart(pipeline: dict[str, Any], dtype: str = "float32") -> Chart | None:
    """Latents after every step of a pipeline run in `dtype`; None where there was no step."""
    steps = [v for v in pipeline["stages"] if v["name"].startswith("step ") and v["name"].endswith(" latents")]
    return chart([v["name"].removesuffix(" latents") for v in steps], _free(steps, dtype)) if steps else None


def chart(
    labels: Sequence[str], curves: Sequence[Curve], *, edges: Sequence[int] = (), guilty: Sequence[int] = ()
) -> Chart:
    """Lay curves out over the same points; an exact zero lies on a line of its own below the scale."""
    known = [v for c in curves for v in c.values if v]
    low = max(math.floor(math.log10(min(known))), -18) if known else -17
    high = max(math.ceil(math.log10(max(known))) if known else 0, low + 1)
    base = HEIGHT - 8  # of exact zeros
    floor = base - 22 if known else base

    def x(i: float) -> float:
        return WIDTH * (i + 0.5) / len(labels)

    def y(value: float) -> float:
        if value <= 0:
            return base
        return 8 + (floor - 8) * (high - min(max(math.log10(value), low), high)) / (high - low)

    step = max(1, -(-(high - low) // 6))
    grid = [(y(10.0**e), f"1e{e}") for e in range(high, low - 1, -step)] if known else []
    grid.append((base, "0"))
    return Chart(
        [{"name": c.name, "style": c.style, "line": _line(c, x, y), "dots": _dots(c, x, y)} for c in curves],
        [(100 * at / HEIGHT, text) for at, text in grid],
        [x(i - 0.5) for i in edges] if len(edges) <= EDGES else [],
        [x(i) for i in guilty],
        [(x(i - 0.5), WIDTH / len(labels), f"{label}\n{_values(curves, i)}") for i, label in enumerate(labels)]
        if len(labels) <= TITLES else [],
        labels[0],
        labels[-1],
        "; ".join(_summary(c, labels) for c in curves),
    )  # fmt: skip


def _free(verdicts: Sequence[dict[str, Any]], dtype: str) -> list[Curve]:
    if dtype != "float32":
        return [
            Curve(f"candidate in {dtype}, distance from the truth", "free", [v["noise_candidate"] for v in verdicts]),
            Curve(f"reference in {dtype}, distance from the truth", "floor", [v["noise_reference"] for v in verdicts]),
        ]
    return [
        Curve("float32, free-running", "free", [v["max_abs"] for v in verdicts]),
        Curve("float64, free-running", "double", [v["max_abs64"] for v in verdicts]),
        Curve("noise floor", "floor", [v["floor"] for v in verdicts]),
    ]


def _line(curve: Curve, x: Any, y: Any) -> str:
    """A path through neighbouring values; a missing one and an exact zero, which is off the scale, interrupt it."""
    parts, pen = [], "M"
    for i, value in enumerate(curve.values):
        if not value:
            pen = "M"
            continue
        parts.append(f"{pen}{x(i):.1f} {y(value):.1f}")
        pen = "L"
    return "".join(parts)


def _dots(curve: Curve, x: Any, y: Any) -> str:
    """Dots at the values; of very many, at the exact zeros only, which no line reaches."""
    many = len(curve.values) > DOTS
    return "".join(f"M{x(i):.1f} {y(v):.1f}h0" for i, v in enumerate(curve.values) if v == 0 or (v and not many))


def _values(curves: Sequence[Curve], i: int) -> str:
    return "\n".join(f"{c.name}: {sci(c.values[i])}" for c in curves)


def _summary(curve: Curve, labels: Sequence[str]) -> str:
    """For those who cannot see the curve."""
    known = [(v, label) for v, label in zip(curve.values, labels, strict=True) if v is not None]
    if not known:
        return f"{curve.name}: no values"
    largest, at = max(known)
    return f"{curve.name}: {len(known)} values, the largest {sci(largest)} at {at}"
