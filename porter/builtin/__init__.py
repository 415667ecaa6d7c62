"""Models that ship inside the package, named `builtin:<name>`."""

from __future__ import annotations

from pathlib import Path

PREFIX = "builtin:"


def names() -> list[str]:
    """The embedded models' names, as they follow `builtin:`."""
    root = Path(__file__).parent
    return sorted(path.parent.name.replace("_", "-") for path in root.glob("*/model_index.json"))


def locate(name: str) -> Path | None:
    """The folder of embedded model `name` (without the prefix), or None when there is no such model."""
    return Path(__file__).parent / name.replace("-", "_") if name in names() else None
