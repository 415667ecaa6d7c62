"""Sources without a model_index.json: components told by their configs, original files by their tensor names."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from porter.core.architectures import Guess, Part, telling
from porter.core.architectures import parts as take_apart
from porter.core.checkpoint import TensorInfo
from porter.core.companions import part as part_companions
from porter.core.errors import BadInputError, UsageError
from porter.core.family import Family, families
from porter.core.libraries import LIBRARIES, library_has
from porter.core.originals import Known, belongs, named_by_class, named_by_file
from porter.core.plan import ComponentPlan, Layout, Status
from porter.core.port import MANIFEST
from porter.core.source import Source
from porter.core.survey import INDEX, Survey, component, known_component, leftovers
from porter.core.weights import CHECKPOINTS, Read, WeightSet, read_set, totals, weight_sets

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
        else:
            chosen[key] = one
    looked = list(chosen.items())[:MAX_SETS]
    if len(chosen) > MAX_SETS:
        found.warnings.append(f"{len(chosen)} checkpoints; only the first {MAX_SETS} were looked into")
    configs = {key: _config(source, one, chosen) for key, one in looked}
    source.prefetch([name for _, one in looked for name in (*one.files, *([one.index] if one.index else []))])
    parts: dict[str, list[ComponentPlan]] = {}
    # The largest first: a denoiser names the family, which then decides about what several families share.
    for key, one in sorted(looked, key=lambda item: -sum(source.files[name].size for name in item[1].files)):
        note = "also as " + ", ".join(others[key]) if key in others else ""
        parts[key] = _components(source, found, one, configs[key], note)
    found.components = [part for key, _ in looked for part in parts[key]]
    whole = {part.name for part in found.components}
    if found.family and (absent := [part.name for part in found.family.components if part.name not in whole]):
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
    named = [config.get("_class_name"), *(config.get("architectures") or ())] if config else []
    class_name = next((name for name in named if isinstance(name, str)), None)
    library = "diffusers" if "_class_name" in config else "transformers" if class_name else None
    if class_name and library and (library_has(library, class_name) or named_by_class(class_name) is None):
        known = known_component(None, "", class_name)
        home = next((family for family in families().values() if known in family.components), None)
        shared = sum(class_name in part.class_names for f in families().values() for part in f.components) > 1
        found.family = found.family or (None if shared else home)
        name = one.folder.rpartition("/")[2] or (known.name if known else "model")
        return [component(source, found, name, library, class_name, config=config, layout="diffusers", weights=one,
                          read=read, note=note)]  # fmt: skip
    if read.header is None:
        return [_unfetched(source, found, one, config, class_name)]
    return _by_tensors(source, found, one, read, config, note)


def _unfetched(
    source: Source, found: Survey, one: WeightSet, config: dict[str, Any], class_name: str | None
) -> ComponentPlan:
    """Git-LFS pointers: told by the class that their config names, or by the file's name."""
    known = named_by_class(class_name) if class_name else None
    place: tuple[Family | None, Any] | None
    place = belongs(known)[1:] if known else named_by_file(one.files[0])
    family, part = place or (None, None)
    found.family = found.family or family
    how = f"told by its config ({class_name})" if known else "told by its file name alone" if part else "nothing known"
    name = part.name if part else known.component if known else one.stem
    return component(
        source, found, name, part.library if part else None, part.class_names[0] if part else None, config=config,
        layout="original", weights=one, note=f"weights not fetched (Git LFS); {how}",
    )  # fmt: skip


def _by_tensors(
    source: Source, found: Survey, one: WeightSet, read: Read, config: dict[str, Any], note: str
) -> list[ComponentPlan]:
    """The components of a set, each told by its tensor names, or with the nearest known ones."""
    assert read.header is not None
    told = part_companions(read.header)
    if told.quantised:
        found.warnings.append(f"{one.files[0]}: quantised: {told.quantised}; recipes do not take it")
    if told.factors > len(read.header) // 2:
        found.warnings.append(
            f"{one.files[0]}: {told.factors} of {len(read.header)} tensors are factors of a LoRA, not a model's own"
        )
    pieces = take_apart({key: info.shape for key, info in told.plain.items()})
    return [_piece(source, found, one, piece, read, config, told.plain, told.quantised, len(pieces) == 1, note)
            for piece in pieces]  # fmt: skip


