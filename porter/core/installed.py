"""The source files of the installed diffusers and transformers, found and cut up without importing them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from functools import cache
from importlib.util import find_spec
from pathlib import Path

# Where a top-level class ends.
_NEXT = re.compile(rb"\n(?=(?:class|def|async def) \w|@\w)")


def library_root(library: str) -> Path | None:
    """The folder of an installed library, or None; it is not imported."""
    spec = find_spec(library) if library.isidentifier() else None
    places = spec.submodule_search_locations if spec else None
    return Path(next(iter(places))) if places else None


def listed_files(place: Path, class_name: str) -> list[Path]:
    """The file that a library's table of lazy imports names for a class."""
    text = file_bytes(place / "__init__.py")
    rows = re.finditer(rb'_import_structure\["([\w.]+)"\]([^_]*(?:_(?!import_structure)[^_]*)*)', text)
    inside = [row[1].decode() for row in rows if f'"{class_name}"'.encode() in row[2]]
    return [place / (name.replace(".", "/") + ".py") for name in inside]


@cache
def listing(folder: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(files, folders) of a folder of an installed library, by name; neither where there is none."""
    try:
        with os.scandir(folder) as entries:
            pairs = [(entry.name, entry.is_dir()) for entry in entries]
    except OSError:
        return (), ()
    return tuple(sorted(n for n, is_dir in pairs if not is_dir)), tuple(sorted(n for n, is_dir in pairs if is_dir))


def matching(folder: str, pattern: str) -> Iterator[Path]:
    """`Path(folder).glob(pattern)` in order; each folder is read once."""
    first, _, rest = pattern.partition("/")
    files, folders = listing(folder)
    if not rest:
        yield from (Path(folder, name) for name in files if fnmatchcase(name, first))
        return
    for name in folders:
        if fnmatchcase(name, first):
            yield from matching(f"{folder}/{name}", rest)


def model_files(root: Path, model_type: str, pattern: str) -> Iterator[Path]:
    """Files of the folders that a type's name begins with: the text model `clip_text_model` stands in `clip`."""
    plain = model_type.replace("-", "_")
    models = root / "models"
    folders = set(listing(str(models))[1])
    for end in range(len(plain), 1, -1):
        if plain[:end] in folders:
            yield from matching(str(models / plain[:end]), pattern)


def class_block(text: bytes, class_name: str) -> tuple[int, bytes] | None:
    """(line, source) of a top-level class, cut out so that its file need not be parsed.

    It ends where the next function, class or decorator begins: strings in it may have lines at the left margin.
    """
    found = re.search(rb"^class " + class_name.encode() + rb"\b", text, re.MULTILINE)
    if found is None:
        return None
    end = _NEXT.search(text, found.end())
    return text.count(b"\n", 0, found.start()) + 1, text[found.start() : end.start() + 1 if end else len(text)]


def file_bytes(file: Path) -> bytes:
    """A file's content; empty where it cannot be read."""
    try:
        return file.read_bytes()
    except OSError:
        return b""
