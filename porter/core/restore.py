"""Preparing diffusers → original, or the files that ComfyUI loads: the same recipes, inverted.

A port knows what it was: its manifest names recipes, dtypes and files. A pipeline that somebody else wrote has only its
configs and tensors; then the catalogue's recipe says what the original layout is, and its usual file names are taken.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from porter.core.checkpoint import TensorInfo, dtype_code, specs
from porter.core.described import full_config
from porter.core.errors import BadInputError, RecipeError, UsageError
from porter.core.family import Component, families
from porter.core.identity import for_header
from porter.core.inputs import check_shards, file_tensors
from porter.core.jobs import Copy, Job, Preparation, Settings, not_the_base, unknown_component
from porter.core.patterns import Pattern
from porter.core.pieces import CONVERTED, SAME_NAMES
from porter.core.plan import ComponentPlan, PortPlan
from porter.core.port import MANIFEST, Port
from porter.core.prepare import CARRIED, licence_of, recipe_for
from porter.core.recipe import Recipe, compile_recipe, guarded
from porter.core.sharding import index_of, shards
from porter.core.source import LocalSource, Source
from porter.core.tensorplan import BASE, TensorPlan

Layout = Literal["original", "comfyui"]
# Where ComfyUI looks for a component's file, by the beginning of the component's name.
_COMFY_FOLDERS = {
    "transformer": "diffusion_models", "unet": "diffusion_models", "vae": "vae", "text_encoder": "text_encoders",
    "image_encoder": "clip_vision",
}  # fmt: skip


def inverse(source: Source, plan: PortPlan | None, settings: Settings, layout: Layout) -> Preparation:
    """A model in the diffusers layout back into the original one, or into ComfyUI's files.

    Args:
        plan: of a source that is no port; None for a port.

    Raises:
        UsageError: an unknown component, nothing to convert, a dtype asked for, a recipe that must be given again.
        BadInputError: the port changed since it was written; a component that no recipe takes.
        RecipeError: the conversion lost something that only the original has, and no base is given.
    """
    if plan is None:
        assert isinstance(source, LocalSource)
        port = _opened(source)
        jobs = _of_port(source, port, settings, layout)
        family, pipeline, licence = port.manifest.get("family"), port.manifest.get("pipeline"), port.manifest["licence"]
        names = list(port.manifest["files"])
        base_digests = _base_digests(settings.base, port, jobs)
    else:
        jobs = _of_pipeline(source, plan, settings, layout)
        known = families().get(plan.family) if plan.family else None
        family, pipeline, licence = plan.family, plan.pipeline_class, licence_of(source, known, [])
        names, base_digests = list(source.files), {}
    used = {name for job in jobs for name in job.files}
    only = settings.component
    mine = {job.component for job in jobs}
    configs = {f"{name}/config.json" for name in mine}
    left: dict[str, str] = {}
    copies: list[Copy] = []
    for name in names:
        if name in used:
            left[name] = "holds the weights that were converted"
        elif name.endswith(".index.json") and name.partition("/")[0] in mine:
            left[name] = "index of weights that are written anew"
        elif plan is None and layout == "original":
            if only is None or name == f"{only}/config.json":
                copies.append(Copy.of(source, name))
        elif CARRIED.fullmatch(name) or (layout == "original" and name in configs):
            copies.append(Copy.of(source, name))
        else:
            left[name] = "not part of the original files" if layout == "original" else "ComfyUI has its own"
    restored = {shard.file for job in jobs for shard in job.shards}
    if len(restored) < sum(len(job.shards) for job in jobs) or restored & {copy.name for copy in copies}:
        raise BadInputError(f"{source.given}: two files would be called alike", found=", ".join(sorted(restored)))
    return Preparation(
        source, layout, family, pipeline, jobs, tuple(copies), {}, tuple(sorted(left.items())), dict(licence),
        base=settings.base, base_digests=base_digests,
    )  # fmt: skip


def _opened(source: LocalSource) -> Port:
    port = Port.open(source.root)
    if absent := [name for name in port.manifest["files"] if name not in source.files]:
        raise BadInputError(f"{source.given} lacks {absent[0]}", hint="convert the original again")
    if changed := port.stale(full=False):
        raise BadInputError(
            f"{source.given} changed since it was written: {', '.join(changed[:3])}", hint="convert the original again"
        )
    return port


def _of_port(source: LocalSource, port: Port, settings: Settings, layout: Layout) -> tuple[Job, ...]:
    if settings.dtype is not None and layout == "original":
        raise UsageError("--to original of a port restores the original dtypes", hint="leave out --dtype")
    jobs: dict[str, Callable[[], Job]] = {}
    for name, record in port.manifest["components"].items():
        if record["action"] == "convert":
            jobs[name] = partial(_port_job, source, port, name, record, settings, layout)
        elif layout == "comfyui" and name.startswith(tuple(_COMFY_FOLDERS)):  # as it is, under ComfyUI's name
            files = [file for file in port.manifest["files"] if file.startswith(f"{name}/")]
            if stored := tuple(file for file in files if file.endswith(".safetensors")):
                jobs[name] = partial(
                    _kept_job, source, name, record["library"] or "", record["class"] or "", stored, settings
                )
    chosen = [job for name, job in jobs.items() if settings.component in (None, name)]
    if not chosen:
        raise unknown_component(source, settings.component, list(jobs))
    return tuple(job() for job in chosen)


def _kept_job(
    source: LocalSource, name: str, library: str, class_name: str, stored: tuple[str, ...], settings: Settings
) -> Job:
    """A component that the port took over as it was, for ComfyUI: the same tensors in one file."""
    header, _ = file_tensors(source, stored, name)
    recipe = for_header(header, "comfyui", "diffusers")
    forwards = compile_recipe(recipe, {}, recipe.source_headers({})).rebind(header)
    back = _cast(forwards.inverse(), forwards, recipe, settings.dtype)
    target = _target(name, None, source.name, "comfyui")
    return _job(source, name, library, class_name, recipe, SAME_NAMES, back, {}, stored, target, settings)


def _port_job(
    source: LocalSource, port: Port, name: str, record: dict[str, Any], settings: Settings, layout: Layout
) -> Job:
    stored = tuple(record["weights"])
    header, _ = file_tensors(source, stored, name)
    reference = record["recipe"]["reference"]
    recipe = _recipe(name, reference, settings.recipes, header)
    config = record["config"]
    plan = compile_recipe(recipe, config, _originals(recipe, record), header, dtype=record["dtype"])
    if plan.digest != record["recipe"]["digest"]:
        raise BadInputError(
            f"the recipe of {name} is no longer the one that wrote this port", expected=record["recipe"]["digest"],
            found=plan.digest, hint="convert the original again",
        )  # fmt: skip
    try:
        back = _cast(plan.inverse(_base_tensors(settings.base, name, record, port)), plan, recipe, settings.dtype)
    except RecipeError as error:
        if settings.base is None:  # the manifest names the file or folder that has what is lost
            words = ["porter", "convert", source.given, "--to", layout, "--base", port.manifest["source"]["spec"]]
            error.hint = f"{shlex.join(words)}{' --recipe FILE.py' if name in settings.recipes else ''} -o OUT"
        raise
    known = families().get(port.manifest.get("family") or "")
    part = known.component(name) if known else None
    names = [Path(text).name for text in record["sources"]]
    plain = len(names) == 1 and names[0].endswith((".safetensors", ".sft")) and not names[0].startswith(".")
    own = names[0] if plain and not record["prefix"] else None
    target = _target(name, own or (part.original_name if part else None), source.name, layout)
    return _job(source, name, record["library"], record["class"], recipe, reference, back, config, stored, target,
                settings, metadata=record["source_metadata"] if layout == "original" else {"format": "pt"})  # fmt: skip


def _originals(recipe: Recipe, record: Mapping[str, Any]) -> Mapping[str, TensorInfo]:
    """The original's tensors, in the dtypes that the manifest kept."""
    dtypes = record["source_dtypes"]
    first = dtypes if isinstance(dtypes, str) else "F32"
    shapes = record.get("source_shapes")
    if recipe.knows_sources or not isinstance(shapes, dict):
        original = recipe.source_headers(record["config"], first)
    else:
        original = guarded(lambda config: specs({key: tuple(shape) for key, shape in shapes.items()}, first))({})
    if isinstance(dtypes, str):
        return original
    if set(dtypes) != set(original):
        odd = sorted(set(dtypes) ^ set(original))
        raise BadInputError(
            f"{MANIFEST} names other source dtypes than the recipe's tensors", expected=f"{len(original)} tensors",
            found=", ".join(odd[:3]), hint="convert the model again",
        )  # fmt: skip
    return {key: replace(info, dtype=dtype_code(str(dtypes[key]))) for key, info in original.items()}


