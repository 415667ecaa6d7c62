"""Sources without a model_index.json: components told by their configs, original files by their tensor names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from porter.core.architectures import SURE, architectures, guesses, shapes_of
from porter.core.components import component, known_component
from porter.core.errors import BadInputError, UsageError
from porter.core.family import Component, Family, families
from porter.core.libraries import library_has, pipeline_optional
from porter.core.originals import ENCODERS, as_role, belongs, named_by_class, named_by_file
from porter.core.pieces import by_tensors
from porter.core.plan import ComponentPlan
from porter.core.port import MANIFEST
from porter.core.source import Source
from porter.core.survey import INDEX, Survey, leftovers
from porter.core.weights import CHECKPOINTS, Read, WeightSet, read_set, weight_sets

MAX_SETS = 200  # checkpoints of one source that are looked into; more are listed by name


def loose(source: Source) -> Survey:
    """Checkpoints without an index: one component's folder, or original files anywhere in the source.

    Raises:
        BadInputError: nothing in it is a checkpoint.
    """
    sets = weight_sets(source.files)
    if not sets:
        _refuse(source)
    found = Survey()
    chosen: dict[str, WeightSet] = {}
    others: dict[str, list[str]] = {}
    for one in sets:  # the best set of each stem; standard names of one folder are formats of the same weights
        key = one.folder + "/*" if one.standard else one.stem
        if key in chosen:
            others.setdefault(key, []).append(one.variant or one.kind)
            found.told.update(one.files)
        else:
            chosen[key] = one
    looked = list(chosen.items())[:MAX_SETS]
    if len(chosen) > MAX_SETS:
        found.warnings.append(f"{len(chosen)} checkpoints; only the first {MAX_SETS} were looked into")
    configs = {key: _config(source, one, chosen) for key, one in looked}
    source.prefetch([name for _, one in looked for name in (*one.files, *([one.index] if one.index else []))])
    parts: dict[str, list[ComponentPlan]] = {}

    # The largest first: a denoiser names the family, which then decides about what several families share; what can
    # only be told by a file name comes last, as the family decides about that too.
    def order(item: tuple[str, WeightSet]) -> tuple[bool, int]:
        infos = [source.files[name] for name in item[1].files]
        return any(info.lfs_pointer for info in infos) and not configs[item[0]], -sum(info.size for info in infos)

    for key, one in sorted(looked, key=order):
        note = "also as " + ", ".join(others[key]) if key in others else ""
        parts[key] = _components(source, found, one, configs[key], note)
    found.components = [part for key, _ in looked for part in parts[key]]
    if found.family:
        found.components = _encoders(found.family, _second(found.family, found.components))
    whole = {part.name for part in found.components}
    optional = pipeline_optional(found.family.pipeline_classes[0]) if found.family else ()
    roles = [part.name for part in found.family.components if part.name not in optional] if found.family else []
    if found.family and (absent := [role for role in roles if role not in whole]):
        found.warnings.append(f"not a whole pipeline; {found.family.title} also has {', '.join(absent)}")
    elif len(found.components) == 1 and found.components[0].config:
        found.warnings.append("one component, not a pipeline: there is no model_index.json")
    leftovers(source, found)
    return found


def _config(source: Source, one: WeightSet, chosen: Mapping[str, WeightSet]) -> dict[str, Any]:
    """The config.json beside a set, where it can only be that set's."""
    name = f"{one.folder}/config.json" if one.folder else "config.json"
    alone = sum(other.folder == one.folder for other in chosen.values()) == 1
    if source.kind == "file" or name not in source.files or not (alone or one.standard):
        return {}
    config = source.json(name)
    if not isinstance(config, dict):
        raise BadInputError(f"{name} is not a JSON object", hint="repair or download it again")
    return config


def _components(
    source: Source, found: Survey, one: WeightSet, config: dict[str, Any], note: str
) -> list[ComponentPlan]:
    """What one set holds."""
    read = read_set(source, one)
    if "pickled" in read.metadata:
        found.warnings.append(f"{one.files[0]}: pickled; its tensors were listed without running it")
    if "code" in read.metadata:
        found.warnings.append(f"{one.files[0]}: it names code, which nobody ran: {read.metadata['code']}")
    stated = config.get("architectures")
    named = [config.get("_class_name"), *(stated if isinstance(stated, list) else ())]
    class_name = next((name for name in named if isinstance(name, str)), None)
    library = "diffusers" if "_class_name" in config else "transformers" if class_name else None
    recorded = named_by_class(class_name) if class_name else None
    original = (
        recorded is not None and recorded.layout != "diffusers" and not library_has(library or "", class_name or "")
    )
    if class_name and library and not original:
        known = known_component(None, "", class_name)
        found.family = found.family or _home(class_name, read)
        name = one.folder.rpartition("/")[2] or (known.name if known else "model")
        return [component(source, found, name, library, class_name, config=config, layout="diffusers", weights=one,
                          read=read, note=note)]  # fmt: skip
    if read.header is None:
        return [_unfetched(source, found, one, config, class_name)]
    return by_tensors(source, found, one, read, config, note)


