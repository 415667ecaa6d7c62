"""The files of a model folder, what a Git-LFS pointer stands for, and JSON that is checked as it is read."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from porter.core.errors import BadInputError, MissingError
from porter.core.strictjson import parse_json

MAX_DEPTH = 12
MAX_FILES = 20_000
MAX_FOLDERS = 2000
MAX_JSON = 16 << 20
MAX_MARKS = 600_000  # commas, colons and brackets of a JSON text: what its objects take in memory, about 150 bytes each
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


def open_regular(path: Path) -> BinaryIO:
    """Opens a file for reading; a pipe or a device is refused at once, where a plain `open` would wait for ever.

    Raises:
        OSError: it cannot be opened; IsADirectoryError for a folder.
        BadInputError: it is neither a file nor a folder.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(f"{path} is a folder")
        if not stat.S_ISREG(mode):
            raise BadInputError(f"{path} is a device or a pipe, not a file", hint="put a file in its place")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def count_marks(raw: bytes) -> int:
    """Commas, colons and opening brackets of a JSON text: no less than the objects that it would become.

    Parsed, five bytes of text can take 200 of memory; counting first keeps the memory of hostile files bounded.
    """
    return sum(map(raw.count, (b",", b":", b"[", b"{")))


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """An error of the system in here is one of reading `path`, whatever is being written meanwhile.

    Raises:
        BadInputError: instead of it.
    """
    try:
        yield
    except OSError as error:
        raise BadInputError(
            f"cannot read {path}", expected="the file as it was at the start", found=error.strerror or str(error),
            hint="check the disk that it lies on, then run the same again",
        ) from error  # fmt: skip


def read_json(path: Path, *, constants: bool = False) -> Any:
    """The content of a JSON file of at most 16 MB and 600,000 values, under the limits of `parse_json`.

    Raises:
        MissingError: no such file, or it cannot be read.
        BadInputError: it is not JSON, too large, or a device or a pipe.
    """

    try:
        with open_regular(path) as file:
            raw = file.read(MAX_JSON + 1)  # not its size first: a file can grow in between
        if len(raw) > MAX_JSON or count_marks(raw) > MAX_MARKS:
            raise BadInputError(
                f"{path} is too large for a configuration",
                expected=f"at most {MAX_JSON} bytes and {MAX_MARKS} values",
                hint="name the right file",
            )
        return parse_json(raw, constants=constants)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise MissingError(f"no such file: {path}", expected="a JSON file", hint="check the path") from error
    except OSError as error:
        raise MissingError(f"cannot read {path}", found=error.strerror, hint="check the path and its rights") from error
    except (ValueError, RecursionError) as error:
        raise BadInputError(
            f"{path} is not valid JSON", expected="a JSON document", found=str(error),
            hint="repair or download it again",
        ) from error  # fmt: skip


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
    """Size of a file, and what it stands for where it is a Git-LFS pointer.

    Raises:
        OSError: it cannot be read.
        BadInputError: a broken pointer, a device or a pipe.
    """
    size = path.stat().st_size
    if size < 1024:
        with open_regular(path) as file:
            text = file.read(1024)
        if text.startswith(_POINTER):
            fields = dict(line.split(" ", 1) for line in text.decode("ascii", "replace").splitlines() if " " in line)
            oid, real = fields.get("oid", ""), fields.get("size", "")
            if not (re.fullmatch(r"sha256:[0-9a-f]{64}", oid) and re.fullmatch(r"[0-9]{1,18}", real)):
                raise BadInputError(f"{path} is a broken Git-LFS pointer", found=repr(text[:120]), hint="git lfs pull")
            return FileInfo(int(real), oid.removeprefix("sha256:"), lfs_pointer=True)
    return FileInfo(size)


def list_files(root: Path) -> dict[str, FileInfo]:
    """Every file under `root`, sorted by path; hidden names are left out, links may not leave the tree.

    A snapshot folder of the hub's cache links to its own repository's `blobs`, which counts as its tree.

    Raises:
        BadInputError: nothing there, a link that leaves the tree, points nowhere or to a folder above it, more than
            20,000 files or 2000 folders (those that links lead to count each time), or more than 12 folders inside
            each other.
    """
    snapshot = root.parent.name == "snapshots" and (root.parent.parent / "blobs").is_dir()
    tree = root.parent.parent if snapshot else root
    found: dict[str, FileInfo] = {}
    folders = 0

    def walk(folder: Path, prefix: str, depth: int) -> None:
        nonlocal folders
        folders += 1
        with os.scandir(folder) as entries:
            here = list(islice(entries, 2 * MAX_FILES))
        if folders > MAX_FOLDERS or len(here) == 2 * MAX_FILES:
            raise BadInputError(
                f"{root} holds too many folders, links or files: it is no model folder",
                expected=f"at most {MAX_FILES} files in {MAX_FOLDERS} folders",
                found=prefix or root.name,
                hint="name the folder of one model",
            )
        real = Path(os.path.realpath(folder))
        for entry in sorted(here, key=lambda entry: entry.name):
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
                if real.is_relative_to(target):
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


def read_config(path: Path, *, constants: bool = False) -> dict[str, Any]:
    """A component's config: a JSON object whose counts of layers a machine can build.

    Args:
        constants: whether the infinities may stand in it, as in the configs of schedulers.

    Raises:
        MissingError: no such file.
        BadInputError: it is not JSON, not an object, or a count in it is beyond any model.
    """
    config = read_json(path, constants=constants)
    if not isinstance(config, dict):
        raise BadInputError(f"{path} is not a JSON object", found=type(config).__name__, hint="convert the model again")
    check_counts(config, str(path))
    return config


def check_counts(config: Mapping[str, Any], where: str) -> None:
    """Refuse a config from which headers or modules would be built without end, in whatever table of it.

    Raises:
        BadInputError: a number of layers or blocks, or a list of them, that no model has.
    """
    tables: list[Mapping[str, Any]] = [config]
    while tables:
        for key, value in tables.pop().items():
            if isinstance(value, Mapping):
                tables.append(value)
            elif isinstance(value, list):
                tables += [item for item in value if isinstance(item, Mapping)]
            if (_COUNTS.search(key) and _beyond(value)) or _endless(key, value):
                raise BadInputError(
                    f"{where}: {key[:80]} is beyond any model",
                    expected=f"at most {MAX_LAYERS} layers, and lists of at most {MAX_LIST}", found=str(value)[:80],
                    hint="repair or download it again",
                )  # fmt: skip


def _beyond(value: Any) -> bool:
    """Whether a number of layers, or one in a list of them, is none."""
    if isinstance(value, list):
        return any(_beyond(item) for item in value)
    return isinstance(value, int | float) and not isinstance(value, bool) and not -1 <= value <= MAX_LAYERS


def _endless(key: str, value: Any) -> bool:
    """Whether a list is longer than any of numbers, or of block types; a tokenizer's lists of words may be."""
    if not isinstance(value, list):
        return False
    numbers = sum(isinstance(item, int | float | list) for item in value)
    return numbers > MAX_LIST or (len(value) > MAX_LIST and key.endswith(("types", "type")))


def check_json(path: Path) -> None:
    """Refuse a JSON file that no reader could parse; its content is not judged.

    Raises:
        BadInputError: it is not JSON.
    """
    try:
        with open_regular(path) as file:
            json.load(file)
    except (ValueError, RecursionError) as error:
        raise BadInputError(
            f"{path} is not valid JSON", found=str(error), hint="repair or download it again"
        ) from error
