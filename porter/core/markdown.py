"""Values inside Markdown of ours: whatever a stranger's files say is shown as text."""

from __future__ import annotations

import re

from porter.core.errors import visible

_SPECIAL = re.compile(r"([\\`*_\[\]<>#|~&@$]|:(?=//)|(?<=[Ww])\.(?=\S))")  # what is markup inside a line


def text(value: object) -> str:
    """A value as plain Markdown text: nothing in it is markup, a mention, a link or a line break."""
    return _SPECIAL.sub(r"\\\1", visible(str(value)).replace("\r", " ").replace("\n", " ").replace("\t", " "))


def code(value: object, *, cell: bool = False) -> str:
    """A value as inline code, whatever backticks it holds; in a table's `cell` a bar is escaped too."""
    plain = visible(str(value)).replace("\r", " ").replace("\n", " ") or " "
    plain = plain.replace("|", "\\|") if cell else plain
    longest = max((len(run) for run in re.findall(r"`+", plain)), default=0)
    fence = "`" * (longest + 1)
    pad = " " if longest else ""
    return f"{fence}{pad}{plain}{pad}{fence}"


def block(line: object) -> str:
    """A value as one line inside a fenced block, which it cannot end."""
    return visible(str(line)).replace("\r", " ").replace("\n", " ").replace("```", "` ` `")
