"""Preparing original → diffusers: which components go through which recipe, and which files are copied."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from porter.core.checkpoint import TensorInfo
from porter.core.complete import check_base, completed
from porter.core.errors import BadInputError, CheckpointError, MissingError, RecipeError, UsageError
from porter.core.family import Family, families, resolve
from porter.core.identity import check_whole, for_header
from porter.core.inputs import check_shards, component_tensors, has_averaged, left_over
from porter.core.jobs import WEIGHTS_NAMES, Copy, Job, Preparation, Settings
from porter.core.originals import as_role, takes
from porter.core.pieces import SAME_NAMES
from porter.core.plan import ComponentPlan, PortPlan
from porter.core.port import MANIFEST
from porter.core.recipe import Recipe, compile_recipe
from porter.core.sharding import index_of, shards
from porter.core.source import Source
from porter.core.userrecipe import users_own
from porter.core.weights import WEIGHT_SUFFIXES

CARRIED = re.compile(r"(README|LICEN[SC]E|NOTICE|COPYING|USE_POLICY|MODEL_CARD)[^/]*", re.IGNORECASE)


def forward(source: Source, plan: PortPlan, settings: Settings) -> Preparation:
    """Original → diffusers.

    Raises:
        UsageError: an unknown component, nothing to convert, a config or recipe for no or several components.
        BadInputError: the input cannot be converted; the message names the tensor or key.
        MissingError: weights that are not here.
    """
    if settings.base is not None:
        check_base(source, plan.pipeline_class, settings.base)
    plan = _with_own(_in_role(plan, settings.component), settings.recipes)
    parts = _selected(source, plan, settings.component)
    if unknown := set(settings.recipes) - {part.name for part in parts}:
        raise UsageError(
            f"a recipe for {', '.join(sorted(unknown))}, which is not converted here",
            expected=", ".join(part.name for part in parts),
        )
    if settings.config is not None and len(parts) > 1:
        raise UsageError(
            "--config holds one component's config, and several are converted",
            found=", ".join(part.name for part in parts),
            hint=f"porter convert {source.given} --component {parts[0].name} --config FILE -o OUT",
        )
    family = families().get(plan.family) if plan.family else None
    averaged = [part.name for part in parts] if settings.averaged else []
    if len(averaged) > 1:  # a file of several components averages the one that was trained
        averaged = [part.name for part in parts if has_averaged(source, part)] or averaged
    jobs = tuple(_forward_job(source, plan, part, settings, averaged=part.name in averaged) for part in parts)
    whole = plan.pipeline_class is not None and settings.component is None
    written = {name for job in jobs for name in (*(s.file for s in job.shards), *job.texts, *job.last)}
    copies, left = _carried(source, plan, jobs) if whole else ([], {})
    if not whole:
        used = {name for job in jobs for name in job.files}
        why = "not part of the chosen component" if settings.component else "holds nothing that a recipe converts"
        left = {name: why for name in source.files if name not in used and name != MANIFEST}
        copies = [Copy.of(source, name) for name in source.files if CARRIED.fullmatch(name)]
        left = {name: why for name, why in left.items() if name not in {copy.name for copy in copies}}
    copies = [copy for copy in copies if copy.name not in written]
    for part in plan.components if whole else ():
        if part.status in ("native", "reuse"):
            check_shards(source, part.files, part.name)
    others = {
        part.name: {"library": part.library, "class": part.class_name, "action": "copy", "sources": list(part.files),
                    "recipe": None}
        for part in plan.components if whole and part.status in ("native", "reuse")
    }  # fmt: skip
    taken = {info.name for job in jobs for info in job.plan.sources.values()}
    ready = Preparation(
        source,
        "diffusers",
        plan.family,
        plan.pipeline_class if whole else None,
        jobs,
        tuple(copies),
        others,
        tuple(sorted(left.items())),
        licence_of(source, family, copies),
        left_over(source, parts, taken),
    )
    return completed(ready, settings.base) if settings.base else ready


def _in_role(plan: PortPlan, component: str | None) -> PortPlan:
    """The plan with one part called `component`, where its tensors fit that role too and only the user knows."""
    if component is None or any(part.name == component for part in plan.components):
        return plan
    homes = [family for family in families().values() if plan.family in (None, family.name)]
    for family, role in ((family, family.component(component)) for family in homes):
        fit = [part for part in plan.components if role and part.recipe and takes(role, part)]
        if role and len(fit) == 1:
            parts = tuple(as_role(part, role) if part is fit[0] else part for part in plan.components)
            return replace(plan, components=parts, family=family.name)
    return plan


def _with_own(plan: PortPlan, recipes: Mapping[str, Recipe]) -> PortPlan:
    """The plan with the components that only the user's recipes take: of a layout that the catalogue does not know.

    Raises:
        RecipeError: neither the recipe nor the model says which class it writes for.
    """
    parts = list(plan.components)
    for name, recipe in recipes.items():
        named = [part for part in parts if part.name == name]
        if any(part.status == "convert" for part in named):
            continue
        fit = named or [part for part in parts if part.status == "port" and part.files]
        if len(fit) != 1:
            continue  # `_selected` says what is there
        library, _, class_name = recipe.target_class.rpartition(".")
        library, class_name = library or fit[0].library or "", class_name or fit[0].class_name or ""
        if library not in WEIGHTS_NAMES or not class_name:
            raise RecipeError(
                f"{recipe.name} does not say which class it writes for", expected="target_class='diffusers.<Class>'",
                found=recipe.target_class or "nothing", hint="add target_class to the Recipe",
            )  # fmt: skip
        own = fit[0].replace(name=name, library=library, class_name=class_name, status="convert", recipe=SAME_NAMES)
        parts[parts.index(fit[0])] = own
    return replace(plan, components=tuple(parts))


def _selected(source: Source, plan: PortPlan, component: str | None) -> list[ComponentPlan]:
    """The components to convert, after refusing what cannot be done."""
    names = [part.name for part in plan.components]
    if component is not None and component not in names:
        raise UsageError(
            f"unknown component {component!r}", expected=" | ".join(names), hint=f"porter plan {source.given}"
        )
    chosen = [part for part in plan.components if component in (None, part.name)]
    for part in chosen:
        if part.status == "missing":
            raise MissingError(
                f"{part.name}: no weights of {part.class_name} in {source.given}", hint=f"porter plan {source.given}"
            )
        if part.status == "port" and (component or plan.pipeline_class):
            raise BadInputError(
                f"{part.name}: porter knows no recipe for {part.class_name or 'these tensors'}",
                expected="a class or a layout of the catalogue",
                hint="porter families; CONTRIBUTING.md says how a family is added",
            )
    found = [part for part in chosen if part.status == "convert"]
    for name in dict.fromkeys(part.name for part in found):
        files = [file for part in found if part.name == name for file in part.files]
        if sum(part.name == name for part in found) > 1:
            raise UsageError(
                f"{source.given} holds {name} more than once", expected="one of them", found=", ".join(files),
                hint=f"name one of these files alone: porter convert <path of {files[0]}> -o PORT",
            )  # fmt: skip
    if known := [part for part in chosen if part.status == "port" and part.layout == "original"] if not found else []:
        raise BadInputError(
            f"{known[0].name}: no recipe of the catalogue takes it", expected="a layout of `porter recipe show`",
            found=known[0].note or None, hint="write a recipe (docs/recipes.md) and give it with --recipe FILE.py",
        )  # fmt: skip
    if not found and any(part.status == "port" for part in chosen):
        raise BadInputError(
            f"{source.given} is in no layout that porter knows", found="; ".join(plan.warnings[:3]) or None,
            hint="porter families; docs/recipes.md says how a recipe of your own is written",
        )  # fmt: skip
    if not found:
        where = f"{component} is" if component else f"{source.given} is"
        raise UsageError(f"nothing to convert: {where} in the diffusers layout already", hint=plan.next[0])
    return found


def _forward_job(source: Source, plan: PortPlan, part: ComponentPlan, settings: Settings, *, averaged: bool) -> Job:
    assert part.library and part.class_name and part.recipe
    header, metadata = component_tensors(source, part, plan.components, averaged=averaged)
    own = settings.recipes.get(part.name)
    if own is None and part.recipe == SAME_NAMES:
        check_whole(part.name, header)
    used = own or recipe_for(part.recipe, header, "original", "diffusers")
    config_name = f"{part.name}/config.json"
    given = _known_config(source, config_name, part, settings)
    try:
        with users_own(used) if own else nullcontext():
            full = dict(used.infer_config(header, given))
            assumed = full.pop("_assumed", {})
            compiled = compile_recipe(used, full, header, dtype=settings.dtype)
    except (RecipeError, CheckpointError) as error:
        command = f"porter convert {source.given} --component {part.name}"
        several = sum(each.status == "convert" for each in plan.components) > 1
        if several and error.hint and "--config FILE, with" in error.hint:  # which holds one component's alone
            error.hint = _configs(source, part)
        error.hint = (error.hint or "porter convert … --config FILE -o PORT").replace("porter convert …", command)
        raise
    if not given and not full and not settings.config:
        raise RecipeError(
            f"{part.name}: its tensors alone do not say the config of {part.class_name}", expected="a config.json",
            found="none beside the weights", hint=_configs(source, part),
        )  # fmt: skip
    notes = {key: value for key, value in given.items() if key.startswith("_") and key != "_class_name"}
    plain = {key: value for key, value in full.items() if not key.startswith("_")}
    said = {"_class_name": part.class_name} if part.library == "diffusers" else {"architectures": [part.class_name]}
    text = {**said, **notes, **plain}
    same = json.dumps(text, sort_keys=True) == json.dumps(given, sort_keys=True)  # unlike ==, tells 2 from 2.0
    kept = settings.config is None and config_name in source.files and same
    content = source.path(config_name).read_bytes() if kept else (json.dumps(text, indent=2) + "\n").encode()
    target = f"{part.name}/{WEIGHTS_NAMES[part.library]}"
    files = shards(compiled, target, settings.shard_size)
    return Job(
        component=part.name,
        library=part.library,
        class_name=part.class_name,
        recipe=used,
        reference=settings.reference if own else part.recipe,
        plan=compiled,
        config=full,
        sources=tuple((source, name) for name in part.files),
        shards=files,
        metadata={"format": "pt"},
        texts={config_name: content},
        last=index_of(files, target),
        source_metadata=metadata,
        source_dtypes=_dtypes(header),
        dtype=settings.dtype,
        prefix=part.prefix,
        assumed=assumed,
        averaged=averaged,
    )


def _configs(source: Source, part: ComponentPlan) -> str:
    """The next command where one of several components lacks its config: `--config` holds one component's alone."""
    start = f"porter convert {shlex.quote(source.given)}"
    return f"{start} --base PIPELINE -o PORT, or {start} --component {part.name} --config FILE -o PORT"


