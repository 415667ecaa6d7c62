"""A plan for people: one table that fits the width, then what matters, a line each."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from porter.commands._render import console, escape, fact, human_bytes, human_count, table
from porter.core.layout import highlights
from porter.core.plan import STATUS_MEANING, ComponentPlan, PortPlan
from porter.core.terms import stated
from porter.core.units import several

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

RISKS = 6  # shown without --verbose
VALUE = 60  # characters of one value of a config
_COLORS = {"native": "green", "reuse": "green", "convert": "cyan", "port": "yellow", "missing": "red"}
# From this width on a column is shown; below, the others get its room.
_FROM = {"dtypes": 96, "files": 128, "config": 170}


def print_plan(result: PortPlan, *, verbose: bool) -> None:
    """Prints a plan; `verbose` shows every risk, guess and config."""
    screen = console()
    _head(screen, result)
    screen.print(_components(result, screen.width))
    total = f"{human_count(result.parameters)} parameters" if result.parameters is not None else "parameters unknown"
    unknown = [p.name for p in result.components if p.parameters is None and p.layout not in ("none", "elsewhere")]
    without = f" (those of {', '.join(unknown)} are unknown)" if unknown and result.parameters is not None else ""
    screen.print()
    fact(screen, "total", f"{total}{without}; {human_bytes(result.bytes)} in all")
    for status in sorted({part.status for part in result.components}):
        fact(screen, status, STATUS_MEANING[status], style="dim")
    for extra in result.extras:
        size = f"{human_count(extra.parameters)}, {human_bytes(extra.bytes)}"
        fact(screen, "beside", f"{extra.file}: {extra.name} ({size}): {extra.note}", style="dim")
    for part in result.components:
        _details(screen, part, verbose=verbose)
    _memory(screen, result, verbose=verbose)
    _kin(screen, result, verbose=verbose)
    _risks(screen, result, verbose=verbose)
    for line in result.warnings:
        fact(screen, "warning", line, style="yellow", label_only=True)
    if result.checklist:
        from porter.commands._checklist import print_checklist
        from porter.core.checklist import Checklist

        print_checklist(Checklist.from_json(result.checklist))
    for line in result.next:
        fact(screen, "next", line, style="bold", label_only=True, wrap=False)


def _head(screen: Console, result: PortPlan) -> None:
    inner = f" ({result.subfolder})" if result.subfolder else ""
    revision = f" at {result.revision}" if result.revision else ""
    screen.print(
        f"[bold]{escape(result.source)}[/bold]{escape(inner + revision)}  ({_origin(result)})",
        soft_wrap=True,
    )
    fact(screen, "pipeline", f"{result.pipeline_class or 'none named'}, family {result.family or 'unknown'}")
    fact(screen, "style", f"{result.style}: {result.style_reason}" if result.style else result.style_reason)
    name = stated(result.licence)
    terms = ", ".join([*([name] if name else []), *result.licence.get("files", [])]) or "none stated"
    fact(screen, "licence", terms + (f"; gated ({result.gated})" if result.gated else ""))
    screen.print()


def _origin(result: PortPlan) -> str:
    return result.kind if result.kind == "file" else f"{result.kind}, {several(result.files, 'file')}"


def _components(result: PortPlan, width: int) -> Table:
    names = ["component", "class", "params", "dtypes", "size", "status", "config", "files"]
    shown = [name for name in names if width >= _FROM.get(name, 0)]
    last = [name for name in ("files", "config") if name in shown][:1]
    rows = table(
        *shown, right=("params", "size"), cut=last, fold=("component", "class", "dtypes") if width < 128 else ()
    )
    for part in result.components:
        cells = {
            "component": escape(part.name),
            "class": escape(part.class_name or "?"),
            "params": human_count(part.parameters) if part.layout != "none" else "–",
            "dtypes": " ".join(part.dtypes) or "–",
            "size": human_bytes(part.bytes) if part.layout != "elsewhere" else "–",
            "status": f"[{_COLORS[part.status]}]{part.status}[/]",
            "config": escape(_says(part)),
            "files": escape(_files(part)),
        }
        rows.add_row(*(cells[name] for name in shown))
    return rows


def _says(part: ComponentPlan) -> str:
    """The entries of a config that say most, in the room of a column."""
    text = ", ".join(f"{key} {value}" for key, value in highlights(part.config, 3).items() if len(str(value)) < 24)
    return text if len(text) < 52 else text[:51] + "…"


def _files(part: ComponentPlan) -> str:
    if part.location:
        return part.location
    if len(part.files) < 2:
        return part.files[0] if part.files else "–"
    first = re.sub(r"-\d+-of-\d+", "-*", part.files[0])
    return f"{len(part.files)}: {first}" + ("" if "-*" in first else " …")


def _details(screen: Console, part: ComponentPlan, *, verbose: bool) -> None:
    if part.recipe:
        fact(screen, "recipe", f"{part.name}: {part.recipe}")
    if part.model:
        fact(screen, "model", f"{part.name}: {part.model}")
    for guess in part.guesses if part.layout == "unknown" or verbose else ():
        told = f"; {guess['tells'][0]} speaks for it" if guess["tells"] else ""
        near = f"{guess['family'] or 'shared'} {guess['component']} ({guess['layout']})"
        fact(screen, "like", f"{part.name}: {guess['score']:.0%} of {near}{told}")
    if part.location:
        fact(screen, "elsewhere", f"{part.name}: {part.location}")
    if part.note:
        fact(screen, "note", f"{part.name}: {part.note}")
    for line in part.shared:
        fact(screen, "tied", f"{part.name}: {line}")
    if verbose and part.config:
        text = ", ".join(f"{key} {_short(value)}" for key, value in part.config.items() if not key.startswith("_"))
        fact(screen, "config", f"{part.name}: {text[:2000]}")
    if verbose and part.unusual:
        text = ", ".join(f"{key} {_short(pair[0])} (default {_short(pair[1])})" for key, pair in part.unusual.items())
        fact(screen, "unusual", f"{part.name}: {text[:2000]}")


def _short(value: Any) -> str:
    """A config's value in the room of a line; --json has all of it."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= VALUE else f"{text[:VALUE]}…"


def _memory(screen: Console, result: PortPlan, *, verbose: bool) -> None:
    if result.memory:
        from porter.commands._memory import print_memory

        print_memory(screen, result.memory, verbose=verbose)


def _kin(screen: Console, result: PortPlan, *, verbose: bool) -> None:
    if result.closest is None:
        return
    kin = result.closest
    rule = "reuse or extend it" if kin.reusable else "below 80 %: a family of its own"
    fact(screen, "closest", f"{kin.title} ({kin.family}), {kin.score:.0%} alike: {rule}")
    for line in kin.differences if verbose else kin.differences[:4]:
        fact(screen, "", line, style="dim")
    if not verbose and len(kin.differences) > 4:
        fact(screen, "", f"and {len(kin.differences) - 4} more: --verbose, or --json", style="dim")


def _risks(screen: Console, result: PortPlan, *, verbose: bool) -> None:
    risks = result.risks if verbose else result.risks[:RISKS]
    for risk in risks:
        value = str(risk.value) if len(str(risk.value)) < 40 else str(risk.value)[:37] + "…"
        fact(screen, f"risk {risk.pitfall}", f"{risk.component}.{risk.key} = {value}: {risk.text}", style="magenta",
             label_only=True)  # fmt: skip
    if len(risks) < len(result.risks):
        fact(screen, "", f"and {len(result.risks) - len(risks)} more: --verbose, or --json", style="dim")
