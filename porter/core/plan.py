"""`make_plan`: what a model holds and what each component needs, from names, JSON files and headers alone."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from porter.core.errors import BadInputError
from porter.core.family import Style
from porter.core.risks import Risk
from porter.core.source import Source, open_source

if TYPE_CHECKING:
    from porter.core.survey import Survey

SCHEMA = "porter.plan/1"
Layout = Literal["original", "diffusers", "none", "elsewhere", "unread", "unknown"]
Status = Literal["native", "reuse", "convert", "port", "missing"]
STATUS_MEANING: Mapping[str, str] = {
    "native": "in the target layout; a native module runs it",
    "reuse": "used as it is, through its library's class",
    "convert": "in the original layout; a recipe converts it",
    "port": "no recipe or class takes it as it is: its note says why",
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
        layout: the layout its weights are in; `none` for what has none, `elsewhere` for another repository,
            `unread` for a format that porter does not read (ONNX, OpenVINO, Flax).
        recipe: `"module:attribute"` of the recipe that converts it.
        config: its whole config.
        model: the released model that its tensor names and shapes show, where they show one.
        prefix: what stands before its tensors' names in a file that holds several components.
        guesses: for tensors that are no known layout, the architectures that come closest, best first.
        shared: tensors that stand for another one as well, as `name = kept name`.
        unusual: config key -> [value, the class's default] where they differ.
        custom_code: the repository's file or module that defines its class; it is never imported.
        quantised: how its weights are packed.
        location: the other repository that a modular index names for it.
        licence: the licence of its own folder, else the source's.
        gated: whether the source asks for terms to be accepted.
    """

    name: str
    library: str | None
    class_name: str | None
    status: Status
    layout: Layout
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
    shared: tuple[str, ...] = ()
    unusual: dict[str, list[Any]] | None = None
    custom_code: str | None = None
    quantised: str | None = None
    location: str | None = None
    licence: str | None = None
    gated: bool = False

    def replace(self, **changes: Any) -> ComponentPlan:
        """The same with other values."""
        return replace(self, **changes)


@dataclass(frozen=True)
class Extra:
    """Tensors of a checkpoint that are no component: averaged copies, buffers of the training code.

    Attributes:
        name: what they are.
        bytes: theirs alone, not the file's.
    """

    name: str
    file: str
    parameters: int
    bytes: int
    note: str


@dataclass(frozen=True)
class Kin:
    """The closest known family.

    Attributes:
        score: structural similarity, 0 to 1 (`porter.core.similarity`).
        reusable: whether it covers 80 % and more: extend it instead of starting anew.
        differences: what matters, one line each.
    """

    family: str
    title: str
    score: float
    reusable: bool
    differences: tuple[str, ...]


@dataclass(frozen=True)
class PortPlan:
    """A whole plan; `to_json` and `from_json` keep all of it.

    Attributes:
        content: size of every file by its path: what the plan was made from, and what a later step checks.
        settings: entries of the index that are no components.
        extras: tensors that are no component, and count in no total.
        licence: what is declared (`license`, `license_name`, `license_link`), and files that hold terms.
        gated: how the source is gated, None where it is not.
        verdict: what parity said of it, where the source is a port: `passed`, `failed`, `stale` or `missing`.
        memory: `porter.core.memory.Memory` as JSON, None where no component with weights is known.
        checklist: `porter.core.checklist.Checklist` as JSON, where a target was named.
    """

    source: str
    kind: str
    revision: str | None
    subfolder: str | None
    pipeline_class: str | None
    family: str | None
    style: Style
    style_reason: str
    components: tuple[ComponentPlan, ...]
    extras: tuple[Extra, ...]
    files: int
    bytes: int
    parameters: int | None
    closest: Kin | None
    licence: dict[str, Any]
    gated: str | None
    verdict: str | None
    settings: dict[str, Any]
    risks: tuple[Risk, ...]
    warnings: tuple[str, ...]
    next: tuple[str, ...]
    content: dict[str, int]
    memory: dict[str, Any] | None = None
    checklist: dict[str, Any] | None = None

    def component(self, name: str) -> ComponentPlan | None:
        """The component called `name`, or None."""
        return next((part for part in self.components if part.name == name), None)

    def to_json(self) -> dict[str, Any]:
        """The plan as a JSON document; its schema is docs/plan.schema.json."""
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
        parts, risks, kin = rest.get("components", ()), rest.get("risks", ()), rest.get("closest")
        pairs: list[tuple[type, Any]] = [(PortPlan, rest), *((ComponentPlan, part) for part in parts)]
        pairs += [(Risk, risk) for risk in risks] + [(Extra, extra) for extra in rest.get("extras", ())]
        for kind, given in [*pairs, *([(Kin, kin)] if kin is not None else [])]:
            wanted = {field.name for field in fields(kind)}
            if not isinstance(given, dict) or set(given) != wanted:
                odd = ", ".join(sorted(wanted ^ set(given))) if isinstance(given, dict) else repr(given)[:60]
                raise BadInputError("a plan with missing or unknown keys", found=odd, hint="porter plan -o plan.json")
        lists = ("files", "guesses", "shared")
        built = tuple(ComponentPlan(**{**part, **{key: tuple(part[key]) for key in lists}}) for part in parts)
        closest = Kin(**{**kin, "differences": tuple(kin["differences"])}) if kin is not None else None
        whole = {
            **rest, **{name: tuple(rest[name]) for name in ("warnings", "next")},
            "components": built, "risks": tuple(Risk(**risk) for risk in risks), "closest": closest,
            "extras": tuple(Extra(**extra) for extra in rest["extras"]),
        }  # fmt: skip
        return cls(**whole)


