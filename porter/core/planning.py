"""`make_plan`: the plan of a source, from names, JSON files and headers alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from porter.core.layout import weightless
from porter.core.memory import estimate
from porter.core.nextsteps import next_commands
from porter.core.plan import ComponentPlan, PortPlan
from porter.core.reasons import explain
from porter.core.similarity import closest
from porter.core.source import Source, open_source
from porter.core.style import style_of
from porter.core.survey import Survey, survey
from porter.core.terms import stated, terms
from porter.core.workload import default_workload


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
    found = survey(source)
    explain(source, found)
    licence, gate = terms(source)
    parts = [_with_terms(source, part, licence, gate) for part in found.components]
    found.components = parts
    if gate:
        found.warnings.append(f"gated repository ({gate}): its terms hold for every port of it")
    known = [part.parameters for part in parts if part.parameters is not None]
    style, reason = style_of(found)
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
        next=tuple(next_commands(source, found)),
        content={name: info.size for name, info in source.files.items()},
        memory=_memory(found, workload or {}, device_memory),
    )
    if target is None:
        return made
    from porter.core.checklist import checklist

    return replace(made, checklist=checklist(made, target).to_json())


def _memory(found: Survey, workload: Mapping[str, Any], device_memory: int | None) -> dict[str, Any] | None:
    """The memory of one call as JSON; None where nothing is known of it and nobody asked."""
    parts = [part for part in found.components if part.layout != "none" and part.class_name]
    sized = [part for part in parts if part.layout != "elsewhere" and (part.bytes or part.parameters)]
    nothing = "no weights here, and no config says how many there are: download them first"
    if found.places:
        sized, nothing = [], "several pipelines do not run at once: name one with --subfolder"
    if not sized and device_memory is None:
        return None
    family = found.family
    home = next(iter((*family.shared_pipelines, *family.pipeline_classes)), None) if family else None
    work, assumed = default_workload(found.pipeline_class, found.components, home, **workload)
    once: dict[str, ComponentPlan] = {}
    for part in sized:
        once.setdefault(part.name, part)
    copies = Counter(part.name for part in sized)
    firsts = tuple(f"the first {name} of {count}" for name, count in sorted(copies.items()) if count > 1)
    absent = [part.name for part in parts if part not in sized and not weightless(part.class_name or "")]
    found_memory = estimate(list(once.values()), work, device_memory, assumed, absent=absent, nothing=nothing)
    return replace(found_memory, assumed=found_memory.assumed + firsts).to_json()


def _with_terms(source: Source, part: ComponentPlan, licence: Mapping[str, Any], gate: str | None) -> ComponentPlan:
    own = next((name for name in source.files if name.startswith(f"{part.name}/LICEN")), None)
    return part.replace(licence=own or stated(licence), gated=gate is not None)
