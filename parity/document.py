"""The result of a comparison as plain data, `parity.json`, from which the page, Markdown and JUnit are made.

Its schema is docs/parity.schema.json.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from parity.component import ComponentResult
from parity.html import page
from parity.locate import Guilty
from parity.outcome import SCHEMA, Outcome, describe, reason_of
from parity.pipeline import PipelineResult
from parity.trace import split_key
from porter.core.atomic import replace_bytes
from porter.core.errors import ResourceError
from porter.core.version import VERSION

# What a verdict is bound to; a comparison without a port, or without a case file, has none of these.
UNBOUND: dict[str, Any] = {
    "manifest_sha256": None, "case": None, "weights": {}, "recipes": {}, "traces": {}, "code": {}, "environment": {},
}  # fmt: skip


def document(outcome: Outcome, command: str) -> dict[str, Any]:
    """The whole result as plain data, schema porter.parity/1; a number that is not finite is None.

    Args:
        command: what a user types to repeat it.
    """
    guilty = next((found for r in outcome.components if (found := _guilty(r))), None)
    whole: dict[str, Any] = _plain({
        "schema": SCHEMA,
        "porter": VERSION,
        "passed": outcome.passed,
        "holds": outcome.holds,
        "partial": outcome.partial,
        "conclusion": outcome.conclusion(),
        "guilty": guilty,
        "family": outcome.family,
        "gate": outcome.options.gate,
        "seed": outcome.options.seed,
        "device": outcome.options.device,
        "dtype": outcome.options.dtype,
        "level": outcome.options.level or "all",
        "inputs": outcome.options.inputs,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "changed": outcome.changed,
        "unproven": outcome.unproven,
        **UNBOUND,
        **outcome.facts,
        "components": [_component(r) for r in outcome.components],
        "pipeline": _pipeline(outcome.pipeline) if outcome.pipeline else None,
    })  # fmt: skip
    return whole


def write(outcome: Outcome, command: str, folder: Path) -> tuple[Path, Path]:
    """Write `parity.json` and `report.html`, each complete or not at all -> their paths.

    Raises:
        ResourceError: the folder cannot be written.
    """
    data = document(outcome, command)
    whole = page(data, outcome.pipeline.images if outcome.pipeline else None)
    if taken := [name for name in ("report.html", "parity.json") if (folder / name).is_dir()]:
        raise ResourceError(f"{folder / taken[0]} is a folder", hint="remove it, or name another folder: -o <folder>")
    text = json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replace_bytes(folder / "report.html", whole.encode())
        replace_bytes(folder / "parity.json", (text + "\n").encode())
    except OSError as error:
        raise ResourceError(
            f"the report cannot be written to {folder}", found=str(error), hint="name another folder: -o <folder>"
        ) from error
    return folder / "parity.json", folder / "report.html"


def _guilty(result: ComponentResult) -> dict[str, Any] | None:
    """The first guilty module of a comparison, with the call in which it was found."""
    guilty = result.guilty
    if guilty is None:
        return None
    where = _first_fault(result, guilty)
    return {
        **vars(guilty),
        "component": result.component,
        "pass": where.partition("/")[0] or None,
        "call": int(where.rpartition("#")[2]) if where else None,
        "text": str(guilty),
    }


def _first_fault(result: ComponentResult, guilty: Guilty) -> str:
    """`forward/blocks.0#0`: where the first activation that fails was recorded; empty where only an output fails."""
    first = next((t for t in result.taps if not t.free.passed), None)
    if first is None or not (guilty.code or first.module == guilty.reference):
        return ""
    return split_key(first.key)[0]


def _component(result: ComponentResult) -> dict[str, Any]:
    return {
        "component": result.component,
        "candidate": result.candidate,
        "against": result.against,
        "reference": result.reference,
        **_judged(result),
        "guilty": _guilty(result),
        "faults": [{**vars(f), "verdict": f.verdict.to_json(brief=True), "text": str(f)} for f in result.faults],
        "warnings": result.warnings,
        "notes": result.notes,
        "unused": result.unused,
        "unwatched": result.unwatched,
        "outputs": [v.to_json() for v in result.outputs],
        "modules": [
            {
                "key": t.key,
                "pass": t.key.partition("/")[0],
                "reference": t.module,
                "call": int(split_key(t.key)[0].rpartition("#")[2]),
                "kind": t.kind,
                "free": t.free.to_json(brief=True),
                "reset": t.reset.to_json(brief=True) if t.reset else None,
            }
            for t in result.taps
        ],
    }


def _pipeline(result: PipelineResult) -> dict[str, Any]:
    return {
        "component": "pipeline",
        "candidate": "native",
        "against": "diffusers",
        "request": {name: getattr(result.request, name) for name in ("prompt", "seed", "steps", "guidance")},
        **_judged(result),
        "pixels_changed": result.pixels_changed,
        **result.details(),
        "stages": [v.to_json(brief=True) for v in result.stages],
    }


def _judged(result: ComponentResult | PipelineResult) -> dict[str, Any]:
    headline = result.headline
    return {
        "title": describe(result),
        "status": result.status,
        "passed": result.passed,
        "reason": "" if result.passed else reason_of(result),
        "headline": headline.to_json() if headline else None,
        "counts": result.counts,
    }


def _plain(value: Any) -> Any:
    """The same for JSON: what is not finite is None, and half a surrogate pair, which no file holds, is spelt out."""
    if isinstance(value, Mapping):
        return {_plain(str(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    return value if isinstance(value, bool | int | float | None) else _plain(str(value))
