"""`make_plan`: what a model holds and what each component needs, from names, JSON files and headers alone."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from porter.core.errors import BadInputError
from porter.core.family import Style
from porter.core.risks import Risk
from porter.core.source import Source, open_source

SCHEMA = "porter.plan/1"
Status = Literal["native", "reuse", "convert", "port", "missing"]
STATUS_MEANING: Mapping[str, str] = {
    "native": "in the target layout; runs on the native runtime",
    "reuse": "used as it is, through its library's class",
    "convert": "in the original layout; a recipe converts it",
    "port": "nothing known: a recipe or a class has to be written",
    "missing": "named by the pipeline, but no weights are here",
}


@dataclass(frozen=True)
class ComponentPlan:
    """One component.

    Attributes:
        files: its weight files (or all its files, where it has no weights), as paths inside the source.
        bytes: their size together; the real size where only Git-LFS pointers are here.
        parameters: elements of all its tensors, None where no header could be read.
        dtypes: bytes per safetensors dtype code.
        layout: the layout its weights are in.
        recipe: `"module:attribute"` of the recipe that converts it.
        config: the entries of its config that say most.
        model: the released model that its tensor names and shapes show, where they show one.
        prefix: what stands before its tensors' names in a file that holds several components.
        guesses: for tensors that are no known layout, the architectures that come closest, best first.
    """

    name: str
    library: str | None
    class_name: str | None
    status: Status
    layout: Literal["original", "diffusers", "none", "unknown"]
    files: tuple[str, ...]
    bytes: int
    parameters: int | None
    dtypes: dict[str, int]
    recipe: str | None
    config: dict[str, Any]
    note: str = ""
    model: str | None = None
    prefix: str = ""
    guesses: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class PortPlan:
    """A whole plan; `to_json` and `from_json` keep all of it."""

    source: str
    kind: str
    revision: str | None
    pipeline_class: str | None
    family: str | None
    style: Style
    style_reason: str
    components: tuple[ComponentPlan, ...]
    files: int
    bytes: int
    parameters: int | None
    risks: tuple[Risk, ...]
    warnings: tuple[str, ...]
    next: tuple[str, ...]

    def component(self, name: str) -> ComponentPlan | None:
        """The component called `name`, or None."""
        return next((part for part in self.components if part.name == name), None)

    def to_json(self) -> dict[str, Any]:
        """The plan as a JSON document."""
        return {"schema": SCHEMA, **json.loads(json.dumps(asdict(self)))}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> PortPlan:
        """The inverse of `to_json`.

        Raises:
            BadInputError: another schema, a missing or an unknown key.
        """
        if document.get("schema") != SCHEMA:
            raise BadInputError("not a plan", expected=SCHEMA, found=str(document.get("schema")), hint="porter plan")
        rest = {key: value for key, value in document.items() if key != "schema"}
        parts = rest.get("components", ())
        risks = rest.get("risks", ())
        own, inner, risky = ({field.name for field in fields(kind)} for kind in (PortPlan, ComponentPlan, Risk))
        pairs = [(own, rest), *((inner, part) for part in parts), *((risky, risk) for risk in risks)]
        for wanted, given in pairs:
            if set(given) != wanted:
                odd = ", ".join(sorted(wanted ^ set(given)))
                raise BadInputError("a plan with missing or unknown keys", found=odd, hint="porter plan -o plan.json")
        built = tuple(
            ComponentPlan(**{**part, "files": tuple(part["files"]), "guesses": tuple(part["guesses"])})
            for part in parts
        )
        lists = {name: tuple(rest[name]) for name in ("warnings", "next")}
        return cls(**{**rest, **lists, "components": built, "risks": tuple(Risk(**risk) for risk in risks)})


def plan(
    model: str | Path, *, revision: str | None = None, token: str | None = None, offline: bool | None = None
) -> PortPlan:
    """The plan of `model`: a hub id, a folder, a file or `builtin:<name>`. See `make_plan` and `open_source`."""
    return make_plan(open_source(model, revision=revision, token=token, offline=offline))


def make_plan(source: Source) -> PortPlan:
    """The plan of an opened source. Reads JSON files and headers, never weights.

    Raises:
        BadInputError: not a pipeline, or a file that breaks its format.
    """
    from porter.core.survey import survey

    found = survey(source)
    parts = found.components
    known = [part.parameters for part in parts if part.parameters is not None]
    return PortPlan(
        source=source.spec,
        kind=source.kind,
        revision=source.revision,
        pipeline_class=found.pipeline_class,
        family=found.family.name if found.family else None,
        style=found.style,
        style_reason=found.style_reason,
        components=tuple(parts),
        files=len(source.files),
        bytes=sum(part.bytes for part in parts),
        parameters=sum(known) if known else None,
        risks=tuple(found.risks()),
        warnings=tuple(found.warnings),
        next=tuple(_next_commands(source, parts, found.is_port)),
    )


def _next_commands(source: Source, parts: list[ComponentPlan], is_port: bool) -> list[str]:
    """Commands to paste, the most useful first."""
    model, port = shlex.quote(source.given), shlex.quote(f"{source.name}-port")
    pin = f" --revision {source.revision}" if source.kind == "hub" and source.revision else ""
    if is_port:
        return [f"porter parity {model}", f'porter generate {model} "a prompt"']
    if any(source.files[name].lfs_pointer for part in parts for name in part.files):
        return [f"git -C {shlex.quote(source.spec)} lfs pull", f"porter plan {model}"]
    if any(part.status == "convert" for part in parts):
        bare = [part for part in parts if part.status == "convert" and not part.config]
        config = " --config CONFIG.json" if bare else ""
        only = f" --component {parts[0].name}" if bare and len(parts) > 1 else ""
        return [f"porter convert {model}{pin}{only}{config} -o {port}"]
    if any(part.status in ("port", "missing") for part in parts) or source.kind == "file":
        return ["porter families"]
    if source.kind == "hub":
        return [
            f"hf download {model}{pin} --local-dir {shlex.quote(source.name)}",
            f"porter plan {shlex.quote(source.name)}",
        ]
    return [f'porter generate {model} "a prompt"']
