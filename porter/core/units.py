"""Numbers for people: bytes, counts, and nouns that agree with them."""

from __future__ import annotations


def human_bytes(count: int | None) -> str:
    """`1536` → `1.5 kB`; decimal units; None is `?`."""
    if count is None:
        return "?"
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            break
        size /= 1000
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"


def human_count(count: int | None) -> str:
    """`11901408320` → `11.90 B`; None is `?`."""
    if count is None:
        return "?"
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return str(count)


def several(count: int, noun: str) -> str:
    """`1 file`, `2 files`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