def _cast(back: TensorPlan, forwards: TensorPlan, recipe: Recipe, dtype: str | None) -> TensorPlan:
    """The way back with its targets cast, but for those of which the recipe's way there makes tensors that stay."""
    if dtype is None:
        return back
    keep = [Pattern(text) for text in recipe.keep_dtype]
    kept = {
        name for step in forwards.steps for name in step.sources
        if any(pattern.match(item.name, forwards.parameters) is not None for item in step.outputs for pattern in keep)
    }  # fmt: skip
    return back.cast(dtype_code(dtype), kept)


def _base_files(base: Source, record: Mapping[str, Any]) -> dict[str, str]:
    """Files of the base that hold a component's original weights → what the manifest calls them."""
    alone = base.kind == "file" and len(record["sources"]) == 1
    return {next(iter(base.files)): record["sources"][0]} if alone else {
        file: file for file in record["sources"] if file in base.files
    }  # fmt: skip


def _base_digests(base: Source | None, port: Port, jobs: tuple[Job, ...]) -> dict[str, str]:
    """What the base's files must be: those that the port was made from."""
    known, found = port.manifest["source"]["files"], dict[str, str]()
    for job in jobs if base else ():
        assert base is not None
        files = _base_files(base, port.manifest["components"][job.component])
        found |= {file: known[own]["sha256"] for file, own in files.items() if own in known}
    return found


