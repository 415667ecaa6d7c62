"""Git-LFS pointers: which files were not fetched, and the command that fetches them, from where they can be had."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from porter.core.errors import MissingError
from porter.core.units import human_bytes, several
from porter.core.weights import WEIGHT_SUFFIXES

if TYPE_CHECKING:
    from porter.core.source import Source


def pointers(source: Source, names: Iterable[str]) -> list[str]:
    """Those of `names` of which only a pointer is here."""
    return [name for name in dict.fromkeys(names) if name in source.files and source.files[name].lfs_pointer]


def clone_of(source: Source, name: str) -> Path | None:
    """The git clone that keeps a file of the source with Git LFS; None where it lies in none."""
    place = source.place(name)
    for folder in place.parents if place else ():
        if (folder / ".git").exists():
            inside = [*place.parents[: list(place.parents).index(folder)], folder] if place else []
            return folder if any(_tracks(each / ".gitattributes") for each in inside) else None
    return None


def _tracks(attributes: Path) -> bool:
    try:
        return "filter=lfs" in attributes.read_text("utf-8", "replace")
    except OSError:
        return False


def refusal(source: Source, name: str) -> MissingError:
    """What is said to whoever wants the content of a file of which only a pointer is here."""
    why = "" if clone_of(source, name) else " (this is no git clone, where `git lfs pull` would do)"
    return MissingError(
        f"{name} is a Git-LFS pointer: its content was not downloaded",
        expected=f"the file itself, {source.files[name].size} bytes", hint=fetch_command(source, [name]) + why,
    )  # fmt: skip


def unfetched(source: Source, names: Iterable[str]) -> str | None:
    """What a plan says of the files it uses that are pointers; None where none is."""
    missing = pointers(source, names)
    if not missing:
        return None
    size = human_bytes(sum(source.files[name].size for name in missing))
    others = [name for name in missing if not name.endswith(WEIGHT_SUFFIXES)]
    weights = len(missing) - len(others)
    said = [several(weights, "weight file")] if weights else []
    if others:
        said.append(f"{several(len(others), 'other file')} ({', '.join(others[:2])}{' …' if len(others) > 2 else ''})")
    are = "is a Git-LFS pointer" if len(missing) == 1 else "are Git-LFS pointers"
    where = "" if clone_of(source, missing[0]) else "; this is no git clone: download them again"
    return f"{' and '.join(said)} that components use {are} ({size} not fetched){where}"


def fetch_command(source: Source, names: Iterable[str]) -> str:
    """The command that fetches `names`: from the clone that they lie in, else from where they came from."""
    wanted = list(names)
    clone, place = clone_of(source, wanted[0]), source.place(wanted[0])
    if clone and place:
        before = place.relative_to(clone).as_posix().removesuffix(wanted[0])
        include = ",".join(before + pattern for pattern in _patterns(source, wanted))
        return f"git -C {shlex.quote(str(clone))} lfs pull --include {shlex.quote(include)}"
    return download_command(source, _patterns(source, wanted))


def download_command(source: Source, patterns: Iterable[str]) -> str:
    """The command that downloads files into a local source's folder; whose they are only the user knows."""
    inner = f"{source.subfolder}/" if source.subfolder else ""
    names = [inner + pattern for pattern in patterns]
    starred = any("*" in name for name in names)
    said = " ".join(f"--include {shlex.quote(name)}" if starred else shlex.quote(name) for name in names)
    root = str(Path(source.spec).parent) if source.kind == "file" else source.spec
    return f"hf download OWNER/NAME {said} --local-dir {shlex.quote(root)}"


def _patterns(source: Source, names: list[str]) -> list[str]:
    """`names`, their shards as one pattern each where it fits no other file of the source."""
    found: list[str] = []
    for name in names:
        pattern = re.sub(r"-\d+-of-", "-*-of-", name)
        fits = [other for other in source.files if fnmatchcase(other, pattern)]
        found.append(pattern if len(fits) > 1 and set(fits) <= set(names) else name)
    return list(dict.fromkeys(found))