def recipe_for(reference: str, header: Mapping[str, TensorInfo], source_layout: str, target_layout: str) -> Recipe:
    """The catalogue's recipe; the one that keeps all names is made for the tensors at hand."""
    if reference == SAME_NAMES:
        return for_header(header, source_layout, target_layout)
    found: Recipe = resolve(reference)
    return found


def _known_config(source: Source, name: str, part: ComponentPlan, settings: Settings) -> dict[str, Any]:
    """What is said of the config: by the user, else in the component's folder or beside its weights, else by the base.

    An original repository has its config.json beside the weights, in a folder of any name.
    """
    if settings.config is not None:
        return dict(settings.config)
    if name not in source.files and part.config:
        return dict(part.config)
    for place in (source, settings.base):
        if place is not None and name in place.files:
            found = place.json(name)
            return found if isinstance(found, dict) else {}
    return {}


def _dtypes(header: Mapping[str, TensorInfo]) -> Any:
    """One dtype code where all tensors share it, else the code of each tensor."""
    codes = {info.dtype for info in header.values()}
    return codes.pop() if len(codes) == 1 else {name: info.dtype for name, info in header.items()}


def _carried(source: Source, plan: PortPlan, jobs: tuple[Job, ...]) -> tuple[list[Copy], dict[str, str]]:
    """Files of a whole pipeline that go over unchanged, and the others with the reason why they do not."""
    folders = {part.name: part for part in plan.components}
    weights = {name for part in plan.components for name in part.files}
    converted = {name for job in jobs for name in job.files}
    copies: list[Copy] = []
    left: dict[str, str] = {}
    for name in source.files:
        folder, inside, _ = name.partition("/")
        if name in converted or name == MANIFEST:
            continue
        if not inside:
            if name == "model_index.json" or CARRIED.fullmatch(name):
                copies.append(Copy.of(source, name))
            else:
                left[name] = "no component uses it"
        elif folder not in folders:
            left[name] = f"{folder}/ is no component"
        elif name.endswith(".py"):
            left[name] = "code of the repository is not carried over"
        elif name.endswith(WEIGHT_SUFFIXES) and name not in weights:
            left[name] = "another variant or format of the same weights"
        elif name.endswith(".index.json") and any(name.startswith(job.component + "/") for job in jobs):
            left[name] = "index of weights that are written anew"
        else:
            copies.append(Copy.of(source, name))
    return copies, left


def licence_of(source: Source, family: Family | None, copies: list[Copy]) -> dict[str, Any]:
    """What is known about the terms: what the hub or the model card declares, the files carried over, our hint."""
    files = [copy.name for copy in copies if CARRIED.fullmatch(copy.name)]
    return {"declared": source.declared_licence, "files": files, "hint": family.license_hint if family else ""}
