"""A case's name as a file and a name. Stand-alone (the standard library only)."""

from __future__ import annotations

from pathlib import Path


def split_case(name: str) -> tuple[Path, str]:
    """`FILE.py[:NAME]` -> the file and the name, which may be empty. Folders of the path may have `.py` in them."""
    file, _, wanted = name.partition(".py:")
    return Path(file.removesuffix(".py") + ".py"), wanted
