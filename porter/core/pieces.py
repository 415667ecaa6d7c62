"""The components of a checkpoint, each told by its tensor names, or with the nearest known architectures."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from porter.core.architectures import Guess, Part, guesses, shapes_of, telling
from porter.core.architectures import parts as take_apart
from porter.core.checkpoint import TensorInfo
from porter.core.companions import AVERAGED
from porter.core.companions import part as part_companions
from porter.core.libraries import LIBRARIES, library_has
from porter.core.originals import ENCODERS, Known, belongs, is_dialect, kept_recipe, named_by_file, recipe_for
from porter.core.plan import ComponentPlan, Extra, Layout, Status
from porter.core.source import Source
from porter.core.survey import Survey
from porter.core.weights import Read, WeightSet, totals

CONVERTED = ("safetensors", "sft", "ckpt", "pt", "pth", "bin")  # kinds of files whose tensors can be copied
SAME_NAMES = "porter.core.identity:same_names"  # recipe of components that only have to be taken out of their file
# Buffers that the original training code saved; a scheduler computes them from its config.
_SCHEDULE = re.compile(
    r"((sqrt_)?(recip_)?(m1_|recipm1_|one_minus_|log_one_minus_)?alphas_cumprod(_prev)?|sqrt_recipm1_alphas_cumprod|betas"
    r"|posterior_(variance|log_variance_clipped|mean_coef[12])|lvlb_weights|logvar|denoiser\.sigmas|model_sampling\.sigmas"
    r"|log_sigmas|sigmas|scale_factor|timesteps|freqs_cis)"
)


@dataclass(frozen=True)
class _Checkpoint:
    """What the components of one set share."""

    source: Source
    found: Survey
    one: WeightSet
    config: dict[str, Any]
    plain: Mapping[str, TensorInfo]
    header: Mapping[str, TensorInfo]
    note: str
    alone: bool


def by_tensors(
    source: Source, found: Survey, one: WeightSet, read: Read, config: dict[str, Any], note: str
) -> list[ComponentPlan]:
    """The components of a set, each told by its tensor names, or with the nearest known ones."""
    assert read.header is not None
    if one.missing:
        numbers = ", ".join(map(str, one.missing[:8])) + (" …" if len(one.missing) > 8 else "")
        found.warnings.append(f"{one.files[0]}: shards {numbers} are missing")
    told = part_companions(read.header)
    if told.quantised:
        found.warnings.append(f"{one.files[0]}: quantised: {told.quantised}; recipes do not take it")
    if told.factors > len(read.header) // 2:
        found.warnings.append(
            f"{one.files[0]}: {told.factors} of {len(read.header)} tensors are factors of a LoRA, not a model's own"
        )
    pieces = take_apart(shapes_of(told.plain))
    pieces = [part for piece in pieces for part in ([piece] if piece.sure else _sorted_out(piece))]
    file = _Checkpoint(source, found, one, config, told.plain, read.header, note, len(pieces) == 1)
    built: dict[int, ComponentPlan] = {}
    # The largest first: a denoiser names the family, which then decides about what several families share.
    for number in sorted(range(len(pieces)), key=lambda n: -sum(map(prod, pieces[n].shapes.values()))):
        piece = pieces[number]
        if what := _extra(piece, pieces):
            count, dtypes = totals(file.plain[piece.prefix + key] for key in piece.shapes)
            found.extras.append(Extra(what[0], one.files[0], count, sum(dtypes.values()), what[1]))
        else:
            built[number] = _known(file, piece) if piece.sure else _unknown(file, piece)
    return [built[number] for number in sorted(built)]


def _extra(piece: Part, pieces: list[Part]) -> tuple[str, str] | None:
    """(name, note) of a piece that is no component of its own."""
    best = piece.sure
    averaged = bool(re.match(r"(model_)?ema(_model|_state_dict)?\.|averaged?_model\.", piece.prefix))
    twin = any(other.sure and best and other is not piece and not other.prefix.startswith(piece.prefix)
               and other.sure.architecture is best.architecture for other in pieces)  # fmt: skip
    if (averaged and twin) or (piece.shapes and best is None and all(map(_is_copy, piece.shapes))):
        return "averaged copies", "an averaged (EMA) copy of another component's weights"
    if piece.shapes and best is None and all(_SCHEDULE.fullmatch(name) for name in piece.shapes):
        return "noise schedule", "buffers that a scheduler computes from its config"
    return None


def _sorted_out(piece: Part) -> list[Part]:
    """What is no known layout, in up to three: averaged copies, buffers of the noise schedule, and the rest."""
    if piece.prefix or not any(_SCHEDULE.fullmatch(name) or _is_copy(name) for name in piece.shapes):
        return [piece]
    groups: dict[str, dict[str, tuple[int, ...]]] = {"copy": {}, "schedule": {}, "rest": {}}
    for name, shape in piece.shapes.items():
        groups["copy" if _is_copy(name) else "schedule" if _SCHEDULE.fullmatch(name) else "rest"][name] = shape
    return [Part("", group, guesses(group) if kind == "rest" else []) for kind, group in groups.items() if group]


def _is_copy(name: str) -> bool:
    return name.startswith(AVERAGED)


def _packed(file: _Checkpoint, piece: Part) -> str | None:
    """How a piece's own tensors are packed: beside a quantised component others may be plain."""
    if file.alone:
        return part_companions(file.header).quantised
    if not piece.prefix:
        return part_companions({name: file.header[name] for name in piece.shapes}).quantised
    inside = {name: info for name, info in file.header.items() if name.startswith(piece.prefix)}
    return part_companions(inside).quantised