def _base_tensors(
    base: Source | None, name: str, record: Mapping[str, Any], port: Port
) -> Mapping[str, TensorInfo] | None:
    """The original weights of a component, which a lossy conversion needs to be undone."""
    if base is None:
        return None
    files = _base_files(base, record)
    for file, own in files.items():  # `write` compares what it reads of them
        known = port.manifest["source"]["files"].get(own)
        if known and known["size"] != base.files[file].size:
            raise not_the_base(base, file, f"{known['size']} bytes", f"{base.files[file].size}")
    if not files:
        raise UsageError(
            f"the base {base.given} does not hold the original weights of {name}",
            expected=", ".join(record["sources"]), found=", ".join(list(base.files)[:4]),
            hint="name the original file or folder with --base",
        )  # fmt: skip
    header, _ = file_tensors(base, tuple(files), name)
    prefix = record["prefix"]
    return {key[len(prefix) :]: info for key, info in header.items() if key.startswith(prefix)}


def _of_pipeline(source: Source, plan: PortPlan, settings: Settings, layout: Layout) -> tuple[Job, ...]:
    family = families().get(plan.family) if plan.family else None
    jobs: list[Job] = []
    unmoved: list[str] = []
    for part in plan.components:
        if settings.component not in (None, part.name) or part.layout != "diffusers" or not part.dtypes:
            continue
        known = family.component(part.name) if family else None
        if known is not None and known.recipe is not None:
            jobs.append(_pipeline_job(source, part, known, settings, layout))
        elif layout == "comfyui" and part.name.startswith(tuple(_COMFY_FOLDERS)):
            jobs.append(_pipeline_job(source, part, None, settings, layout))
        else:
            unmoved.append(part.name)
    if not jobs:
        if settings.component and settings.component not in [part.name for part in plan.components]:
            raise unknown_component(source, settings.component, [part.name for part in plan.components])
        raise UsageError(
            f"{source.given} holds nothing that a recipe takes to the {layout} layout",
            expected="components in the diffusers layout with a recipe", found=", ".join(unmoved) or "none",
            hint=f"porter plan {source.given}",
        )  # fmt: skip
    return tuple(jobs)


