"""A plan as a record: what a model holds and what each component needs, and its JSON; `planning.py` makes it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from porter.core.errors import BadInputError
from porter.core.family import Style
from porter.core.records import check_keys
from porter.core.risks import Risk

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
    style: Style | None
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
        check_keys([*pairs, *([(Kin, kin)] if kin is not None else [])], "plan", "porter plan -o plan.json")
        lists = ("files", "guesses", "shared")
        built = tuple(ComponentPlan(**{**part, **{key: tuple(part[key]) for key in lists}}) for part in parts)
        closest = Kin(**{**kin, "differences": tuple(kin["differences"])}) if kin is not None else None
        whole = {
            **rest, **{name: tuple(rest[name]) for name in ("warnings", "next")},
            "components": built, "risks": tuple(Risk(**risk) for risk in risks), "closest": closest,
            "extras": tuple(Extra(**extra) for extra in rest["extras"]),
        }  # fmt: skip
        return cls(**whole)