def _known(file: _Checkpoint, piece: Part) -> ComponentPlan:
    """A piece that is a known architecture."""
    best = piece.sure
    assert best is not None
    packed = _packed(file, piece)
    known, twin = _settle(file, piece, best)
    whole = file.alone and not piece.prefix and file.one.kind in ("safetensors", "sft")
    # A library's own names in the words of another of its versions: it reads them as they are.
    dialect = is_dialect(known.architecture)
    layout: Layout = "diffusers" if dialect or known.architecture.layout == "diffusers" else "original"
    model = known.architecture.released(piece.shapes)
    name = known.architecture.component
    library = known.component.library if known.component else None
    class_name = known.component.class_names[0] if known.component else None
    status: Status = "port"
    recipe: str | None = None
    config = file.config or _config_for(file, name)
    title = known.family.title if known.family else f"{known.architecture.class_name}, which families share"
    words = [f"{known.architecture.layout} layout of {title}, told by {best.score:.0%} of its tensor names"]
    if layout == "diffusers":
        class_name = known.architecture.class_name
        library = library or next((lib for lib in LIBRARIES if library_has(lib, class_name)), None)
        status = "reuse" if library and not packed and whole else "port"
        if not whole and library and not packed and file.one.kind in CONVERTED:
            own = None if dialect else kept_recipe(file.found.family or known.family, known.architecture)
            status, recipe = "convert", known.recipe or own or SAME_NAMES
            if recipe == SAME_NAMES:
                words.append(f"{class_name} takes its tensors as they are, from a file of its own")
        native = known.component is not None and known.component.native_of(class_name) and bool(file.config)
        status = "native" if status == "reuse" and native else status
        if status == "reuse" and known.recipe and not config:  # the original's names are the class's own
            recipe, status = known.recipe, "convert"
            words.append("the conversion writes its config.json")
    elif known.recipe and not packed:
        if file.one.kind in CONVERTED:
            recipe, status = known.recipe, "convert"
        else:
            words.append(f"its recipe takes {', '.join(CONVERTED)}")
    if twin:
        class_name, model, status, recipe = None, None, "port", None
        words[0] = f"{known.architecture.layout} layout of {twin} alike, told by {best.score:.0%} of its tensor names"
    if layout == "diffusers" and not config and status != "convert":
        words.append("its class needs a config.json")
    words += [file.note] if file.note else []
    return _component(file, piece, name, library=library, class_name=class_name, status=status, layout=layout,
                      recipe=recipe, config=config, note="; ".join(words), model=model)  # fmt: skip


def _unknown(file: _Checkpoint, piece: Part) -> ComponentPlan:
    """A piece that is no known layout, with its nearest ones."""
    label = file.one.files[0]
    file.found.warnings.append(f"{label}: no known layout; its tensors are {_templates(piece.shapes)}")
    name = label if file.alone else f"{label}: the rest"
    return _component(file, piece, name, status="port", layout="unknown", config=file.config, note=file.note)


def _component(
    file: _Checkpoint,
    piece: Part,
    name: str,
    *,
    status: Status,
    layout: Layout,
    config: dict[str, Any],
    note: str,
    library: str | None = None,
    class_name: str | None = None,
    recipe: str | None = None,
    model: str | None = None,
) -> ComponentPlan:
    inside = {key: file.plain[piece.prefix + key] for key in piece.shapes}
    parameters, dtypes = totals(inside.values())
    whole = sum(file.source.files[name].size for name in file.one.files)
    file.found.headers.setdefault(name, inside)
    return ComponentPlan(
        name=name, library=library, class_name=class_name, status=status, layout=layout, files=file.one.files,
        bytes=whole if file.alone else sum(dtypes.values()), parameters=parameters, dtypes=dtypes, recipe=recipe,
        config=config, note=note, model=model, prefix=piece.prefix,
        guesses=tuple(_guess(guess, piece) for guess in piece.guesses), quantised=_packed(file, piece),
    )  # fmt: skip


def _config_for(file: _Checkpoint, name: str) -> dict[str, Any]:
    """The config of a component's own folder, where weights lie outside it."""
    place = f"{name}/config.json"
    if file.source.kind == "file" or place not in file.source.files:
        return {}
    given = file.source.json(place)
    return given if isinstance(given, dict) else {}


def _settle(file: _Checkpoint, piece: Part, best: Guess) -> tuple[Known, str]:
    """The best guess's family, and what it cannot be told from: an equal layout of another family.

    Where families take one original layout, the rest of the source decides, then the file's name.
    """
    found = file.found
    equal = [
        guess for guess in piece.guesses[1:]
        if guess.score == best.score and guess.architecture.templates == best.architecture.templates
        and guess.architecture.family != best.architecture.family
    ]  # fmt: skip
    named = named_by_file(file.one.files[0])
    told = named and named[1].name == best.architecture.component and recipe_for(*named, best.architecture)
    known = belongs(best.architecture, found.family or (named[0] if named and told else None))
    if equal and found.family and any(guess.architecture.family == found.family.name for guess in equal):
        return belongs(next(g.architecture for g in equal if g.architecture.family == found.family.name)), ""
    every = [best, *equal] if equal else []
    twin = " or ".join(f"{each.architecture.class_name} ({each.architecture.family})" for each in every)
    if not equal and not best.architecture.component.startswith(ENCODERS):
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


def _templates(keys: Mapping[str, Any], limit: int = 4) -> str:
    """The commonest tensor name templates, numbers replaced by `{i}`."""
    counts = Counter(re.sub(r"(?<=\.)\d+(?=\.|$)", "{i}", key) for key in keys)
    shown = ", ".join(name for name, _ in counts.most_common(limit))
    return f"{shown} … ({len(counts)} templates)" if len(counts) > limit else shown or "none"
