"""Pipelines by their index: model_index.json, modular_model_index.json, and pipelines inside folders."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from porter.core.components import component, known_component
from porter.core.errors import BadInputError
from porter.core.family import Family, families, family_of_pipeline
from porter.core.layout import weightless
from porter.core.originals import original_of
from porter.core.plan import ComponentPlan, Layout
from porter.core.source import Source
from porter.core.subfolder import Subfolder
from porter.core.survey import INDEX, MODULAR_INDEX, Survey, leftovers
from porter.core.weights import WEIGHT_SUFFIXES, Read, WeightSet, indexed, read_set, weight_sets

_CONFIGS = (
    "config.json", "scheduler_config.json", "tokenizer_config.json", "processor_config.json",
    "preprocessor_config.json", "image_processor_config.json", "video_preprocessor_config.json",
)  # fmt: skip
MAX_PIPELINES = 20
MAX_COMPONENTS = 100
Entry = tuple[str | None, str | None, dict[str, Any]]


def pipeline(source: Source, index_name: str = INDEX) -> Survey:
    """A folder with a model_index.json.

    Raises:
        BadInputError: it names no class, no components, or describes one badly.
    """
    index = source.json(index_name)
    class_name = _class_name(index)
    if class_name is None:
        raise BadInputError(
            f"{index_name} names no pipeline class", expected="a `_class_name`", hint="is it a pipeline?"
        )
    if not re.fullmatch(r"[A-Za-z_]\w{0,99}", class_name):
        raise BadInputError(
            f"{index_name}: its pipeline class is no class name", expected="a plain name such as MyPipeline",
            found=repr(class_name[:80]), hint="do not trust this repository; download it again from its author",
        )  # fmt: skip
    found = Survey(class_name, family_of_pipeline(class_name))
    if not isinstance(index["_class_name"], str):
        found.warnings.append(f"the pipeline {class_name} is code of the repository; never run")
    entries = {name: entry for name, value in index.items() if not name.startswith("_") and (entry := _entry(value))}
    if not entries:
        raise BadInputError(
            f"{index_name} names no components", expected='entries such as "vae": ["diffusers", …]',
            hint="is it a pipeline?",
        )  # fmt: skip
    for name, value in index.items():
        if name not in entries and not name.startswith("_"):
            if any(file.startswith(f"{name}/") for file in source.files):
                raise BadInputError(
                    f"{index_name} describes {name} badly, and its folder is here",
                    expected=f'"{name}": ["library", "class"]', found=repr(value)[:80],
                    hint=f"repair {index_name}, or remove {name}/",
                )  # fmt: skip
            found.settings[name] = value
    if len(entries) > MAX_COMPONENTS:
        raise BadInputError(
            f"{index_name} names {len(entries)} components", expected=f"at most {MAX_COMPONENTS}",
            hint="is it a pipeline?",
        )  # fmt: skip
    source.prefetch(_wanted(source, entries))
    _refine_family(source, found, entries)
    claimed: set[str] = set()
    for name, entry in entries.items():
        _check_names(index_name, name, entry)
        if entry[1] is None:
            found.warnings.append(f"{name}: the pipeline leaves it out")
        else:
            found.components += _components(source, found, name, entry, claimed)
    leftovers(source, found)
    inner = [file for file in source.files if file.endswith(f"/{INDEX}") and file.split("/")[0] not in entries]
    if inner:
        places = ", ".join(file.rpartition("/")[0] for file in inner[:4])
        found.warnings.append(f"other pipelines lie inside: {places}; --subfolder plans one of them")
    return found


def modular(source: Source) -> Survey:
    """A folder with a modular_model_index.json; its components may live in other repositories."""
    found = pipeline(source, MODULAR_INDEX)
    found.warnings.insert(0, "a modular pipeline: its blocks are code of diffusers, or of the repository")
    return found


def nested(source: Source) -> Survey | None:
    """The pipelines that lie in folders of the source, their components called `<folder>/<component>`; None without."""
    places = [name.removesuffix(f"/{INDEX}") for name in source.files if name.endswith(f"/{INDEX}")]
    places = [place for place in places if not any(place.startswith(f"{other}/") for other in places)]
    if not places:
        return None
    found = Survey()
    homes: list[Family | None] = []
    for place in places[:MAX_PIPELINES]:
        parts, inner = _inner_pipeline(source, found, place, place)
        found.components += parts
        homes.append(inner.family)
        found.warnings.append(f"a pipeline of its own: {place} ({inner.pipeline_class}); --subfolder plans it alone")
    if len(places) > MAX_PIPELINES:
        found.warnings.append(f"{len(places)} pipelines; only the first {MAX_PIPELINES} were looked into")
    found.family = homes[0] if len({family and family.name for family in homes}) == 1 else None
    found.places = tuple(places)
    leftovers(source, found)
    return found


def _check_names(index_name: str, name: str, entry: Entry) -> None:
    """Refuse names that are paths, or no names at all.

    Raises:
        BadInputError: always, for such a name.
    """
    library, class_name, _ = entry
    for what, text, pattern in (
        ("a component", name, r"[A-Za-z_][\w .-]{0,99}"), ("a library", library, r"[A-Za-z_]\w*(\.\w+)*"),
        ("a class", class_name, r"[A-Za-z_]\w*"),
    ):  # fmt: skip
        if text is not None and (len(text) > 100 or not re.fullmatch(pattern, text)):
            raise BadInputError(
                f"{index_name}: {name[:60]!r} names {what} that is none", expected="a plain name, no path",
                found=repr(text[:80]), hint="do not trust this repository; download it again from its author",
            )  # fmt: skip


def _class_name(index: Any) -> str | None:
    stated = index.get("_class_name") if isinstance(index, dict) else None
    if isinstance(stated, list) and len(stated) == 2:  # ["module of the repository", "class"]
        stated = stated[1]
    return stated if isinstance(stated, str) and stated else None


def _entry(value: Any) -> Entry | None:
    """(library, class, where else it lives) of one entry; None where the value is no component."""
    if not isinstance(value, list) or len(value) not in (2, 3):
        return None
    if not all(item is None or isinstance(item, str) for item in value[:2]):
        return None
    place = value[2] if len(value) == 3 else {}
    if not isinstance(place, dict):
        return None
    hint = place.get("type_hint")
    library, class_name = value[0], value[1]
    if class_name is None and isinstance(hint, list) and len(hint) == 2 and all(isinstance(h, str) for h in hint):
        library, class_name = hint
    return library, class_name, place


def _wanted(source: Source, entries: dict[str, Entry]) -> list[str]:
    """Files whose content or header the plan will ask for: known beforehand, so that a hub can send them at once."""
    wanted: list[str] = []
    for name, entry in entries.items():
        folder = _folder(name, entry)
        wanted += [f"{folder}/{file}" for file in _CONFIGS if f"{folder}/{file}" in source.files]
        for one in weight_sets(source.files, folder)[:1]:
            wanted += [*one.files, *([one.index] if one.index else [])]
    return wanted


def _folder(name: str, entry: Entry) -> str:
    inner = entry[2].get("subfolder")
    return inner.strip("/") if isinstance(inner, str) and inner.strip("/") else name


def _refine_family(source: Source, found: Survey, entries: dict[str, Entry]) -> None:
    """Families that share a pipeline class are told apart by a config (`Family.told_by`) or a component's class."""
    rivals = [family for family in families().values() if found.pipeline_class in family.shared_pipelines]
    for family in rivals:
        name, key, value = family.told_by
        file = f"{name}/config.json"
        config = source.json(file) if name in entries and file in source.files else None
        if isinstance(config, dict) and config.get(key) in value:
            found.family = family
    theirs = found.family.components if found.family else ()
    for name in ("transformer", "unet"):
        class_name = entries.get(name, (None, None, {}))[1]
        own = next((part for part in theirs if part.name == name), None)
        homes = [f for f in families().values() if (part := f.component(name)) and class_name in part.class_names]
        if class_name and own and class_name not in own.class_names and len(homes) == 1:
            found.family = homes[0]  # a model saved under another family's pipeline


