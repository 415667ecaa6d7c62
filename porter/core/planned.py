"""A saved plan as the input of the next step: what it was made from is opened again, and must still be the same."""

from __future__ import annotations

from pathlib import Path

from porter.core.errors import BadInputError, MissingError
from porter.core.files import read_json
from porter.core.plan import SCHEMA, PortPlan
from porter.core.port import MANIFEST, Port, is_manifest
from porter.core.source import Source, open_source
from porter.core.units import several


def is_plan(path: Path) -> bool:
    """Whether a file is a saved plan, or at least was meant to be one."""
    if path.suffix != ".json" or not path.is_file():
        return False
    with path.open("rb") as file:
        return b'"porter.plan/' in file.read(4096)


def read_plan(path: Path) -> PortPlan:
    """A plan that `porter plan -o` saved.

    Raises:
        BadInputError: it is not JSON, of another schema, or damaged.
    """
    hint = f"porter plan MODEL -o {path}"
    document = read_json(path)
    if not isinstance(document, dict):
        raise BadInputError(f"{path} is no plan", expected=SCHEMA, found=type(document).__name__, hint=hint)
    try:
        plan = PortPlan.from_json(document)
    except (TypeError, KeyError, AttributeError) as error:
        raise BadInputError(f"{path} is a damaged plan", found=str(error)[:120], hint=hint) from error
    texts = (plan.source, plan.kind, plan.revision or "", plan.subfolder or "")
    sizes = plan.content if isinstance(plan.content, dict) else {"": None}
    if not all(isinstance(text, str) for text in texts) or not all(isinstance(size, int) for size in sizes.values()):
        raise BadInputError(f"{path} is a damaged plan", expected="names as text and sizes as numbers", hint=hint)
    if plan.source.endswith(".json"):
        raise BadInputError(f"{path} is a plan of a plan", found=plan.source, hint=hint)
    return plan


def open_planned(path: Path, *, token: str | None = None, offline: bool | None = None) -> Source:
    """The source of a saved plan, at its revision; every file must be as large as when it was planned.

    Raises:
        BadInputError: no plan, or the source has changed since.
        MissingError: the source is gone. See `open_source` for the rest.
    """
    plan = read_plan(path)
    pinned = plan.revision if plan.kind == "hub" else None
    source = open_source(plan.source, revision=pinned, subfolder=plan.subfolder, token=token, offline=offline)
    now = {name: info.size for name, info in source.files.items()}
    if now != plan.content:
        odd = sorted(name for name in now.keys() | plan.content.keys() if now.get(name) != plan.content.get(name))
        raise BadInputError(
            f"{plan.source} has changed since {path} was made", expected=f"{odd[0]}: {_size(plan.content.get(odd[0]))}",
            found=f"{_size(now.get(odd[0]))}, {several(len(odd), 'file')} changed",
            hint=f"porter plan {plan.source} -o {path}",
        )  # fmt: skip
    return source


def port_of(path: Path) -> Path:
    """The port that belongs to a saved plan: the planned folder itself, or `<name>-port` here or beside the plan.

    Raises:
        BadInputError: no plan.
        MissingError: no port of this plan is there.
    """
    plan = read_plan(path)
    if plan.kind == "folder" and is_manifest(Path(plan.source) / MANIFEST):
        return Path(plan.source)
    name = plan.source.rstrip("/").replace(":", "/").rpartition("/")[2]
    stem = Path(name).stem if plan.kind == "file" else name
    stem = f"{stem}-{plan.subfolder}".replace("/", "-") if plan.subfolder else stem
    for folder in (Path(f"{stem}-port"), path.parent / f"{stem}-port"):
        if is_manifest(folder / MANIFEST):
            came = Port.open(folder).manifest["source"]
            if (came.get("spec"), came.get("revision")) == (plan.source, plan.revision):
                return folder
    raise MissingError(
        f"no port of {plan.source} is here", expected=f"{stem}-port, made from this plan",
        hint=f"porter convert {path} -o {stem}-port",
    )  # fmt: skip


def _size(size: int | None) -> str:
    return "not there" if size is None else f"{size} bytes"