def _piece(
    source: Source,
    found: Survey,
    one: WeightSet,
    piece: Part,
    read: Read,
    config: dict[str, Any],
    plain: Mapping[str, TensorInfo],
    quantised: str | None,
    whole: bool,
    note: str,
) -> ComponentPlan:
    inside = {key: plain[piece.prefix + key] for key in piece.shapes}
    parameters, dtypes = totals(inside.values())
    size = sum(source.files[name].size for name in one.files) if whole else sum(dtypes.values())
    near = tuple(_guess(guess, piece) for guess in piece.guesses)
    library: str | None = None
    class_name: str | None = None
    layout: Layout = "unknown"
    status: Status = "port"
    recipe: str | None = None
    model: str | None = None
    if (best := piece.sure) is None:
        found.warnings.append(f"{one.files[0]}: no known layout; its tensors are {_templates(piece.shapes)}")
        name = one.files[0] if whole else f"{one.files[0]}: the rest"
        note = _averaged(piece) or note
    else:
        known, twin = _settle(found, piece, best)
        layout = "diffusers" if known.architecture.layout == "diffusers" else "original"
        variant = known.architecture.variant(piece.shapes)
        model = variant.name if variant else known.architecture.model
        name = known.architecture.component
        if known.component:
            library, class_name = known.component.library, known.component.class_names[0]
        if layout == "diffusers":
            class_name = known.architecture.class_name
            library = library or next((lib for lib in LIBRARIES if library_has(lib, class_name)), None)
            status = "reuse" if library and not quantised else "port"
            status = "native" if status == "reuse" and known.component and known.component.native else status
        elif (recipe := known.recipe if not quantised and whole and not piece.prefix else None) is not None:
            status = "convert"
        title = known.family.title if known.family else f"shared by several families ({known.architecture.class_name})"
        if twin:
            class_name, model, title = None, None, f"{twin} alike"
        words = [f"{known.architecture.layout} layout of {title}, told by {best.score:.0%} of its tensor names"]
        if layout == "diffusers" and not config:
            words.append("its class needs a config.json")
        note = "; ".join(words + ([note] if note else []))
    if not config and (text := f"{name}/config.json") in source.files and source.kind != "file":
        given = source.json(text)
        config = given if isinstance(given, dict) else {}
    found.headers.setdefault(name, inside)
    return ComponentPlan(
        name=name, library=library, class_name=class_name, status=status, layout=layout, files=one.files, bytes=size,
        parameters=parameters, dtypes=dtypes, recipe=recipe, config=config, note=note, model=model,
        prefix=piece.prefix, guesses=near, quantised=quantised,
    )  # fmt: skip


def _settle(found: Survey, piece: Part, best: Guess) -> tuple[Known, str]:
    """The best guess's family, and what it cannot be told from: an equal layout of another family."""
    equal = [
        guess for guess in piece.guesses[1:]
        if guess.score == best.score and guess.architecture.templates == best.architecture.templates
        and guess.architecture.family != best.architecture.family
    ]  # fmt: skip
    known = belongs(best.architecture)
    if equal and found.family and any(guess.architecture.family == found.family.name for guess in equal):
        return belongs(next(g.architecture for g in equal if g.architecture.family == found.family.name)), ""
    every = [best, *equal] if equal else []
    twin = " or ".join(f"{each.architecture.class_name} ({each.architecture.family})" for each in every)
    if not equal:
        found.family = found.family or known.family
    return known, twin


def _guess(guess: Guess, piece: Part) -> dict[str, Any]:
    known = guess.architecture
    others = [other for other in piece.guesses if other.architecture is not known]
    return {
        "family": known.family,
        "component": known.component,
        "layout": known.layout,
        "class": known.class_name,
        "model": known.model,
        "score": round(guess.score, 3),
        "tells": telling(guess, others[0], piece.shapes) if others else [],
        "missing": list(guess.missing[:4]),
        "extra": list(guess.extra[:4]),
    }


def _averaged(piece: Part) -> str:
    names = list(piece.shapes)
    return "an averaged (EMA) copy" if names and all("ema" in name.lower() for name in names) else ""


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


def _templates(keys: Mapping[str, Any], limit: int = 4) -> str:
    """The commonest tensor name templates, numbers replaced by `{i}`."""
    counts = Counter(re.sub(r"(?<=\.)\d+(?=\.|$)", "{i}", key) for key in keys)
    shown = ", ".join(name for name, _ in counts.most_common(limit))
    return f"{shown} … ({len(counts)} templates)" if len(counts) > limit else shown or "none"
