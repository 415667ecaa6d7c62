"""The benchmark's document as JSON, as a table and as a chart."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from porter.core.atomic import replace_bytes
from porter.core.errors import ResourceError
from runtime.bench.run import SYSTEMS

SCHEMA = "porter.bench.runtime/1"
_COLOURS = {"diffusers": "#9aa5b1", "diffusers compiled": "#616e7c", "porter": "#62b0e8", "porter compiled": "#0b69a3"}
_BAR, _GAP, _LEFT, _WIDTH = 18, 6, 150, 760


def rows(case: Mapping[str, Any]) -> list[tuple[str, float, float, float, float]]:
    """(system, ms a step, times the bound, first call in s, peak in GB), in the order of `SYSTEMS`."""
    found = case["systems"]
    return [
        (name, one["ms_per_step"], one["times_the_bound"], one["first_call_ms"] / 1000, one["peak_bytes"] / 1e9)
        for name in SYSTEMS
        if (one := found.get(name)) is not None
    ]


def chart(document: Mapping[str, Any]) -> str:
    """Bars of milliseconds a step for each case, with the arithmetic bound as a line, as SVG."""
    parts, y = [], 34
    for case in document["cases"]:
        parts.append(
            f'<text x="8" y="{y}" class="t">{escape(case["name"])}: {case["tflop_per_step"]:.3g} TFLOP a step</text>'
        )
        y += 12
        shown = rows(case)
        scale = (_WIDTH - _LEFT - 120) / max(ms for _, ms, *_ in shown)
        top = y
        for name, ms, times, *_ in shown:
            width = ms * scale
            parts.append(f'<text x="{_LEFT - 6}" y="{y + 13}" class="l">{escape(name)}</text>')
            parts.append(
                f'<rect x="{_LEFT}" y="{y}" width="{width:.1f}" height="{_BAR}" fill="{_COLOURS[name]}"/>'
                f'<text x="{_LEFT + width + 6:.1f}" y="{y + 13}">{ms:.4g} ms, {times:.2f} x bound</text>'
            )
            y += _BAR + _GAP
        at = _LEFT + case["bound_ms"] * scale
        parts.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{top - 3}" y2="{y - 3}" stroke="#ba2525"/>')
        y += 26
    about = (
        f"{document['environment']['device']}, {document['dtype']}; red: arithmetic at the rate of one large product"
    )
    style = "text{font:12px sans-serif;fill:#1f2933}.t{font-weight:bold}.l{text-anchor:end}"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {y}" role="img"><style>{style}</style>'
    ground = '<rect width="100%" height="100%" fill="white"/>'
    return f'{head}{ground}<text x="8" y="16">{escape(about)}</text>{"".join(parts)}</svg>\n'


def write(document: Mapping[str, Any], folder: Path) -> list[Path]:
    """`runtime-DEVICE.json` and `.svg` in `folder`.

    Raises:
        ResourceError: the folder cannot be written.
    """
    kind = "cpu" if document["environment"]["cuda_device"] is None else "cuda"
    files = [folder / f"runtime-{kind}.json", folder / f"runtime-{kind}.svg"]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replace_bytes(files[0], (json.dumps(document, indent=2) + "\n").encode())
        replace_bytes(files[1], chart(document).encode())
    except OSError as error:
        raise ResourceError(f"{folder} cannot be written", found=str(error), hint="another folder with -o") from error
    return files
