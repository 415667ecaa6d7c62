"""One folder of a source, looked at alone."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from porter.core.errors import MissingError
from porter.core.source import Source

if TYPE_CHECKING:
    from porter.core.checkpoint import TensorInfo


class Subfolder(Source):
    """One folder of another source, as if it were the whole."""

    def __init__(self, whole: Source, folder: str) -> None:
        prefix = folder.strip("/") + "/"
        self._whole, self._prefix = whole, prefix
        self.kind, self.spec, self.given, self.revision = whole.kind, whole.spec, whole.given, whole.revision
        self.subfolder, self.declared = folder.strip("/"), whole.declared
        self.files = {name.removeprefix(prefix): info for name, info in whole.files.items() if name.startswith(prefix)}
        if not self.files:
            places = sorted({name.split("/")[0] for name in whole.files if "/" in name})
            raise MissingError(
                f"{whole.given} holds no folder {folder}", expected=", ".join(places[:8]) or "a folder with files",
                hint=f"porter plan {whole.given}",
            )  # fmt: skip

    @property
    def name(self) -> str:
        return f"{self._whole.name}-{self.subfolder}".replace("/", "-")

    def path(self, name: str) -> Path:
        return self._whole.path(self._prefix + name)

    def place(self, name: str) -> Path | None:
        return self._whole.place(self._prefix + name)

    def header(self, name: str) -> tuple[dict[str, TensorInfo], dict[str, str]]:
        return self._whole.header(self._prefix + name)

    def json(self, name: str) -> Any:
        return self._whole.json(self._prefix + name)

    def prefetch(self, names: Iterable[str]) -> None:
        self._whole.prefetch([self._prefix + name for name in names])

    def _json_path(self, name: str) -> Path:
        return self._whole._json_path(self._prefix + name)
