"""What `porter parity` prints: one line a comparison, and why something fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def inside(out: Path, port: Path) -> bool:
    """Whether a report in `out` would lie among the files that the manifest answers for."""
    place, root = out.resolve(), port.resolve()
    return place.is_relative_to(root) and not place.is_relative_to(root / "parity")


def comparisons(outcome: Any, width: int) -> tuple[Any, str]:
    """One line a comparison, and what the table leaves out; numbers are never cut."""
    from rich.markup import escape

    from parity.compare import SKIPPED
    from parity.pipeline import PipelineResult
    from parity.wording import ratio_text
    from porter.commands._render import table
    from porter.core.errors import visible

    names = ("component", "against", "verdict")
    rows = []
    for result in outcome.results:
        v = result.headline
        whole = isinstance(result, PipelineResult)
        called = "pipeline (native)" if whole else f"{result.component} ({result.candidate})"
        measured = v is not None and v.status != SKIPPED  # what was not compared has no number
        numbers = (f"{v.max_abs:.1e}", f"{v.floor:.1e}", ratio_text(v.ratio)) if measured else ("–", "–", "–")
        counts = {key: str(result.counts[key]) for key in ("compared", "skipped", "missing")}
        against = "diffusers" if whole else result.against
        texts = tuple(escape(visible(text)) for text in (called, against, result.status))
        rows.append(dict(zip((*names, "max|Δ|", "floor", "ratio"), (*texts, *numbers), strict=True)) | counts)
    lacking = [key for key in ("skipped", "missing") if rows and all(row[key] == "0" for row in rows)]
    shown = [key for key in (rows[0] if rows else names) if key not in lacking]
    for spare in ("floor", "ratio"):  # what a narrow screen can do without; the report has all of it
        if sum(2 + max(len(row[key]) for row in (*rows, {key: key})) for key in shown if key not in names) > width - 30:
            shown = [key for key in shown if key != spare]
    built = table(*shown, right=[key for key in shown if key not in names], fold=names)
    for row, result in zip(rows, outcome.results, strict=True):
        colored = row | {"verdict": f"[{'green' if result.passed else 'red'}]{row['verdict']}[/]"}
        built.add_row(*(colored[key] for key in shown))
    return built, f"{' and '.join(lacking)}: 0 everywhere" if lacking else ""


_MOST = 5  # of a list on the terminal


def remarks(data: dict[str, Any], verbose: bool) -> list[str]:
    """Why something fails, and what a reader must know about what passes; not what the conclusion says.

    Args:
        data: the result document.
    """
    from parity.wording import decisive, further, results, uncompared
    from porter.core.errors import visible

    concluded = decisive(data)
    lines = []
    for result in results(data):
        title, guilty, told = result["title"], result.get("guilty"), result is concluded
        if guilty:
            lines += [f"{title}: {guilty['why']}"] if told else [f"{title}: {guilty['text']}", f"  {guilty['why']}"]
        elif not result["passed"] and not told:
            lines.append(f"{title}: {result['reason']}")
        lines += _listed("further faults" if guilty else "faults", [f["text"] for f in further(result)])
        lines += _listed("not compared", [text for text in uncompared(result) if text != result["reason"]])
        lines += [f"warning: {result['component']}: {text}" for text in result.get("warnings", ())]
        lines += [f"{title}: {text}" for text in result.get("notes", ()) if verbose]
    return [visible(line) for line in dict.fromkeys(lines)]


def _listed(title: str, texts: list[str]) -> list[str]:
    """A short list under its title; the report has all of it."""
    shown = list(dict.fromkeys(texts))
    more = [f"    and {len(shown) - _MOST} more, see the report"] if len(shown) > _MOST else []
    return [f"  {title}:", *(f"    {text}" for text in shown[:_MOST]), *more] if shown else []
