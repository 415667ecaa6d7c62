"""A model card's front matter: what a repository says of its licence, its gate and its origin."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

MAX_CARD = 1 << 20  # characters of a README that are looked at
MAX_ENTRY = 1 << 12  # characters of one entry; a prompt of terms may be longer, and its text is not needed
_WORDS = ("license", "license_name", "license_link", "library_name", "pipeline_tag")
_LISTS = ("base_model",)
_KEY = re.compile(r"([A-Za-z_][\w-]*)\s*:(?:\s|$)")


def read_card(text: str) -> dict[str, Any]:
    """What a README.md's front matter declares; empty where there is none.

    Returns:
        `license`, `license_name`, `license_link`, `library_name`, `pipeline_tag` as strings, `base_model` as a list of
        strings, and `gated` where the card asks for terms. Only these entries are parsed, each by itself, so that a
        damaged or hostile entry elsewhere costs nothing; one that is not of its type is left out.
    """
    lines = text[:MAX_CARD].removeprefix("\ufeff").lstrip().splitlines()
    if not lines or lines[0].rstrip() != "---":
        return {}
    end = next((number for number, line in enumerate(lines[1:], 1) if line.rstrip() in ("---", "...")), None)
    if end is None:
        return {}
    entries: dict[str, list[str]] = {}
    block: list[str] = []
    for line in lines[1:end]:
        if match := _KEY.match(line):  # at the left edge: what follows, indented or as "- item", belongs to it
            block = entries[match[1]] = []
        block.append(line)
    raw = {key: _parse("\n".join(entries[key])) for key in (*_WORDS, *_LISTS) if key in entries}
    found = declared(raw)
    if any(key.startswith("extra_gated_") for key in entries):
        found["gated"] = "by its model card"
    return found


def declared(card: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a card's metadata that a plan passes on, checked for their types."""
    found: dict[str, Any] = {}
    for key in (*_WORDS, *_LISTS):
        value = card.get(key)
        items = value if isinstance(value, list | tuple) else [value]
        words = [word.strip() for word in items[:20] if isinstance(word, str) and 0 < len(word.strip()) <= 500]
        if words:
            found[key] = words if key in _LISTS else ", ".join(words)
    return found


def _parse(block: str) -> Any:
    """One entry's value; None where it is none that could be wanted."""
    if len(block) > MAX_ENTRY or re.search(
        r"(^|[\s\[{,:-])[&*!][\w!]", block
    ):  # anchors and tags have no business here
        return None
    import yaml  # type: ignore[import-untyped]

    try:
        table = yaml.load(block, Loader=yaml.BaseLoader)  # strings, lists and tables only; "no" stays a word
    except (yaml.YAMLError, RecursionError, ValueError):
        return None
    return next(iter(table.values()), None) if isinstance(table, dict) else None
