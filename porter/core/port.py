"""The port folder: the diffusers layout, plus `manifest.json` and the evidence in `parity/`.

    PORT/
      model_index.json  <component>/…      what diffusers loads
      manifest.json                        porter.manifest/1: where every file came from, and what it must be
      parity/parity.json  parity/report.html

`manifest.json`:

    {"schema": "porter.manifest/1", "porter": "0.1.0", "status": "complete", "direction": "diffusers",
     "family": "…" | null, "pipeline": "…" | null, "licence": {"hint": …, "files": […], "declared": …},
     "source": {"spec": …, "kind": …, "revision": …,
                "files": {name: {"size": …, "mtime_ns": …, "sha256": …}}},
     "base": {"spec": …, "revision": …, "files": {…}} | null,
     "components": {name: {"library", "class", "action": "convert"|"copy", "sources": [name…],
                           "recipe": {"name", "reference", "digest"} | null, "dtype": … | null,
                           "config": {…} | null, "source_metadata": {…}, "source_dtypes": …, "coverage": {…} | null}},
     "files": {path: {"size", "mtime_ns", "sha256"}},
     "loss": {"exact": bool, "dropped": […], "lossy": […]}}

`parity/parity.json` belongs to the port as long as its `"manifest_sha256"` is the manifest's; its `"passed"` is the
verdict.
"""

from __future__ import annotations

import importlib.util
import stat
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from porter.core.errors import BadInputError, MissingError, PorterError
from porter.core.files import open_regular, read_json

MANIFEST = "manifest.json"
SCHEMA = "porter.manifest/1"
PARITY = Path("parity") / "parity.json"
BadVerdict = Literal["missing", "failed", "stale"]
Verdict = Literal["missing", "failed", "stale", "passed"]
_WINDOW = 8 << 20
_OURS = ("porter", "parity", "runtime", "conversions")  # to find a module imports its package: no file chooses another


def file_sha256(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """sha256 of a file, read in windows; `progress` is called with the bytes of each."""
    from hashlib import sha256  # loads OpenSSL, which a plan does without

    digest = sha256()
    with open_regular(path) as file:
        while window := file.read(_WINDOW):
            digest.update(window)
            if progress:
                progress(len(window))
    return digest.hexdigest()


def file_record(path: Path, sha256: str) -> dict[str, Any]:
    """What a manifest says about a file: size, modification time, sha256."""
    found = path.stat()
    return {"size": found.st_size, "mtime_ns": found.st_mtime_ns, "sha256": sha256}


@dataclass(frozen=True)
class Port:
    """A port folder, opened by `Port.open`."""

    path: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, path: str | Path) -> Port:
        """Reads `path`/manifest.json.

        Raises:
            MissingError: no such folder, or a folder without a manifest.
            BadInputError: the manifest is not JSON, of another schema, or incomplete.
        """
        root = Path(path)
        if root.is_file():
            raise MissingError(f"{root} is a file, not a port folder", hint=f"name its folder: {root.parent}")
        if str(path).startswith("builtin:"):
            name = str(path).removeprefix("builtin:")
            raise BadInputError(
                f"{path} is a model to port, not yet a port", hint=f"porter convert {path} -o {name}-port"
            )
        if not root.is_dir():
            raise MissingError(f"no such port folder: {root}", hint=f"porter convert <model> -o {root}")
        file = root / MANIFEST
        if not file.is_file():
            raise MissingError(
                f"{root} is not a port: it holds no {MANIFEST}", hint=f"porter convert {root} -o {root}-port"
            )
        manifest = read_json(file)
        schema = manifest.get("schema") if isinstance(manifest, dict) else None
        if schema != SCHEMA:
            raise BadInputError(
                f"{file} has an unknown schema", expected=SCHEMA, found=str(schema), hint="convert the model again"
            )
        if manifest.get("status") != "complete":
            raise BadInputError(f"{root} is an unfinished port", hint="run the same `porter convert` again")
        if manifest.get("direction") != "diffusers":
            raise BadInputError(
                f"{root} holds a model in the {manifest.get('direction')} layout, not a port",
                hint=f"porter convert {root} -o {root}-port",
            )
        _check(file, manifest)
        return cls(root, manifest)

    @property
    def manifest_sha256(self) -> str:
        """sha256 of the manifest file: what parity.json is bound to."""
        return file_sha256(self.path / MANIFEST)

    @property
    def components(self) -> list[str]:
        """Names of the components that the port holds, in the manifest's order."""
        return list(self.manifest["components"])

    def component_dir(self, name: str) -> Path:
        """The folder of component `name`.

        Raises:
            MissingError: the port has no such component.
        """
        if name not in self.manifest["components"]:
            raise MissingError(
                f"the port {self.path} has no component {name!r}",
                expected="one of " + ", ".join(self.components),
                hint=f"porter convert MODEL --component {name} -o PORT",
            )
        return self.path / name

    def stale(self, full: bool = False) -> list[str]:
        """Files that are no longer what the manifest says, or are new in a component; an empty list is a fresh port.

        Quick: sizes and modification times; a file whose time alone differs (a copied port) is hashed. `full`: every
        file is hashed.
        """
        changed = []
        for name, expected in self.manifest["files"].items():
            path = self.path / name
            try:
                found = path.stat()
            except OSError:
                changed.append(name)
                continue
            same_time = found.st_mtime_ns == expected["mtime_ns"]
            same = stat.S_ISREG(found.st_mode) and found.st_size == expected["size"]
            if not same or ((full or not same_time) and file_sha256(path) != expected["sha256"]):
                changed.append(name)
        # A file that was added beside the weights, such as an index of shards, can change what is loaded.
        for component in self.components:
            here = sorted(p for p in (self.path / component).glob("*") if p.is_file() and not p.name.startswith("."))
            names = [f"{component}/{path.name}" for path in here]
            changed += [name for name in names if name not in self.manifest["files"]]
        return changed

    def parity(self) -> dict[str, Any] | None:
        """The parity document beside the port, or None where there is none that can be read."""
        try:
            document = read_json(self.path / PARITY, constants=True)
        except PorterError:
            return None
        return document if isinstance(document, dict) else None

    def verdict(self, full: bool = False) -> Verdict:
        """`missing` (never compared), `stale` (the port or the code that ran it changed), `failed` or `passed`."""
        document = self.parity()
        if document is None:
            return "missing"
        code = document.get("code")
        if document.get("manifest_sha256") != self.manifest_sha256 or self.stale(full) or not _same_code(code):
            return "stale"
        return "passed" if document.get("passed") is True else "failed"


