"""How a checklist is shown: as Markdown for a pull request, and for people at a terminal.

Names in a checklist come from files of strangers. In Markdown they only ever stand in code spans; everything else is
escaped, so that no name makes a link, a mention, a picture, a heading or a second item.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from porter.commands._render import console, escape, hang
from porter.core.checklist import Checklist, Guide, Step
from porter.core.errors import visible

_CODE = re.compile(r"`([^`\n]*)`")
_SPECIAL = re.compile(r"([\\`*_{}\[\]()<>#+!|~@&:])")
_MEANT = re.compile(r":(?=\s|$)|(?<![\])])[()]|(?<=[a-z])_(?=[a-z])")  # punctuation of plain sentences


def to_markdown(checklist: Checklist) -> str:
    """A task list, grouped as in the guide, to paste into a pull request."""
    lines = [f"### {_inline(checklist.title)}", "", f"After {_guide(checklist.guide)}.", ""]
    lines += [f"> {_inline(note)}" for note in checklist.notes] + ([""] if checklist.notes else [])
    for group, steps in checklist.groups():
        lines += [f"**{_inline(group)}**", ""]
        for step in steps:
            lines.append(f"- [{'x' if step.done else ' '}] {_inline(step.text)}")
            lines += [f"  {detail}" for detail in _details(step)]
        lines.append("")
    return "\n".join(lines).rstrip("\n") + "\n"


def print_checklist(checklist: Checklist) -> None:
    """Prints a checklist for people."""
    screen = console()
    done = sum(step.done for step in checklist.steps)
    screen.print()
    hang(screen, "checklist ", f"{_bare(checklist.title)}, {done} of {len(checklist.steps)} done", style="bold")
    commit = f" at {checklist.guide.commit}" if checklist.guide.commit else ""
    after = f"after {checklist.guide.repository}{commit}: {', '.join(checklist.guide.files)}"
    hang(screen, " " * 10, after, style="dim")
    for note in checklist.notes:
        hang(screen, "note      ", _bare(note), first_style="yellow")
    for group, steps in checklist.groups():
        screen.print(f"\n[bold]{escape(group)}[/]")
        for step in steps:
            hang(screen, "  [x] " if step.done else "  [ ] ", _bare(step.text),
                 first_style="green" if step.done else "")  # fmt: skip
            for label, paths in (("new", step.creates), ("edit", step.edits)):
                for path in paths:
                    hang(screen, f"      {label:<4} ", path, first_style="dim", wrap=False)
            if step.command:
                hang(screen, "      $ ", step.command, first_style="dim", wrap=False)
            if step.why:
                hang(screen, "      ", _bare(step.why), style="dim")
    screen.print()


def _details(step: Step) -> Iterator[str]:
    """The lines under an item."""
    for label, paths in (("new", step.creates), ("edit", step.edits)):
        if paths:
            yield f"- {label}: " + ", ".join(map(_code, _folded(paths)))
    if step.command:
        yield f"- {_code(step.command)}"
    if step.why:
        yield f"- {_inline(step.why)}"


def _folded(paths: tuple[str, ...]) -> list[str]:
    """Paths; several new files of one folder as `folder/{a,b}`, which a shell reads the same way."""
    folders: dict[str, list[str]] = {}
    for path in paths:
        folder, _, name = path.rpartition("/")
        folders.setdefault(folder, []).append(name)
    return [
        f"{folder}/{names[0] if len(names) == 1 else '{' + ','.join(names) + '}'}" if folder else ",".join(names)
        for folder, names in folders.items()
    ]


def _guide(guide: Guide) -> str:
    if not guide.commit:
        return ", ".join(map(_code, guide.files))
    short = guide.commit[:12] if re.fullmatch(r"[0-9a-f]{40}", guide.commit) else guide.commit
    return f"{_code(guide.files[0])} of {_code(f'{guide.repository}@{short}')}"


def _inline(text: str) -> str:
    """A line whose backticks stay code spans; every other character that Markdown or HTML reads is escaped."""
    line = _one_line(text)
    parts, end = [], 0
    for found in _CODE.finditer(line):
        parts += [_plain(line[end : found.start()]), _code(found[1])]
        end = found.end()
    return "".join([*parts, _plain(line[end:])])


def _plain(text: str) -> str:
    kept = {found.start() for found in _MEANT.finditer(text)}
    return "".join(
        f"\\{letter}" if _SPECIAL.match(letter) and place not in kept else letter for place, letter in enumerate(text)
    )


def _code(text: str) -> str:
    """A code span that holds any text: its fence is longer than every run of backticks in it."""
    line = _one_line(text)
    if not line.strip():
        return ""
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def _one_line(text: str) -> str:
    return visible(text).replace("\r", "\\r").replace("\n", "\\n").replace("\t", "\\t")


def _bare(text: str) -> str:
    return text.replace("`", "")
