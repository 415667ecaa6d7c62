"""`make_plan`: the plan of a source, from names, JSON files and headers alone."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from porter.core.memory import estimate
from porter.core.plan import ComponentPlan, PortPlan
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
    licence, gate = terms(source)
    parts = [_with_terms(source, part, licence, gate) for part in found.components]
    found.components = parts
    if gate:
        found.warnings.append(f"gated repository ({gate}): its terms hold for every port of it")
    known = [part.parameters for part in parts if part.parameters is not None]
    style, reason = style_of(found)
    sized = [p for p in parts if p.layout not in ("none", "elsewhere") and p.class_name and (p.bytes or p.parameters)]
    home = next(iter((*found.family.shared_pipelines, *found.family.pipeline_classes)), None) if found.family else None
    work, assumed = default_workload(found.pipeline_class, parts, home, **(workload or {}))
    once: dict[str, ComponentPlan] = {}
    for part in sized:
        once.setdefault(part.name, part)
    copies = Counter(part.name for part in sized)
    assumed += tuple(f"the first {name} of {count}" for name, count in sorted(copies.items()) if count > 1)
    single = sized and not found.places  # several pipelines do not run at once
    memory = estimate(list(once.values()), work, device_memory, assumed).to_json() if single else None
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
    return part.replace(licence=own or stated(licence), gated=gate is not None)


def _next_commands(source: Source, found: Survey) -> list[str]:
    """Commands to paste, the most useful first."""
    parts = found.components
    model, port = shlex.quote(source.given), shlex.quote(f"{source.name}-port")
    at = f" --revision {source.revision}" if source.kind == "hub" and source.revision else ""
    inner = f" --subfolder {shlex.quote(source.subfolder)}" if source.subfolder else ""
    include = f" --include {shlex.quote(source.subfolder + '/*')}" if source.subfolder else ""
    pin = at + inner
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
    places = [part.location.partition("@")[0] for part in parts if part.location]
    if location := next((place for place in places if re.fullmatch(r"[\w.-]+/[\w./-]+", place)), None):
        return [f"porter plan {shlex.quote('/'.join(location.split('/')[:2]))}"]
    if any(part.status in ("port", "missing") for part in parts) or source.kind == "file":
        return [f"porter plan {model}{pin} --target porter"]
    if source.kind == "hub":
        return [
            f"hf download {model}{at}{include} --local-dir {shlex.quote(source.name)}",
            f"porter plan {shlex.quote(source.name)}{inner}",
        ]
    return [generate] if runs else [f"porter plan {model}{pin} --target porter"]