def plan(
    model: str | Path,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | None = None,
    offline: bool | None = None,
) -> PortPlan:
    """The plan of `model`: a hub id, a folder, a file or `builtin:<name>`. See `make_plan` and `open_source`."""
    return make_plan(open_source(model, revision=revision, subfolder=subfolder, token=token, offline=offline))


def make_plan(
    source: Source,
    *,
    workload: Mapping[str, Any] | None = None,
    device_memory: int | None = None,
    target: str | None = None,
) -> PortPlan:
    """The plan of an opened source. Reads JSON files and headers, never weights.

    Args:
        workload: fields of `porter.core.workload.Workload` that the memory estimate is for; others by default.
        device_memory: bytes of the device that it shall fit.
        target: framework whose checklist is filled in (`porter.core.checklist.TARGETS`).

    Raises:
        BadInputError: not a pipeline, or a file that breaks its format.
        UsageError: an unknown target.
    """
    from porter.core.memory import estimate
    from porter.core.similarity import closest
    from porter.core.style import style_of
    from porter.core.survey import survey
    from porter.core.terms import terms
    from porter.core.workload import default_workload

    found = survey(source)
    licence, gate = terms(source)
    parts = [_with_terms(source, part, licence, gate) for part in found.components]
    found.components = parts
    if gate:
        found.warnings.append(f"gated repository ({gate}): its terms hold for every port of it")
    known = [part.parameters for part in parts if part.parameters is not None]
    style, reason = style_of(found)
    sized = [p for p in parts if p.layout not in ("none", "elsewhere") and p.class_name and (p.bytes or p.parameters)]
    work, assumed = default_workload(found.pipeline_class, parts, **(workload or {}))
    once = list({part.name: part for part in reversed(sized)}.values())[::-1]
    twice = sorted({part.name for part in sized if not any(part is kept for kept in once)})
    assumed += tuple(f"the first {name} of {sum(part.name == name for part in sized)}" for name in twice)
    single = sized and not found.places  # several pipelines do not run at once
    memory = estimate(once, work, device_memory, assumed).to_json() if single else None
    made = PortPlan(
        source=source.spec,
        kind=source.kind,
        revision=source.revision,
        subfolder=source.subfolder,
        pipeline_class=found.pipeline_class,
        family=found.family.name if found.family else None,
        style=style,
        style_reason=reason,
        components=tuple(parts),
        extras=tuple(found.extras),
        files=len(source.files),
        bytes=sum(part.bytes for part in parts),
        parameters=sum(known) if known else None,
        closest=closest(found),
        licence=licence,
        gated=gate,
        verdict=found.verdict,
        settings=found.settings,
        risks=tuple(found.risks()),
        warnings=tuple(found.warnings),
        next=tuple(_next_commands(source, found)),
        content={name: info.size for name, info in source.files.items()},
        memory=memory,
    )
    if target is None:
        return made
    from porter.core.checklist import checklist

    return replace(made, checklist=checklist(made, target).to_json())


def _with_terms(source: Source, part: ComponentPlan, licence: Mapping[str, Any], gate: str | None) -> ComponentPlan:
    own = next((name for name in source.files if name.startswith(f"{part.name}/LICEN")), None)
    stated = licence.get("license_name") or licence.get("license")
    return part.replace(licence=own or (str(stated) if stated else None), gated=gate is not None)


def _next_commands(source: Source, found: Survey) -> list[str]:
    """Commands to paste, the most useful first."""
    parts = found.components
    model, port = shlex.quote(source.given), shlex.quote(f"{source.name}-port")
    pin = f" --revision {source.revision}" if source.kind == "hub" and source.revision else ""
    pin += f" --subfolder {shlex.quote(source.subfolder)}" if source.subfolder else ""
    family = found.family
    runs = family is not None and family.pipeline is not None and found.pipeline_class in family.pipeline_classes[:1]
    generate = f'porter generate {model} "a prompt"'
    if found.verdict:
        run = [generate] if runs else []
        return [f"porter parity {model}", *run]
    if found.places:
        return [f"porter plan {model}{pin} --subfolder {shlex.quote(place)}" for place in found.places[:4]]
    if any(source.files[name].lfs_pointer for part in parts for name in part.files):
        return [f"git -C {shlex.quote(source.spec)} lfs pull", f"porter plan {model}"]
    if any(part.status == "convert" for part in parts):
        bare = [part for part in parts if part.status == "convert" and not part.config]
        config = " --config CONFIG.json" if bare else ""
        only = f" --component {shlex.quote(bare[0].name)}" if bare and len(parts) > 1 else ""
        return [f"porter convert {model}{pin}{only}{config} -o {port}"]
    if location := next((part.location for part in parts if part.location), None):
        return [f"porter plan {shlex.quote('/'.join(location.partition('@')[0].split('/')[:2]))}"]
    if any(part.status in ("port", "missing") for part in parts) or source.kind == "file":
        return [f"porter plan {model}{pin} --target porter"]
    if source.kind == "hub":
        return [
            f"hf download {model}{pin} --local-dir {shlex.quote(source.name)}",
            f"porter plan {shlex.quote(source.name)}",
        ]
    return [generate] if runs else [f"porter plan {model}{pin} --target porter"]
