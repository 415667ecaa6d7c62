"""How a memory estimate is shown: a small table by stage, the verdict, and what was assumed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from porter.commands._render import fact, human_bytes, table

if TYPE_CHECKING:
    from rich.console import Console

_COLUMNS = ("stage", "all on device", "component offload", "layer offload")
_WIDE = 66  # columns that the whole headings need
_COLORS = {"yes": "green", "no": "red", "unknown": "dim"}


def print_memory(screen: Console, memory: Mapping[str, Any], *, verbose: bool) -> None:
    """Prints the estimate for people."""
    screen.print()
    if not memory["stages"]:
        fact(screen, "fits", f"{memory['fits']}: {memory['reason']}", style="dim")
        screen.print()
        return
    fact(screen, "memory", f"{work_line(memory)}, weights {human_bytes(memory['weights'])}")
    columns = _COLUMNS if screen.width >= _WIDE else tuple(name.replace(" on device", "").replace(" offload", "")
                                                            for name in _COLUMNS)  # fmt: skip
    rows = table(*columns, right=columns[1:])
    for stage in memory["stages"]:
        rows.add_row(stage["stage"], *(human_bytes(stage[key]) for key in _KEYS))
    screen.print(rows)
    if memory["device_memory"] is not None:
        color = _COLORS.get(memory["fits"], "yellow")
        fact(screen, "fits", f"{memory['fits']}: {memory['reason']}", style=color)
    if verbose:
        for part in memory["components"]:
            shown = human_bytes(part["activations"]) if part["activations"] is not None else "not estimated"
            note = f" ({part['note']})" if part["note"] else ""
            fact(screen, "", f"{part['name']}: weights {human_bytes(part['weights'])}, activations {shown}{note}")
    if memory["left_out"]:
        fact(screen, "left out", f"activations of {left_out(memory)}")
    if memory["absent"]:
        fact(screen, "left out", f"{', '.join(memory['absent'])}: no weights here")
    if memory["assumed"]:
        fact(screen, "assumed", "; ".join(memory["assumed"]), style="dim")
    screen.print()


_KEYS = ("resident", "component_offload", "layer_offload")


def left_out(memory: Mapping[str, Any]) -> str:
    """The components whose activations are not estimated, by what is missing."""
    said = {"formula": "no formula", "config": "its config is not here or does not say"}
    parts = {why: [part["name"] for part in memory["components"] if part["missing"] == why] for why in said}
    return "; ".join(f"{', '.join(names)} ({said[why]})" for why, names in parts.items() if names)


def work_line(memory: Mapping[str, Any]) -> str:
    """The call that the estimate is for."""
    work = memory["workload"]
    frames = f" x {work['frames']} frames" if work["frames"] > 1 else ""
    batch = f", batch {work['batch']}" if work["batch"] > 1 else ""
    passes = ", guidance in one batch" if work["guidance"] else ""
    counted = {part["stage"] for part in memory["components"] if part["activations"] is not None}
    if not counted - {"text encoding"}:  # no size of a picture plays a part
        tokens = f"{work['text_tokens']} text tokens in " if counted else ""
        return f"{tokens}{work['dtype']}{batch}"
    return f"{work['width']} x {work['height']}{frames} in {work['dtype']}{batch}{passes}"


def memory_markdown(memory: Mapping[str, Any], text: Callable[[object], str]) -> list[str]:
    """The estimate as lines of Markdown; `text` makes a value plain text."""
    if not memory["stages"]:
        return [f"Fits: **{memory['fits']}** ({text(memory['reason'])})"]
    lines = [f"{work_line(memory)}; weights {human_bytes(memory['weights'])}.", ""]
    lines += ["| " + " | ".join(_COLUMNS) + " |", "|---|--:|--:|--:|"]
    for stage in memory["stages"]:
        lines.append(f"| {stage['stage']} | " + " | ".join(human_bytes(stage[key]) for key in _KEYS) + " |")
    if memory["device_memory"] is not None:
        lines += ["", f"Fits: **{memory['fits']}** ({text(memory['reason'])})"]
    if memory["left_out"]:
        lines += ["", f"Left out: activations of {text(left_out(memory))}."]
    if memory["absent"]:
        lines += ["", f"Left out: {text(', '.join(memory['absent']))}, whose weights are not here."]
    if memory["assumed"]:
        lines += ["", "Assumed: " + text("; ".join(memory["assumed"])) + "."]
    return lines
