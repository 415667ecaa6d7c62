"""How the verbs print: `console()` for results, `notes()` for everything else, small formatters."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from porter.core.errors import visible
from porter.core.units import human_bytes, human_count

__all__ = [
    "LABEL", "ByteBar", "byte_progress", "console", "escape", "fact", "hang", "human_bytes", "human_count", "notes",
    "one_line", "print_json", "table",
]  # fmt: skip

if TYPE_CHECKING:
    from rich.console import Console, JustifyMethod
    from rich.progress import Progress
    from rich.table import Table
    from rich.text import Text


def console() -> Console:
    """The console of results (stdout). Honours NO_COLOR, FORCE_COLOR and COLUMNS; 140 columns without a terminal."""
    return _console(stderr=False)


def notes() -> Console:
    """The console of everything that is not a result (stderr)."""
    return _console(stderr=True)


def _console(*, stderr: bool) -> Console:
    from rich.console import Console

    class Ours(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # the frame knows what that means; rich would end the process

        def print(self, *objects: Any, **options: Any) -> None:
            one = objects[0] if len(objects) == 1 and isinstance(objects[0], str) else None
            if one is None or self.soft_wrap or set(options) - {"style", "markup"}:
                super().print(*objects, **options)
                return
            from porter.commands._wrap import hanging

            for line in hanging(self.render_str(one, markup=options.get("markup", True)), self.width):
                super().print(line, style=options.get("style"), soft_wrap=True)

        def render_str(self, text: str, **options: Any) -> Text:
            return super().render_str(visible(text), **options)

    stream = sys.stderr if stderr else sys.stdout
    columns = os.environ.get("COLUMNS", "")
    given = columns.isdecimal() and len(columns) < 6 and int(columns) > 0
    width = min(max(int(columns), 40), 1000) if given else None if stream.isatty() else 140
    return Ours(file=stream, width=width, highlight=False, soft_wrap=not given and not stream.isatty())


def fact(
    screen: Console, label: str, value: str, *, style: str = "", label_only: bool = False, wrap: bool = True
) -> None:
    """One line `label     value`; a long value goes on under its own beginning.

    Args:
        style: of the whole line, or of the label alone.
        wrap: False for what is made to be pasted.
    """
    hang(screen, label.ljust(LABEL), value, first_style=style, style="" if label_only else style, wrap=wrap)


def hang(screen: Console, first: str, value: str, *, first_style: str = "", style: str = "", wrap: bool = True) -> None:
    """`first` and then `value`, which goes on under its own beginning where the line is full; no markup in either."""
    from rich.text import Text

    from porter.commands._wrap import wrapped

    shown = one_line(value)
    room = screen.width - len(first)
    rows = [shown]
    if wrap and not screen.soft_wrap and room > 20:
        rows = [row.plain for row in wrapped(Text(shown), room)] or [""]
    for number, row in enumerate(rows):
        line = Text()
        line.append(first if number == 0 else " " * len(first), style=first_style)
        line.append(row, style=style)
        screen.print(line, soft_wrap=True)


LABEL = 10  # columns of a fact's label


def table(*columns: str, right: Sequence[str] = (), cut: Sequence[str] = (), fold: Sequence[str] = ()) -> Table:
    """A plain table: columns in `right` are right-aligned, those in `cut` shortened with `…`, in `fold` broken."""
    from rich import box
    from rich.table import Table

    from porter.commands._wrap import Cell

    class Ours(Table):
        def add_row(self, *cells: Any, **options: Any) -> None:
            named = zip(columns, cells, strict=True)
            super().add_row(*(Cell(cell) if name in fold else cell for name, cell in named), **options)

    built = Ours(box=box.SIMPLE_HEAD, expand=bool(cut), pad_edge=False, header_style="bold", show_edge=False)
    for name in columns:
        justify: JustifyMethod = "right" if name in right else "left"
        broken = name in fold
        built.add_column(
            name, justify=justify, no_wrap=not broken, overflow="fold" if broken else "ellipsis",
            ratio=1 if name in cut else None,
        )  # fmt: skip
    return built


def print_json(document: dict[str, Any]) -> None:
    """Prints one document on stdout."""
    text = json.dumps(document, indent=2, ensure_ascii=False)
    click.echo(text.translate({code: f"\\u{code:04x}" for code in (*range(127, 160), 0x2028, 0x2029)}))


def escape(text: str) -> str:
    """A value from a model, for a line of ours: no markup in it works, and no line break makes a line of its own."""
    from rich.markup import escape as plain

    return plain(one_line(text))


def one_line(text: str) -> str:
    """A value from a model with its control characters, line breaks and tabs spelled out."""
    return visible(text).replace("\n", "\\n").replace("\t", "\\t")


class ByteBar:
    """A progress bar in bytes."""

    def __init__(self, progress: Progress, label: str) -> None:
        self._progress, self._task = progress, progress.add_task(label, total=None)

    def start(self, total: int) -> None:
        """Says how many bytes there will be."""
        self._progress.update(self._task, total=total)

    def advance(self, count: int) -> None:
        """Counts bytes that were moved."""
        self._progress.advance(self._task, count)


@contextmanager
def byte_progress(label: str, *, quiet: bool) -> Iterator[ByteBar | None]:
    """A progress bar on stderr; None where that is no terminal, or HF_HUB_DISABLE_PROGRESS_BARS or `quiet` is set."""
    off = os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS", "").upper() in ("1", "ON", "YES", "TRUE")
    if quiet or off or not sys.stderr.isatty():
        yield None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=notes(), transient=True) as progress:
        yield ByteBar(progress, label)
