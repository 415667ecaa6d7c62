"""Preparing a port → the original layout: the same recipes, inverted; the files get the names they had."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from porter.core.checkpoint import dtype_code, read_header
from porter.core.errors import BadInputError, RecipeError, UsageError
from porter.core.family import families, resolve
from porter.core.jobs import WEIGHTS_NAME, Copy, Job, Preparation, unknown_component
from porter.core.port import MANIFEST, Port
from porter.core.recipe import Recipe, compile_recipe
from porter.core.source import LocalSource, Source


def inverse(source: Source, *, component: str | None, recipes: Mapping[str, Recipe], dtype: str | None) -> Preparation:
    """A port back into the original layout: the same recipes, inverted.

    Raises:
        UsageError: not a port, an unknown component, a dtype asked for, a recipe that must be given again.
        BadInputError: the port changed since it was written.
        RecipeError: the conversion lost something that only the original file has.
    """
    if not isinstance(source, LocalSource) or MANIFEST not in source.files:
        raise UsageError(
            f"{source.given} is no port: only a port knows what it was", hint=f"porter convert {source.given} -o PORT"
        )
    if dtype is not None:
        raise UsageError("--to original restores the original dtypes", hint="leave out --dtype")
    port = Port.open(source.root)
    if absent := [name for name in port.manifest["files"] if name not in source.files]:
        raise BadInputError(f"{source.given} lacks {absent[0]}", hint="convert the original again")
    if changed := port.stale(full=False):
        raise BadInputError(
            f"{source.given} changed since it was written: {', '.join(changed[:3])}", hint="convert the original again"
        )
    records = {
        name: record
        for name, record in port.manifest["components"].items()
        if record["action"] == "convert" and component in (None, name)
    }
    if not records:
        have = [name for name, record in port.manifest["components"].items() if record["action"] == "convert"]
        raise unknown_component(source, component, have)
    jobs = tuple(_inverse_job(source, port, name, record, recipes) for name, record in records.items())
    used = {name for job in jobs for name in job.sources}
    copies = [
        Copy.of(source, name)
        for name in port.manifest["files"]
        if name not in used and (component is None or name == f"{component}/config.json")
    ]
    restored = {job.target for job in jobs}
    if len(restored) < len(jobs) or restored & {copy.name for copy in copies}:
        raise BadInputError(f"{source.given}: two files would be called alike", found=", ".join(sorted(restored)))
    return Preparation(
        source,
        "original",
        port.manifest.get("family"),
        port.manifest.get("pipeline"),
        jobs,
        tuple(copies),
        {},
        tuple((name, "what the restored files were made from") for name in sorted(used)),
        dict(port.manifest["licence"]),
    )


def _inverse_job(
    source: LocalSource, port: Port, name: str, record: dict[str, Any], recipes: Mapping[str, Recipe]
) -> Job:
    recipe = _recipe(name, record["recipe"]["reference"], recipes)
    config, stored = record["config"], f"{name}/{WEIGHTS_NAME}"
    header, _ = read_header(source.path(stored))
    dtypes = record["source_dtypes"]
    original = recipe.source_headers(config, dtypes if isinstance(dtypes, str) else "F32")
    if not isinstance(dtypes, str):
        if set(dtypes) != set(original):
            odd = sorted(set(dtypes) ^ set(original))
            raise BadInputError(
                f"{MANIFEST} names other source dtypes than the recipe's tensors", expected=f"{len(original)} tensors",
                found=", ".join(odd[:3]), hint="convert the model again",
            )  # fmt: skip
        original = {key: replace(info, dtype=dtype_code(str(dtypes[key]))) for key, info in original.items()}
    plan = compile_recipe(recipe, config, original, header, dtype=record["dtype"])
    if plan.digest != record["recipe"]["digest"]:
        raise BadInputError(
            f"the recipe of {name} is no longer the one that wrote this port", expected=record["recipe"]["digest"],
            found=plan.digest, hint="convert the original again",
        )  # fmt: skip
    if plan.exactness != "exact":
        raise RecipeError(
            f"{name} cannot be restored: its conversion was {plan.exactness}",
            expected="a port in the original dtypes, with nothing dropped", hint="keep the original file",
        )  # fmt: skip
    known = families().get(port.manifest.get("family") or "")
    part = known.component(name) if known else None
    names = [Path(text).name for text in record["sources"]]
    plain = len(names) == 1 and names[0].endswith((".safetensors", ".sft")) and not names[0].startswith(".")
    fallback = (part.original_name if part else None) or f"{name}.safetensors"
    return Job(
        component=name,
        library=record["library"],
        class_name=record["class"],
        recipe=recipe,
        reference=record["recipe"]["reference"],
        plan=plan.inverse(),
        config=config,
        sources=(stored,),
        target=names[0] if plain else fallback,
        metadata=record["source_metadata"],
        source_metadata={"format": "pt"},
    )


def _recipe(name: str, reference: str, given: Mapping[str, Recipe]) -> Recipe:
    """The recipe that wrote component `name`: from the catalogue, or given again by the user.

    A manifest is data of unknown origin. What it names is compared with the catalogue and never imported or run.
    """
    if name in given:
        return given[name]
    known = {each for family in families().values() for part in family.components for each in part.layouts.values()}
    if reference not in known:
        raise UsageError(
            f"{name} was written by a recipe that is not in the catalogue: {reference}",
            hint="give it again: --recipe FILE.py",
        )
    found: Recipe = resolve(reference)
    return found