def _same_code(known: Any) -> bool:
    """Whether the code that a verdict was reached with is the code that is installed."""
    try:
        ours = isinstance(known, dict) and bool(known) and all(str(n).partition(".")[0] in _OURS for n in known)
        return ours and all(code_sha256(str(name)) == digest for name, digest in known.items())
    except (PorterError, ImportError, OSError, ValueError):
        return False


def code_sha256(module: str) -> str:
    """One hash of a module's source, or of all sources in a package: what a verdict is bound to.

    Raises:
        BadInputError: there is no such module.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise BadInputError(f"no module {module} to bind a verdict to", hint="install porter again")
    origin = Path(spec.origin)
    files = sorted(origin.parent.rglob("*.py")) if origin.name == "__init__.py" else [origin]
    from hashlib import sha256

    digest = sha256()
    for file in files:
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


@contextmanager
def hostile_until_proven(path: Path) -> Iterator[None]:
    """While a model runs: an error that nobody foresaw is the model's, unless its parity has passed as it stands.

    Configs and tokenizers are checked by nobody before their library runs on them (no heads, words for numbers). A port
    that passed did run, so an error in it is ours, and stays what it is.

    Raises:
        BadInputError: instead of such an error.
    """
    try:
        yield
    except (PorterError, MemoryError):
        raise
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError" or "allocate memory" in str(error):
            raise
        port = Port.open(path) if is_manifest(path / MANIFEST) else None
        if port and port.verdict(full=True) == "passed":
            raise
        changed = port.stale(full=True) if port else []
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(frame.filename).name}:{frame.lineno}"
        raise BadInputError(
            f"{path} does not run",
            expected="the files as they were converted" if changed else "configs that the components' classes can run",
            found=f"{type(error).__name__}: {str(error)[:200]} ({place})"
            + "".join(f"; changed: {n}" for n in changed[:3]),
            hint="--verbose shows where; then repair the file, or convert the model again",
        ) from error


def is_manifest(path: Path) -> bool:
    """Whether `path` is a manifest of porter's, of any version, and not another tool's file of that name."""
    try:
        document = read_json(path)
    except PorterError:
        return False
    return isinstance(document, dict) and str(document.get("schema", "")).startswith("porter.manifest/")


def _check(file: Path, manifest: dict[str, Any]) -> None:
    """Refuses a manifest that lacks something its readers rely on, or names a file outside the folder."""

    def holds(value: Any, **kinds: type | tuple[type, ...]) -> bool:
        return isinstance(value, dict) and all(isinstance(value.get(key), kind) for key, kind in kinds.items())

    def plain(name: str) -> bool:
        fine = not any(part in ("", ".", "..") for part in name.split("/")) and "\\" not in name
        return fine and name.isprintable() and len(name) < 1024

    wrong = [
        *(key for key in ("source", "components", "files", "loss") if not isinstance(manifest.get(key), dict)),
        *(f"source: {key}" for key in ("spec",) if not holds(manifest.get("source"), spec=str)),
        *("source: files" for _ in (0,) if not holds(manifest.get("source"), files=dict)),
        *("base" for base in (manifest.get("base"),) if base is not None and not holds(base, files=dict)),
        *(key for key in ("family", "pipeline") if not isinstance(manifest.get(key), str | None)),
        *(key for key in ("licence",) if not isinstance(manifest.get(key), dict)),
    ]
    converted: dict[str, type | tuple[type, ...]] = {
        "config": dict,
        "source_metadata": dict,
        "source_dtypes": (str, dict),
        "prefix": str,
        "weights": list,
    }
    for name, record in manifest["components"].items() if not wrong else ():
        good = plain(name) and "/" not in name and holds(record, action=str, sources=list)
        good = good and (not record.get("base") or manifest.get("base") is not None)
        good = good and all(isinstance(each, str) and each.isprintable() for each in record["sources"])
        good = good and all(isinstance(record.get(key), str | None) for key in ("library", "class", "dtype"))
        if good and record["action"] == "convert":
            recipe = record.get("recipe")
            good = holds(record, **converted) and holds(recipe, name=str, reference=str, digest=str)
            good = good and all(isinstance(weight, str) and plain(weight) for weight in record["weights"])
            good = good and all(isinstance(text, str) for text in record["source_metadata"].values())
        if not good:
            wrong.append(f"components: {name}")
    for name, record in manifest["files"].items() if not wrong else ():
        if not plain(name) or not holds(record, size=int, mtime_ns=int, sha256=str):
            wrong.append(f"files: {name}")
    sources = {**manifest["source"]["files"], **(manifest.get("base") or {"files": {}})["files"]} if not wrong else {}
    wrong += [f"source: files: {name}" for name, record in sources.items() if not holds(record, size=int, sha256=str)]
    if wrong:
        raise BadInputError(f"{file} is damaged", found=f"nothing usable in {wrong[0]}", hint="convert the model again")