def _components(source: Source, found: Survey, name: str, entry: Entry, claimed: set[str]) -> list[ComponentPlan]:
    """One entry of the index: its files, its layout, and what can be done with it; a pipeline's own components."""
    library, class_name, place = entry
    folder = _folder(name, entry)
    if f"{folder}/{INDEX}" in source.files:
        return _inner_pipeline(source, found, name, folder)[0]
    config = _config(source, folder)
    sets = indexed(source, folder, weight_sets(source.files, folder))
    chosen = sets[0] if sets else None
    if others := [file for one in sets[1:] if chosen and not one.standard for file in one.files]:
        more = " …" if len(others) > 3 else ""
        found.warnings.append(f"{name}: other weights in its folder, not counted: {', '.join(others[:3])}{more}")
    note = _others(sets)
    layout: Layout = "diffusers"
    known = known_component(found.family, name, class_name)
    outside = original_of(source, found.family, known, claimed) if found.family and known else None
    spare, recipe = outside or (None, None)
    if chosen is None and spare:
        chosen, layout = spare, "original"
    if spare:
        claimed.update(spare.files)
        if layout == "diffusers":
            found.warnings.append(f"{name}: {spare.files[0]} is here in the original layout as well; {folder}/ is used")
    elsewhere = _elsewhere(source, place)
    read: Read | None = None
    files: tuple[str, ...] = ()
    if chosen is None:
        inside = tuple(file for file in source.files if file.startswith(f"{folder}/"))
        bare: Layout = "none" if inside and weightless(class_name or "") else "unknown"
        layout = "elsewhere" if elsewhere and not inside else bare
        files = inside if layout == "none" else tuple(file for file in inside if file.endswith(WEIGHT_SUFFIXES))
        if files and layout == "unknown":
            layout, note = "unread", "only as " + ", ".join(sorted({file.rpartition(".")[2] for file in files}))
    else:
        read = read_set(source, chosen)
        if chosen.kind not in ("safetensors", "sft") and read.header is not None:
            found.warnings.append(f"{name}: {chosen.files[0]} is pickled; its tensors were listed without running it")
    return [
        component(
            source, found, name, library, class_name, config=config, layout=layout, weights=chosen, read=read,
            files=files, note=note, location=elsewhere, recipe=recipe,
        )
    ]  # fmt: skip


