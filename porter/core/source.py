"""Where a model comes from: a hub id, a folder, one file, or an embedded model.

`open_source` answers the same questions for all four: which files there are and how large, the content of a JSON
file, the header of a weights file, and (only when a conversion asks) the path of the file itself. Weights are never
read here.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from porter import builtin
from porter.core.errors import BadInputError, MissingError, UsageError
from porter.core.files import FileInfo, check_counts, file_info, list_files, open_regular, printable, read_json

if TYPE_CHECKING:
    from porter.core.checkpoint import TensorInfo

Kind = Literal["hub", "folder", "file", "builtin"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class Source(ABC):
    """A model, as its files; opened by `open_source`.

    Attributes:
        kind: `hub`, `folder`, `file` or `builtin`.
        spec: the name that opens it again from any folder (local paths are absolute).
        given: the name as the user typed it.
        revision: the commit, for a hub source.
        subfolder: the folder inside the source that is looked at alone.
        tensors: how many were read of it so far.
        files: every file by its path inside the source, in sorted order.
        declared: what the model's card says of it: `license…`, `gated`, `base_model`, …; see `porter.core.card`.
    """

    kind: Kind
    spec: str
    given: str
    revision: str | None = None
    subfolder: str | None = None
    tensors: int = 0
    files: Mapping[str, FileInfo]

    @cached_property
    def declared(self) -> dict[str, Any]:
        return {}

    @property
    def declared_licence(self) -> dict[str, Any]:
        """What of `declared` is about the licence."""
        return {key: value for key, value in self.declared.items() if key.startswith("license")}

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
    def header(self, name: str) -> tuple[dict[str, TensorInfo], dict[str, Any]]:
        """Tensors and notes of a weights file in any format, without its data.

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
            BadInputError: it is not JSON, larger than 16 MB, or has a count of layers that no model has.
        """
        self._known(name)
        document = read_json(self._json_path(name))
        if isinstance(document, dict):
            check_counts(document, f"{name} of {self.given}")
        return document

    def prefetch(self, names: Iterable[str]) -> None:
        """Says which JSON files and headers will be asked for next; a remote source fetches them at once."""
        return

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
            from porter.core.pointers import refusal

            raise refusal(self, name)
        return info

    def place(self, name: str) -> Path | None:
        """Where a file or its pointer lies on this machine; None for what is on the hub."""
        return None


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
        self.spec, self.given, self.revision = spec, given, revision

    @cached_property
    def declared(self) -> dict[str, Any]:
        name = next((name for name in self.files if name.lower() == "readme.md"), None)
        if name is None or self.files[name].lfs_pointer:
            return {}
        from porter.core.card import MAX_CARD, read_card

        try:
            with open_regular(self.root / name) as file:
                return read_card(file.read(MAX_CARD).decode("utf-8", "replace"))
        except (OSError, BadInputError):  # gone since it was listed
            return {}

    def path(self, name: str) -> Path:
        self.content(name)
        return self.root / name

    def place(self, name: str) -> Path | None:
        return self.root / name

    def header(self, name: str) -> tuple[dict[str, TensorInfo], dict[str, Any]]:
        from porter.core.headers import read_any

        return read_any(self.path(name))

    def _json_path(self, name: str) -> Path:
        return self.root / name


def open_source(
    model: str | Path,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | None = None,
    offline: bool | None = None,
) -> Source:
    """Opens `model`: `builtin:<name>`, an existing folder or file, a saved plan, or else a hub id `owner/name`.

    Args:
        model: what the user typed.
        revision: branch, tag or commit, for a hub id only.
        subfolder: look at this folder of it alone.
        token: hub token; the stored one by default.
        offline: use only the hub's cache; None asks HF_HUB_OFFLINE.

    Raises:
        MissingError: no such path, embedded model or repository; unreachable.
        AccessError: a gated or private repository.
        UsageError: an empty name; a revision of something that is not on the hub.
        BadInputError: an empty folder, a symbolic link that leaves the tree, a plan that no longer holds.
    """
    given = str(model)
    if not given:
        raise UsageError(
            "no model was named: MODEL is empty", expected="a hub id, a folder or file", hint="porter plan ."
        )
    printable(given)
    whole = _open(given, revision, token, offline)
    if subfolder:
        from porter.core.subfolder import Subfolder

        return Subfolder(whole, subfolder)
    return whole


def _open(given: str, revision: str | None, token: str | None, offline: bool | None) -> Source:
    if given.startswith(builtin.PREFIX):
        root = builtin.locate(given.removeprefix(builtin.PREFIX))
        if root is None:
            known = ", ".join(builtin.PREFIX + name for name in builtin.names())
            raise MissingError(f"no embedded model is called {given}", expected=known, hint="porter families")
        _no_revision(revision, given)
        return LocalSource("builtin", root, list_files(root), spec=given, given=given)
    try:
        if given.endswith(".json") and (path := Path(given).expanduser()).is_file():
            from porter.core.planned import is_plan, open_planned

            if is_plan(path):
                _no_revision(revision, given)
                return open_planned(path, token=token, offline=offline)
        if (local := _open_local(Path(given).expanduser(), given)) is not None:
            _no_revision(revision, given)
            return local
    except (OSError, RuntimeError) as error:  # RuntimeError: `~nobody`, a loop of links
        found = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise MissingError(f"cannot read {given[:200]}", found=found, hint="check the path and its rights") from error
    if _HUB_ID.fullmatch(given) and not given.endswith((".safetensors", ".json")):
        from porter.core.hub import open_hub

        return open_hub(given, revision=revision, token=token, offline=offline)
    from porter.core.trouble import no_such_path

    raise no_such_path(given)


def _no_revision(revision: str | None, given: str) -> None:
    if revision is not None:
        raise UsageError(
            f"--revision {revision} means nothing for {given}",
            expected="a hub id with --revision",
            hint="leave out --revision, or check the commit out in the folder",
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
