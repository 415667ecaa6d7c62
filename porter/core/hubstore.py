"""What planning learnt of a hub repository, kept so that the same plan works offline.

The hub's cache keeps whole files, so a plan leaves nothing there but JSON. File list, headers and the commit that a
branch stood at go to the place that huggingface_hub gives other libraries for their own files, `HF_ASSETS_CACHE`
(`$HF_HOME/assets/porter/<owner>--<name>/`), one folder a commit: commits never change, so nothing here grows old. What
is found here is checked like any other input; what does not fit counts as not found.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from porter.core.atomic import replace_bytes
from porter.core.checkpoint import TensorInfo
from porter.core.errors import BadInputError, PorterError
from porter.core.files import FileInfo, open_regular, read_json

SCHEMA = "porter.hub/1"
COMMIT = re.compile(r"[0-9a-f]{40}")
_SHORT = re.compile(r"[0-9a-f]{7,39}")


class HubStore:
    """The cache of one repository: huggingface_hub's own, which is only read, and our notes beside it."""

    def __init__(self, repo: str) -> None:
        from huggingface_hub import constants

        self.hub = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
        self.notes = Path(constants.HF_ASSETS_CACHE) / "porter" / repo.replace("/", "--")

    def snapshot(self, commit: str) -> Path:
        """Where huggingface_hub keeps the files of a commit; need not exist."""
        return self.hub / "snapshots" / commit

    def commit(self, revision: str | None) -> str | None:
        """The commit that `revision` (None: the default branch) stood at when it was last asked for; None if unknown.

        Raises:
            BadInputError: the cache says something that is no commit.
        """
        if revision and COMMIT.fullmatch(revision):
            return revision if self._knows(revision) else None
        places = [place for place in (self.hub / "refs" / (revision or "main"), self._ref(revision)) if place.is_file()]
        if places:
            return _commit_in(max(places, key=lambda place: place.stat().st_mtime_ns))
        if revision and _SHORT.fullmatch(revision):
            begun = [commit for commit in self.commits() if commit.startswith(revision)]
            return begun[0] if len(begun) == 1 else None
        return None

    def commits(self) -> list[str]:
        """Every commit of which something is here."""
        folders = (place for root in (self.hub / "snapshots", self.notes) if root.is_dir() for place in root.iterdir())
        return sorted({place.name for place in folders if COMMIT.fullmatch(place.name) and place.is_dir()})

    def remember(self, revision: str | None, commit: str) -> None:
        """Notes where `revision` stands now."""
        if revision != commit:
            self._write(self._ref(revision), commit.encode())

    def listing(self, commit: str) -> tuple[dict[str, FileInfo], dict[str, Any]] | None:
        """(files, declared) of a commit, or None."""
        found = self._read(self.notes / commit / "listing.json")
        try:
            files = {str(name): FileInfo(_size(size), _word(digest)) for name, (size, digest) in found["files"].items()}
            return files, dict(found["declared"])
        except (TypeError, KeyError, ValueError, AttributeError):
            return None

    def keep_listing(self, commit: str, files: Mapping[str, FileInfo], declared: Mapping[str, Any]) -> None:
        table = {name: [info.size, info.sha256] for name, info in files.items()}
        self._note(self.notes / commit / "listing.json", {"files": table, "declared": dict(declared)})

    def header(self, commit: str, name: str, size: int) -> tuple[dict[str, TensorInfo], dict[str, Any]] | None:
        """The header of a file of `size` bytes at a commit, or None."""
        found = self._read(self._header(commit, name))
        try:
            if (found["name"], found["size"]) != (name, size):
                return None
            tensors = {
                str(key): TensorInfo(
                    str(key), str(dtype), tuple(map(_size, shape)), Path(name), _size(begin), _size(end)
                )
                for key, dtype, shape, begin, end in found["tensors"]
            }
            return tensors, dict(found["notes"])
        except (TypeError, KeyError, ValueError):
            return None

    def keep_header(
        self, commit: str, name: str, size: int, header: Mapping[str, TensorInfo], notes: Mapping[str, Any]
    ) -> None:
        rows = [[info.name, info.dtype, info.shape, info.begin, info.end] for info in header.values()]
        document = {"name": name, "size": size, "tensors": rows, "notes": dict(notes)}
        self._note(self._header(commit, name), document)

    def _knows(self, commit: str) -> bool:
        return self.snapshot(commit).is_dir() or (self.notes / commit / "listing.json").is_file()

    def _ref(self, revision: str | None) -> Path:
        return self.notes / "refs" / ("default" if revision is None else "@" + urllib.parse.quote(revision, safe=""))

    def _header(self, commit: str, name: str) -> Path:
        return self.notes / commit / f"{hashlib.sha256(name.encode()).hexdigest()}.json"

    def _read(self, path: Path) -> Any:
        try:
            found = read_json(path)
        except PorterError:
            return None
        return found if isinstance(found, dict) and found.get("schema") == SCHEMA else None

    def _note(self, path: Path, document: Mapping[str, Any]) -> None:
        self._write(path, json.dumps({"schema": SCHEMA, **document}, separators=(",", ":")).encode())

    def _write(self, path: Path, data: bytes) -> None:
        with contextlib.suppress(OSError):  # a full or read-only disk costs a later plan its shortcut, no more
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_bytes(path, data)


def go_online() -> str:
    """What to leave out so that the hub is asked: the variable that forbids it, else the option."""
    from huggingface_hub import constants

    names = [name for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if os.environ.get(name)]
    return f"unset {names[0]}" if constants.HF_HUB_OFFLINE and names else "leave out --offline"


def _commit_in(ref: Path) -> str:
    try:
        with open_regular(ref) as file:
            text = file.read(64).decode("ascii", "replace").strip()
    except OSError as error:
        text = error.strerror or str(error)
    if not COMMIT.fullmatch(text):
        raise BadInputError(
            f"{ref} of the hub's cache names no commit", expected="40 hexadecimal digits", found=text[:60],
            hint=f"remove that file, or {go_online()}",
        )  # fmt: skip
    return text


def _size(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63:
        return value
    raise ValueError("no size")


def _word(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    raise ValueError("no word")