def _others(sets: list[WeightSet]) -> str:
    """What else lies beside the chosen set: other precisions and formats of the same weights."""
    others = [one.variant or "plain" for one in sets[1:] if one.kind == sets[0].kind and one.standard]
    kinds = [one.kind for one in sets[1:] if one.kind != sets[0].kind]
    words = list(dict.fromkeys(word for word in (*others, *kinds) if word != (sets[0].variant or "plain")))
    return "also as " + ", ".join(words) if words else ""


def _config(source: Source, folder: str) -> dict[str, Any]:
    name = next((f"{folder}/{file}" for file in _CONFIGS if f"{folder}/{file}" in source.files), None)
    config = source.json(name) if name else {}
    if not isinstance(config, dict):
        raise BadInputError(f"{name} is not a JSON object", hint="repair or download it again")
    return config


def _elsewhere(source: Source, place: dict[str, Any]) -> str | None:
    """`owner/name[/subfolder][@revision]` of a component that a modular index fetches from another repository."""
    repo = place.get("pretrained_model_name_or_path", place.get("repo"))
    if not isinstance(repo, str) or not repo or repo == source.spec:
        return None
    inner, revision = place.get("subfolder"), place.get("revision")
    text = repo + (f"/{inner}" if isinstance(inner, str) and inner else "")
    return text + (f"@{revision}" if isinstance(revision, str) and revision else "")


def _inner_pipeline(source: Source, found: Survey, name: str, folder: str) -> tuple[list[ComponentPlan], Survey]:
    """The components of a pipeline inside the source, called `<name>/<component>`, and what was found of it."""
    inner = pipeline(Subfolder(source, folder))
    own = {part.name for part in inner.components} | set(source.json(f"{folder}/{INDEX}"))
    for line in inner.warnings:  # those that begin with a component's name are about it
        found.warnings.append(f"{name}/{line}" if line.partition(":")[0] in own else f"{name}: {line}")
    found.headers |= {f"{name}/{part}": header for part, header in inner.headers.items()}
    parts = [
        replace(part, name=f"{name}/{part.name}", files=tuple(f"{folder}/{file}" for file in part.files))
        for part in inner.components
    ]
    return parts, inner