def _pipeline_job(
    source: Source, part: ComponentPlan, known: Component | None, settings: Settings, layout: Layout
) -> Job:
    check_shards(source, part.files, part.name)
    header, _ = file_tensors(source, part.files, part.name)
    reference = known.recipe if known and known.recipe else SAME_NAMES
    recipe = settings.recipes.get(part.name) or recipe_for(reference, header, layout, "diffusers")
    # A config.json may leave out what the class means by default.
    config = full_config(part.library or "", part.class_name or "", part.config)
    forwards = compile_recipe(recipe, config, recipe.source_headers(config))
    base = None
    if settings.base is not None:
        weights = tuple(file for file in settings.base.files if file.endswith(tuple(f".{kind}" for kind in CONVERTED)))
        lost = {name for step in forwards.steps if step.exactness != "exact" for name in step.sources}
        holding = tuple(file for file in weights if lost & settings.base.header(file)[0].keys())
        base = file_tensors(settings.base, holding, part.name)[0]
    back = _cast(forwards.rebind(header).inverse(base), forwards, recipe, settings.dtype)
    target = _target(part.name, known.original_name if known else None, source.name, layout)
    return _job(source, part.name, part.library or "", part.class_name or "", recipe, reference, back, config,
                part.files, target, settings)  # fmt: skip


def _job(
    source: Source, name: str, library: str, class_name: str, recipe: Recipe, reference: str, back: TensorPlan,
    config: Mapping[str, Any], stored: tuple[str, ...], target: str, settings: Settings,
    metadata: Mapping[str, str] | None = None,
) -> Job:  # fmt: skip
    files = shards(back, target, settings.shard_size)
    borrowed = {info.file for key, info in back.sources.items() if key.endswith(BASE)}
    base = settings.base
    extra = tuple((base, file) for file in base.files if base.path(file) in borrowed) if base and borrowed else ()
    return Job(
        component=name, library=library, class_name=class_name, recipe=recipe, reference=reference, plan=back,
        config=config, sources=(*((source, file) for file in stored), *extra), shards=files,
        metadata=metadata or {"format": "pt"}, last=index_of(files, target), source_metadata={"format": "pt"},
        dtype=settings.dtype,
    )  # fmt: skip


def _target(name: str, original: str | None, model: str, layout: Layout) -> str:
    """The file that a component becomes."""
    if layout == "original":
        return original or f"{name}.safetensors"
    folder = next((place for start, place in _COMFY_FOLDERS.items() if name.startswith(start)), None)
    if folder is None:
        raise UsageError(
            f"ComfyUI loads no {name}", expected=", ".join(_COMFY_FOLDERS), hint="choose another --component"
        )
    last = name.removeprefix("text_encoder").removeprefix("_") if name.startswith("text_encoder") else ""
    return f"{folder}/{model}{'-' + last if last else ''}.safetensors"


def _recipe(name: str, reference: str, given: Mapping[str, Recipe], header: Mapping[str, TensorInfo]) -> Recipe:
    """The recipe that wrote component `name`: from the catalogue, or given again by the user.

    A manifest is data of unknown origin. What it names is compared with the catalogue and never imported or run.
    """
    if name in given:
        return given[name]
    if reference == SAME_NAMES:
        return for_header(header, "original", "diffusers")
    known = {each for family in families().values() for part in family.components for each in part.layouts.values()}
    if reference not in known:
        raise UsageError(
            f"{name} was written by a recipe that is not in the catalogue: {reference}",
            hint="give it again: --recipe FILE.py",
        )
    return recipe_for(reference, header, "original", "diffusers")
