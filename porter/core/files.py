"""The files of a model folder, what a Git-LFS pointer stands for, and JSON that is checked as it is read."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from porter.core.errors import BadInputError, MissingError

MAX_DEPTH = 12
MAX_FILES = 20_000
MAX_JSON = 64 << 20
MAX_LAYERS = 1000
MAX_LIST = 4096
_COUNTS = re.compile(r"(layers|blocks|depth)(_per_block)?$")
_POINTER = b"version https://git-lfs.github.com/spec/v1"


@dataclass(frozen=True)
class FileInfo:
    """One file of a source. `size` and `sha256` are the real file's where only a Git-LFS pointer is here."""

    size: int
    sha256: str | None = None
    lfs_pointer: bool = False


def read_json(path: Path) -> Any:
    """The content of a JSON file; no duplicate keys, no NaN, no half characters, at most 64 MB.

    Raises:
        MissingError: no such file.
        BadInputError: it is not JSON.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key stands in it twice")
        return found

    def no_number(word: str) -> float:
        raise ValueError(f"{word} is no JSON number")

    try:
        if path.stat().st_size > MAX_JSON:
            raise BadInputError(
                f"{path} is too large for a configuration",
                expected=f"at most {MAX_JSON} bytes",
                hint="name the right file",
            )
        raw = path.read_bytes()
        document = json.loads(raw, object_pairs_hook=unique, parse_constant=no_number)
        if b"\\u" in raw:
            json.dumps(document, ensure_ascii=False).encode()  # refuses a lone surrogate, which nothing could print
        return document
    except (FileNotFoundError, IsADirectoryError) as error:
        raise MissingError(f"no such file: {path}", hint="check the path") from error
    except (ValueError, RecursionError) as error:
        raise BadInputError(
            f"{path} is not valid JSON", found=str(error), hint="repair or download it again"
        ) from error


def printable(name: str) -> None:
    """Refuses a name that is not UTF-8: no manifest could hold it.

    Raises:
        BadInputError: always, for such a name.
    """
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise BadInputError(
            f"the name {name!r} is not UTF-8", expected="names in UTF-8", hint="rename it, then run the same again"
        ) from error


def file_info(path: Path) -> FileInfo:
    """Size of a file, and what it stands for where it is a Git-LFS pointer."""
    size = path.stat().st_size
    if size < 1024:
        text = path.read_bytes()
        if text.startswith(_POINTER):
            fields = dict(line.split(" ", 1) for line in text.decode("ascii", "replace").splitlines() if " " in line)
            oid, real = fields.get("oid", ""), fields.get("size", "")
            if not (re.fullmatch(r"sha256:[0-9a-f]{64}", oid) and real.isdigit()):
                raise BadInputError(f"{path} is a broken Git-LFS pointer", found=repr(text[:120]), hint="git lfs pull")
            return FileInfo(int(real), oid.removeprefix("sha256:"), lfs_pointer=True)
    return FileInfo(size)


def list_files(root: Path) -> dict[str, FileInfo]:
    """Every file under `root`, sorted by path; hidden names are left out, links may not leave the tree.

    A snapshot folder of the hub's cache links to its own repository's `blobs`, which counts as its tree.

    Raises:
        BadInputError: nothing there, a link that leaves the tree, points nowhere or to a folder above it, more than
            20,000 files, or more than 12 folders inside each other.
    """
    snapshot = root.parent.name == "snapshots" and (root.parent.parent / "blobs").is_dir()
    tree = root.parent.parent if snapshot else root
    found: dict[str, FileInfo] = {}

    def walk(folder: Path, prefix: str, depth: int) -> None:
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            if entry.name.startswith("."):
                continue
            printable(prefix + entry.name)
            if entry.is_symlink():
                target = Path(os.path.realpath(entry.path))  # not `resolve`, which raises on a loop
                if not target.is_relative_to(tree) or not target.exists():
                    fault = "leaves the folder" if target.exists() else "points nowhere"
                    raise BadInputError(
                        f"{prefix}{entry.name} is a link that {fault}",
                        found=str(target),
                        hint="put the file itself into the folder, or pass the file alone",
                    )
                if Path(os.path.realpath(folder)).is_relative_to(target):
                    raise BadInputError(
                        f"{prefix}{entry.name} is a link to a folder above it: a loop",
                        found=str(target),
                        hint="remove the link",
                    )
            if entry.is_dir():
                if depth == MAX_DEPTH:
                    raise BadInputError(
                        f"{root} has folders inside folders without end: it is no model folder",
                        expected=f"at most {MAX_DEPTH} levels",
                        found=f"{prefix}{entry.name}",
                        hint="name the folder of one model",
                    )
                walk(Path(entry.path), f"{prefix}{entry.name}/", depth + 1)
            elif entry.is_file():
                found[prefix + entry.name] = file_info(Path(entry.path))
            if len(found) > MAX_FILES:
                raise BadInputError(
                    f"{root} holds more than {MAX_FILES} files: it is no model folder",
                    hint="name the folder of one model",
                )

    walk(root, "", 0)
    if not found:
        raise BadInputError(
            f"{root} is an empty folder",
            expected="a model_index.json, or a checkpoint file",
            hint="porter plan <another folder>",
        )
    return found


def read_config(path: Path) -> dict[str, Any]:
    """A component's config: a JSON object whose counts of layers a machine can build.

    Raises:
        MissingError: no such file.
        BadInputError: it is not JSON, not an object, or a count in it is beyond any model.
    """
    config = read_json(path)
    if not isinstance(config, dict):
        raise BadInputError(f"{path} is not a JSON object", found=type(config).__name__, hint="convert the model again")
    check_counts(config, str(path))
    return config


def check_counts(config: Mapping[str, Any], where: str) -> None:
    """Refuse a config from which headers or modules would be built without end.

    Raises:
        BadInputError: a number of layers or blocks, or a list of them, that no model has.
    """
    for key, value in config.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        endless = isinstance(value, list) and len(value) > MAX_LIST
        if endless or (number and _COUNTS.search(key) and not -1 <= value <= MAX_LAYERS):
            raise BadInputError(
                f"{where}: {key} is beyond any model", expected=f"at most {MAX_LAYERS} layers", found=str(value)[:80],
                hint="repair or download it again",
            )  # fmt: skip


def check_json(path: Path) -> None:
    """Refuse a JSON file that no reader could parse; its content is not judged.

    Raises:
        BadInputError: it is not JSON.
    """
    try:
        json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise BadInputError(
            f"{path} is not valid JSON", found=str(error), hint="repair or download it again"
        ) from error
