"""The components of a checkpoint, each told by its tensor names, or with the nearest known architectures."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from porter.core.architectures import Guess, Part, telling
from porter.core.architectures import parts as take_apart
from porter.core.checkpoint import TensorInfo
from porter.core.companions import part as part_companions
from porter.core.libraries import LIBRARIES, library_has
from porter.core.originals import Known, belongs
from porter.core.plan import ComponentPlan, Layout, Status
from porter.core.source import Source
from porter.core.survey import Survey
from porter.core.weights import Read, WeightSet, totals


def by_tensors(
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


def _templates(keys: Mapping[str, Any], limit: int = 4) -> str:
    """The commonest tensor name templates, numbers replaced by `{i}`."""
    counts = Counter(re.sub(r"(?<=\.)\d+(?=\.|$)", "{i}", key) for key in keys)
    shown = ", ".join(name for name, _ in counts.most_common(limit))
    return f"{shown} … ({len(counts)} templates)" if len(counts) > limit else shown or "none"
