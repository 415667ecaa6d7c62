"""Lines that are broken where a reader would break them: between words, and long names at their own seams."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.measure import Measurement
from rich.text import Text

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

# Inside a name that is longer than a line: after a separator, before the next capital or a number.
_SEAM = re.compile(r"(?<=[/_.,:-])(?=.)|(?<=[a-z])(?=[A-Z0-9])|(?<=[A-Z][A-Z])(?=[A-Z][a-z])")
_LABEL = re.compile(r"\s*\S+(?:\s+\(\S+\))?\s{2,}")


def wrapped(text: Text, room: int) -> list[Text]:
    """`text` in lines of at most `room` columns."""
    offsets: list[int] = []
    used = 0
    for word in re.finditer(r"\S+\s*|\s+", text.plain):
        whole = word[0]
        if used and used + cell_len(whole.rstrip()) > room and cell_len(whole.rstrip()) <= room:
            offsets.append(word.start())
            used = 0
        if used + cell_len(whole.rstrip()) <= room:
            used += cell_len(whole)
            continue
        place = word.start()
        for piece in (part for seam in _SEAM.split(whole) for part in _cut(seam, room)):
            if used and used + cell_len(piece.rstrip()) > room:
                offsets.append(place)
                used = 0
            used += cell_len(piece)
            place += len(piece)
    lines = list(text.divide(offsets)) if offsets else [text.copy()]
    for line in lines:
        line.rstrip()
    return lines


def _cut(name: str, room: int) -> list[str]:
    """A piece without seams, by force where it is longer than a line."""
    step = max(1, room if cell_len(name) == len(name) else room // 2)
    return [name[at : at + step] for at in range(0, len(name), step)] if cell_len(name.rstrip()) > room else [name]


def hanging(text: Text, width: int) -> list[Text]:
    """A line that is too long, going on under what stands behind its label or its indent."""
    if cell_len(text.plain) <= width or "\n" in text.plain:
        return [text]
    label = _LABEL.match(text.plain)
    indent = label.end() if label else len(text.plain) - len(text.plain.lstrip()) or 2
    indent = indent if width - indent > 20 else 2
    head, rest = (text[: label.end()], text[label.end() :]) if label and indent == label.end() else (Text(), text)
    first, *more = wrapped(rest, width - indent)
    return [head + first, *(Text(" " * indent) + line for line in more)]


class Cell:
    """A cell of a table whose text is broken at its seams."""

    def __init__(self, markup: str) -> None:
        self.text = Text.from_markup(markup)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from wrapped(self.text, options.max_width)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        pieces = (piece for word in self.text.plain.split() for piece in _SEAM.split(word))
        least = max(map(cell_len, pieces), default=0)
        return Measurement(least, cell_len(self.text.plain)).with_maximum(options.max_width)