def _home(class_name: str, read: Read) -> Family | None:
    """The one family that has a class; where several have it, the one that the tensors show."""
    recorded = {
        known.family for known in architectures()
        if known.class_name == class_name and not known.component.startswith(ENCODERS)
    }  # fmt: skip
    homes = [
        family for family in families().values()
        if family.name in recorded
        or any(class_name in part.class_names for part in family.components if not part.name.startswith(ENCODERS))
    ]  # fmt: skip
    if len(homes) < 2 or read.header is None:
        return homes[0] if len(homes) == 1 else None
    best = next(iter(guesses(shapes_of(read.header), 1)), None)
    return families().get(best.architecture.family or "") if best and best.score >= SURE else None


def _second(family: Family, found: list[ComponentPlan]) -> list[ComponentPlan]:
    """Two sets of one class in two folders are a component and its second, where the family has one (`…_2`)."""
    twice = [name for name, count in Counter(part.name for part in found).items() if count == 2]
    for name in twice:
        first, second = (part for part in found if part.name == name)
        role = family.component(f"{name}_2")
        apart = first.files[0].rpartition("/")[0] != second.files[0].rpartition("/")[0]
        if role and apart and first.class_name == second.class_name and second.class_name in role.class_names:
            found = [part.replace(name=role.name) if part is second else part for part in found]
    return found


def _encoders(family: Family, found: list[ComponentPlan]) -> list[ComponentPlan]:
    """Text encoders under the names that their family has for them: by class, then the smaller before the larger."""
    roles = [part for part in family.components if part.name.startswith("text_encoder")]
    here = [part for part in found if part.name.startswith("text_encoder") and part.layout != "unknown"]
    named: dict[int, Component] = {}
    for part in here:
        fit = [role for role in roles if part.layout == "diffusers" and part.class_name in role.class_names]
        if len(fit) == 1 and fit[0] not in named.values():
            named[id(part)] = fit[0]
    rest = sorted((part for part in here if id(part) not in named), key=lambda part: part.parameters or 0)
    free = [role for role in roles if role not in named.values()]
    if len(rest) < len(free) and all(part.layout == "original" for part in rest):
        free = free[-len(rest) :] if rest else []  # a pipeline that lacks one lacks the first: the others are required
    named |= {id(part): role for part, role in zip(rest, free, strict=False)}
    return [as_role(part, role) if (role := named.get(id(part))) else part for part in found]


def _unfetched(
    source: Source, found: Survey, one: WeightSet, config: dict[str, Any], class_name: str | None
) -> ComponentPlan:
    """Git-LFS pointers: told by the class that their config names, or by the file's name."""
    known = named_by_class(class_name) if class_name else None
    place: tuple[Family | None, Any] | None
    place = belongs(known, found.family)[1:] if known else named_by_file(one.files[0], found.family)
    family, part = place or (None, None)
    found.family = found.family or family
    how = f"told by its config ({class_name})" if known else "told by its file name alone" if part else "nothing known"
    name = part.name if part else known.component if known else one.stem
    return component(
        source, found, name, part.library if part else None, part.class_names[0] if part else None, config=config,
        layout="original", weights=one, note=f"weights not fetched (Git LFS); {how}",
    )  # fmt: skip


def _refuse(source: Source) -> None:
    kept = ", ".join(list(source.files)[:4])
    if source.kind == "file":
        raise BadInputError(
            f"{source.given} is no checkpoint that porter reads", expected=f"a file {' '.join(CHECKPOINTS)}",
            hint="name a checkpoint file",
        )  # fmt: skip
    if MANIFEST in source.files:
        raise UsageError(f"{source.given} is a port of single components", hint=f"porter parity {source.given}")
    raise BadInputError(
        f"{source.given} is not a pipeline", expected=f"{INDEX}, or checkpoint files", found=kept,
        hint="porter plan <a folder that holds one>",
    )  # fmt: skip
