"""The result document and its page: `parity.json` and a self-contained `report.html`."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from torch import Tensor

from parity.compare import Verdict
from parity.component import ComponentResult
from parity.locate import Guilty, Tap
from parity.outcome import SCHEMA, Outcome, describe, reason_of
from parity.pipeline import PipelineResult
from porter.core.atomic import replace_bytes
from porter.core.errors import ResourceError
from porter.core.version import VERSION


def document(outcome: Outcome, command: str) -> dict[str, Any]:
    """The whole result as plain data, schema porter.parity/1."""
    first = next((r.guilty for r in outcome.components if r.guilty), None)
    return {
        "schema": SCHEMA,
        "porter": VERSION,
        "passed": outcome.passed,
        "holds": outcome.holds,
        "conclusion": outcome.conclusion(),
        "guilty": _guilty(first),
        "family": outcome.family,
        "gate": outcome.options.gate,
        "seed": outcome.options.seed,
        "device": "cpu",
        "dtype": "float32, judged in float64",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "changed": outcome.changed,
        "unproven": outcome.unproven,
        **outcome.facts,
        "components": [_component(r) for r in outcome.components],
        "pipeline": _pipeline(outcome.pipeline) if outcome.pipeline else None,
    }


def write(outcome: Outcome, command: str, folder: Path) -> tuple[Path, Path]:
    """Write `parity.json` and `report.html`, each complete or not at all -> their paths.

    Raises:
        ResourceError: the folder cannot be written.
    """
    data = document(outcome, command)
    page = render(data, outcome)
    if taken := [name for name in ("report.html", "parity.json") if (folder / name).is_dir()]:
        raise ResourceError(f"{folder / taken[0]} is a folder", hint="remove it, or name another folder: -o <folder>")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in (("report.html", page), ("parity.json", json.dumps(data, indent=1, ensure_ascii=False))):
            replace_bytes(folder / name, (text + "\n").encode())
    except OSError as error:
        raise ResourceError(
            f"the report cannot be written to {folder}", found=str(error), hint="name another folder: -o <folder>"
        ) from error
    return folder / "parity.json", folder / "report.html"


def render(data: dict[str, Any], outcome: Outcome) -> str:
    """The page: no scripts, no links to anything outside, everything escaped."""
    env = Environment(loader=PackageLoader("parity"), autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    env.filters |= {"sci": _sci, "ratio": ratio_text, "human": lambda v: f"{v:,}"}
    sections = []
    for result, item in zip(outcome.components, data["components"], strict=True):
        taps = [t for t in result.taps if t.kind == "out"]
        sections.append({**item, "title": describe(result), "svg": _curve(*_module_series(taps)) if taps else None})
    pipeline = None
    if outcome.pipeline and data["pipeline"]:
        steps = [v for v in outcome.pipeline.stages if v.name.endswith("latents") and v.name.startswith("step")]
        labels = [v.name.removesuffix(" latents") for v in steps]
        pipeline = {
            **data["pipeline"],
            "svg": _curve(labels, _series(steps)) if steps else None,
            "pictures": _pictures(outcome.pipeline.images),
        }
    return env.get_template("report.html.jinja").render(data=data, sections=sections, pipeline=pipeline)


def _guilty(guilty: Guilty | None) -> dict[str, Any] | None:
    return {**vars(guilty), "others": list(guilty.others), "text": str(guilty)} if guilty else None


def _component(result: ComponentResult) -> dict[str, Any]:
    headline = result.headline
    return {
        "component": result.component,
        "candidate": result.candidate,
        "against": result.against,
        "reference": result.reference,
        "status": result.status,
        "passed": result.passed,
        "reason": "" if result.passed else reason_of(result),
        "headline": headline.to_json() if headline else None,
        "counts": result.counts,
        "guilty": _guilty(result.guilty),
        "warnings": result.warnings,
        "notes": result.notes,
        "unused": result.unused,
        "outputs": [v.to_json() for v in result.outputs],
        "modules": [
            {
                "key": t.key,
                "reference": t.module,
                "kind": t.kind,
                "free": t.free.to_json(brief=True),
                "reset": t.reset.to_json(brief=True) if t.reset else None,
            }
            for t in result.taps
        ],
    }


def _pipeline(result: PipelineResult) -> dict[str, Any]:
    headline = result.headline
    return {
        "request": vars(result.request),
        "status": result.status,
        "passed": result.passed,
        "reason": "" if result.passed else reason_of(result),
        "headline": headline.to_json() if headline else None,
        "counts": result.counts,
        "pixels_changed": result.pixels_changed,
        **result.details(),
        "stages": [v.to_json(brief=True) for v in result.stages],
    }


def _sci(value: float | None) -> str:
    return "–" if value is None else "0" if value == 0 else f"{value:.1e}"


def ratio_text(value: float | None) -> str:
    """A difference in floors: `0.28`, `414000`."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.2f}" if value < 1000 else f"{value:.0f}"


