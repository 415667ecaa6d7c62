"""Where a model comes from: a hub id, a folder, one file, or an embedded model.

`open_source` answers the same questions for all four: which files there are and how large, the content of a JSON
file, the header of a weights file, and (only when a conversion asks) the path of the file itself. Weights are never
read here.
"""

from __future__ import annotations

import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from porter import builtin
from porter.core.errors import BadInputError, MissingError

if TYPE_CHECKING:
    from porter.core.checkpoint import TensorInfo

Kind = Literal["hub", "folder", "file", "builtin"]
MAX_DEPTH = 4
MAX_FILES = 20_000
MAX_JSON = 64 << 20
_POINTER = b"version https://git-lfs.github.com/spec/v1"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class FileInfo:
    """One file of a source. `size` and `sha256` are the real file's where only a Git-LFS pointer is here."""

    size: int
    sha256: str | None = None
    lfs_pointer: bool = False


class Source(ABC):
    """A model, as its files; opened by `open_source`.

    Attributes:
        kind: `hub`, `folder`, `file` or `builtin`.
        spec: the name that opens it again from any folder (local paths are absolute).
        given: the name as the user typed it.
        revision: the commit, for a hub source.
        files: every file by its path inside the source, in sorted order.
        declared: what the place itself says about the model (hub: licence, gating).
    """

    kind: Kind
    spec: str
    given: str
    revision: str | None = None
    files: Mapping[str, FileInfo]
    declared: Mapping[str, Any]

    @property
    def name(self) -> str:
        """A short name, fit for a folder."""
        return (
            Path(self.spec.removeprefix(builtin.PREFIX)).stem
            if self.kind == "file"
            else re.split(r"[/:]", self.spec.rstrip("/"))[-1]
        )

    @abstractmethod
    def path(self, name: str) -> Path:
        """The file itself, on this machine (a hub source downloads it into the hub's cache).

        Raises:
            MissingError: no such file, only a Git-LFS pointer, or the hub cannot be reached.
        """

    @abstractmethod
    def header(self, name: str) -> tuple[dict[str, TensorInfo], dict[str, str]]:
        """Tensors and metadata of a safetensors file, without its data.

        Raises:
            MissingError: as for `path`.
            CheckpointError: the file breaks the format.
        """

    @abstractmethod
    def _json_path(self, name: str) -> Path: ...

    def json(self, name: str) -> Any:
        """The content of a JSON file.

        Raises:
            MissingError: no such file.
            BadInputError: it is not JSON, or larger than 64 MB.
        """
        self._known(name)
        return read_json(self._json_path(name))

    def _known(self, name: str) -> FileInfo:
        if name not in self.files:
            raise MissingError(f"{self.given} holds no file {name}", hint=f"porter plan {self.given}")
        return self.files[name]

    def content(self, name: str) -> FileInfo:
        """Size and hash of a file whose content can be had, here or from the hub.

        Raises:
            MissingError: no such file, or only a Git-LFS pointer.
        """
        info = self._known(name)
        if info.lfs_pointer:
            raise MissingError(
                f"{name} is a Git-LFS pointer: its weights were not downloaded",
                expected=f"a safetensors file of {info.size} bytes",
                hint=f"git -C {self.spec} lfs pull --include {name}",
            )
        return info


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


class LocalSource(Source):
    """Files on this machine: a folder (or a hub snapshot in the cache), or one file."""

    def __init__(
        self,
        kind: Kind,
        root: Path,
        files: Mapping[str, FileInfo],
        *,
        spec: str,
        given: str,
        revision: str | None = None,
    ) -> None:
        self.kind, self.root, self.files = kind, root, files
        self.spec, self.given, self.revision, self.declared = spec, given, revision, {}

    def path(self, name: str) -> Path:
        self.content(name)
        return self.root / name

    def header(self, name: str) -> tuple[dict[str, TensorInfo], dict[str, str]]:
        from porter.core.checkpoint import read_header

        return read_header(self.path(name))

    def _json_path(self, name: str) -> Path:
        return self.root / name


def open_source(
    model: str | Path, *, revision: str | None = None, token: str | None = None, offline: bool | None = None
) -> Source:
    """Opens `model`: `builtin:<name>`, an existing folder or file, or else a hub id `owner/name`.

    Args:
        model: what the user typed.
        revision: branch, tag or commit, for a hub id only.
        token: hub token; the stored one by default.
        offline: use only the hub's cache; None asks HF_HUB_OFFLINE.

    Raises:
        MissingError: no such path, embedded model or repository; unreachable.
        AccessError: a gated or private repository.
        BadInputError: an empty folder, a symbolic link that leaves the tree.
    """
    given = str(model)
    _printable(given)
    if given.startswith(builtin.PREFIX):
        root = builtin.locate(given.removeprefix(builtin.PREFIX))
        if root is None:
            known = ", ".join(builtin.PREFIX + name for name in builtin.names())
            raise MissingError(f"no embedded model is called {given}", expected=known, hint="porter families")
        return LocalSource("builtin", root, list_files(root), spec=given, given=given)
    try:
        if (local := _open_local(Path(given).expanduser(), given)) is not None:
            return local
    except (OSError, RuntimeError) as error:  # RuntimeError: `~nobody`, a loop of links
        found = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise MissingError(f"cannot read {given[:200]}", found=found, hint="check the path and its rights") from error
    if _HUB_ID.fullmatch(given) and not given.endswith((".safetensors", ".json")):
        from porter.core.hub import open_hub

        return open_hub(given, revision=revision, token=token, offline=offline)
    raise MissingError(
        f"no such path: {given}",
        expected="a folder, a checkpoint file, a hub id `owner/name`, or builtin:<name>",
        hint="porter plan builtin:tiny-flux",
    )


def _open_local(path: Path, given: str) -> LocalSource | None:
    """The folder or file at `path`; None where nothing is there."""
    if path.is_dir():
        return LocalSource("folder", path.resolve(), list_files(path.resolve()), spec=str(path.resolve()), given=given)
    if path.is_file():
        whole = path.absolute()
        return LocalSource("file", whole.parent, {path.name: file_info(whole)}, spec=str(whole), given=given)
    if path.exists():
        raise BadInputError(f"{given} is a device or a pipe, not a model", hint="name a folder or a checkpoint file")
    return None


def _printable(name: str) -> None:
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
        BadInputError: nothing there, a link that leaves the tree or points nowhere, or more than 20,000 files.
    """
    snapshot = root.parent.name == "snapshots" and (root.parent.parent / "blobs").is_dir()
    tree = root.parent.parent if snapshot else root
    found: dict[str, FileInfo] = {}

    def walk(folder: Path, prefix: str, depth: int) -> None:
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            if entry.name.startswith("."):
                continue
            _printable(prefix + entry.name)
            if entry.is_symlink():
                target = Path(os.path.realpath(entry.path))  # not `resolve`, which raises on a loop
                if not target.is_relative_to(tree) or not target.exists():
                    fault = "leaves the folder" if target.exists() else "points nowhere"
                    raise BadInputError(
                        f"{prefix}{entry.name} is a link that {fault}",
                        found=str(target),
                        hint="put the file itself into the folder, or pass the file alone",
                    )
            if entry.is_dir():
                if depth < MAX_DEPTH:
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
