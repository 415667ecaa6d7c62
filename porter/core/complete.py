"""`--base`: components converted from loose files become a working pipeline, with all else from another one."""

from __future__ import annotations

from dataclasses import replace

from porter.core.errors import BadInputError, UsageError
from porter.core.inputs import check_shards
from porter.core.jobs import Copy, Job, Preparation
from porter.core.pipelines import pipeline
from porter.core.plan import ComponentPlan
from porter.core.port import MANIFEST
from porter.core.source import Source
from porter.core.survey import INDEX
from porter.core.weights import WEIGHT_SUFFIXES

_TERMS = ("LICEN", "NOTICE", "COPYING", "USE_POLICY")  # how files begin that say what a model may be used for


def completed(ready: Preparation, base: Source) -> Preparation:
    """`ready` with model_index.json and every other component of the pipeline `base`.

    Raises:
        BadInputError: a converted component is not one that the base's pipeline takes, or the base is incomplete.
    """
    found = pipeline(base)
    parts = {part.name: part for part in found.components}
    for job in ready.jobs:
        _fits(job, parts.get(job.component), base)
    mine = {job.component for job in ready.jobs}
    copies = list(ready.copies)
    left = dict(ready.not_carried)
    here = {copy.name for copy in copies}
    for name in base.files:
        folder, inside, _ = name.partition("/")
        if (inside and folder in parts and folder not in mine) or name == INDEX:
            spare = name.endswith((*WEIGHT_SUFFIXES, ".py")) and name not in parts[folder].files if inside else False
            if spare:
                left[f"{base.name}: {name}"] = "another variant or format of the base's weights, or its code"
            else:
                copies.append(Copy.of(base, name))
        elif not inside and name not in here and name.upper().startswith(_TERMS):
            copies.append(Copy.of(base, name))
        elif not inside and name != MANIFEST:
            why = "the source has its own" if name in here else "about the base, not this pipeline"
            left[f"{base.name}: {name}"] = why
    for part in found.components:
        if part.name not in mine:
            check_shards(base, part.files, part.name)
    missing = [part.name for part in found.components if part.status == "missing" and part.name not in mine]
    if missing:
        raise BadInputError(
            f"the base {base.given} is incomplete", expected="a whole pipeline", found=f"no {', '.join(missing)}",
            hint=f"porter plan {base.given}",
        )  # fmt: skip
    others = {
        part.name: {"library": part.library, "class": part.class_name, "action": "copy", "sources": list(part.files),
                    "recipe": None, "base": base.spec}
        for part in found.components if part.name not in mine and part.status in ("native", "reuse")
    }  # fmt: skip
    terms = [copy.name for copy in copies if copy.source is base and copy.name.upper().startswith(_TERMS)]
    licence = {**ready.licence, "files": [*ready.licence["files"], *terms], "base": base.declared_licence}
    family = ready.family or (found.family.name if found.family else None)
    return replace(
        ready, pipeline_class=found.pipeline_class, copies=tuple(copies), copied_components=others, base=base,
        not_carried=tuple(sorted(left.items())), family=family, licence=licence,
    )  # fmt: skip


def check_base(source: Source, pipeline_class: str | None, base: Source) -> None:
    """Refuse a base that cannot complete a source, before anything is made of either.

    Raises:
        UsageError: the base is no pipeline, or the source is a whole one itself.
    """
    if pipeline_class is not None:
        raise UsageError(
            f"{source.given} is a whole pipeline: it needs nothing of {base.given}", hint="leave out --base"
        )
    if INDEX not in base.files:
        raise UsageError(
            f"{base.given} is no base: it has no {INDEX}", expected="a pipeline in the diffusers layout",
            hint="porter plan " + base.given,
        )  # fmt: skip


def _fits(job: Job, part: ComponentPlan | None, base: Source) -> None:
    """Whether the base's pipeline takes what was converted, under this name and of this class."""
    if part is None or part.class_name != job.class_name:
        raise BadInputError(
            f"the base {base.given} takes no {job.component} of {job.class_name}",
            expected=f"{part.class_name}" if part else "a component of this name",
            found=f"{job.component}: {job.class_name}", hint="name a pipeline of the same family with --base",
        )  # fmt: skip