Series = list[tuple[str, str, list[float]]]


def _series(verdicts: Sequence[Verdict]) -> Series:
    return [
        ("difference in float32", "free", [v.max_abs for v in verdicts]),
        ("difference in float64", "double", [v.max_abs64 for v in verdicts]),
        ("floor: own noise of both sides", "floor", [v.floor for v in verdicts]),
    ]


def _module_series(taps: Sequence[Tap]) -> tuple[list[str], Series]:
    """Module outputs in order of execution; the reset curve has gaps where no input was reset."""
    series = _series([t.free for t in taps])
    if any(t.reset for t in taps):
        reset = [t.reset.max_abs64 if t.reset else math.nan for t in taps]
        series.insert(2, ("float64, inputs reset to the reference's", "reset", reset))
    return [t.module for t in taps], series


def _curve(labels: Sequence[str], series: Series) -> dict[str, Any]:
    """Geometry of a logarithmic chart, 720 x 220, for the template: curves, grid lines and points with titles."""
    width, height, left, top, bottom = 720.0, 220.0, 52.0, 10.0, 24.0
    finite = [v for _, _, vs in series for v in vs if math.isfinite(v) and v > 0]
    low = math.floor(math.log10(min(finite))) if finite else -16
    low, high = max(low, -18), math.ceil(math.log10(max(finite))) if finite else 0
    high = max(high, low + 1)

    def x(i: int) -> float:
        return left + (width - left - 10) * (i / max(1, len(labels) - 1))

    def y(v: float) -> float:
        e = min(max(math.log10(v) if v > 0 else low, low), high)
        return top + (height - top - bottom) * (high - e) / (high - low)

    curves = []
    for name, css, values in series:
        points = [(x(i), y(v), f"{labels[i]}: {v:.1e}") for i, v in enumerate(values) if math.isfinite(v)]
        curves.append({"name": name, "css": css, "points": points, "paths": _lines(values, x, y)})
    step = max(1, (high - low) // 6)
    grid = [(y(10.0**e), f"1e{e}") for e in range(low, high + 1, step)]
    return {
        "curves": curves,
        "grid": grid,
        "width": width,
        "height": height,
        "left": left,
        "labels": [labels[0], labels[-1]],
    }


def _lines(values: Sequence[float], x: Callable[[int], float], y: Callable[[float], float]) -> list[str]:
    """Polylines through neighbouring values; an exact zero, which has no place on the scale, interrupts them."""
    lines: list[list[str]] = [[]]
    for i, value in enumerate(values):
        if math.isfinite(value) and value > 0:
            lines[-1].append(f"{x(i):.1f},{y(value):.1f}")
        elif lines[-1]:
            lines.append([])
    return [" ".join(line) for line in lines if len(line) > 1]


def _pictures(images: tuple[Tensor, Tensor] | None) -> list[tuple[str, str]]:
    """Both images and their difference, scaled to its largest value, as data URIs with captions."""
    if images is None:
        return []
    reference, candidate = (i.float().clamp(0, 1) for i in images)
    found = [("reference (diffusers)", _png(reference)), ("candidate (native)", _png(candidate))]
    if reference.shape == candidate.shape:
        gap = (reference - candidate).abs()
        largest = float(gap.max())
        scaled = gap / largest if largest else gap
        found.append(
            (f"difference, scaled from {largest:.1e} to white" if largest else "difference: none", _png(scaled))
        )
    return found


def _png(image: Tensor) -> str:
    from PIL import Image

    pixels = (image * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
