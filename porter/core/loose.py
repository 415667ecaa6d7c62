"""Sources without a model_index.json: one component's folder, or original files told by their tensor names."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal

from porter.core.architectures import SURE, Guess, Part, guesses, parts, telling
from porter.core.checkpoint import Header
from porter.core.companions import part as part_companions
from porter.core.errors import BadInputError, UsageError
from porter.core.family import Component, Family, detect, families
from porter.core.layout import find_weights, highlights
from porter.core.plan import ComponentPlan
from porter.core.port import MANIFEST
from porter.core.source import Source
from porter.core.survey import INDEX, Survey, judge, known_component, leftovers, measure, pointer_note, totals

CHECKPOINTS = (".safetensors", ".sft", ".gguf", ".ckpt", ".pt", ".pth", ".bin")


def one_component(source: Source) -> Survey:
    """A folder with one component's config.json and weights."""
    config = source.json("config.json")
    names = [config.get("_class_name"), *(config.get("architectures") or ())] if isinstance(config, dict) else []
    class_name = next((name for name in names if isinstance(name, str)), None)
    if class_name is None:
        raise BadInputError(
            "config.json names no class", expected="`_class_name` or `architectures`", hint="name the pipeline's folder"
        )
    known = known_component(None, "", class_name)
    weights = find_weights(source.files, "")
    library = "diffusers" if "_class_name" in config else "transformers"
    found = Survey(family=next((f for f in families().values() if known in f.components), None))
    found.warnings.append("one component, not a pipeline: there is no model_index.json")
    status = judge(found, known.name if known else "model", library, class_name, "diffusers", known,
                     quantised="quantization_config" in config)  # fmt: skip
    parameters, dtypes = measure(source, weights.files)
    found.components.append(
        ComponentPlan(
            known.name if known else "model",
            library,
            class_name,
            status,
            "diffusers",
            weights.files,
            sum(source.files[name].size for name in weights.files),
            parameters,
            dtypes,
            None,
            highlights(config),
            pointer_note(source, weights.files),
        )
    )
    leftovers(source, found)
    return found


def loose_files(source: Source) -> Survey:
    """Checkpoint files without model_index.json: told by their tensor names."""
    suffixes = (".safetensors", ".sft") if source.kind == "hub" else CHECKPOINTS
    roots = [name for name in source.files if "/" not in name and name.endswith(suffixes)]
    if not roots:
        _refuse(source)
    found = Survey()
    for name in roots:
        if source.files[name].lfs_pointer:
            source.path(name)  # raises: the tensor names are not here
        header, notes = source.header(name)
        if "pickled" in notes:
            found.warnings.append(f"{name}: pickled; its tensors were listed without running it")
        if "code" in notes:
            found.warnings.append(f"{name}: it names code, which nobody ran: {notes['code']}")
        if hit := detect(header):
            found.family = found.family or hit[0]
            found.components.append(_convertible(source, name, header, *hit))
        else:
            found.components += _recognised(source, name, header, found)
    if found.family:
        found.pipeline_class = None
        found.style, found.style_reason = found.family.style, found.family.style_reason
        here = {part.name for part in found.components}
        if absent := [part.name for part in found.family.components if part.name not in here]:
            found.warnings.append(f"not a whole pipeline; {found.family.title} also has {', '.join(absent)}")
    else:
        found.style_reason = "unknown architecture: nothing is known that would demand a stage of its own"
    return found


def _convertible(source: Source, name: str, header: Header, family: Family, known: Component) -> ComponentPlan:
    """A whole file that one of the catalogue's recipes takes."""
    config = source.json(f"{known.name}/config.json") if f"{known.name}/config.json" in source.files else {}
    shapes = {key: info.shape for key, info in header.items()}
    best = next(iter(guesses(shapes, 1)), None)
    variant = best.architecture.variant(shapes) if best and best.score >= SURE else None
    parameters, dtypes = totals(header.values())
    return ComponentPlan(
        known.name,
        known.library,
        known.class_names[0],
        "convert",
        "original",
        (name,),
        source.files[name].size,
        parameters,
        dtypes,
        known.recipe,
        highlights(config),
        f"told by its tensor names: {family.title}",
        variant.name if variant else None,
    )


def _recognised(source: Source, name: str, header: Header, found: Survey) -> list[ComponentPlan]:
    """The components of a file that no recipe takes as it is: each told by its names, or the nearest ones given."""
    told = part_companions(header)
    if told.quantised:
        found.warnings.append(f"{name}: quantised: {told.quantised}; recipes do not take it")
    if told.factors > len(header) // 2:
        found.warnings.append(
            f"{name}: {told.factors} of {len(header)} tensors are factors of a LoRA, not a model's own"
        )
    pieces = parts({key: info.shape for key, info in told.plain.items()})
    made = []
    for piece in pieces:
        inside = [told.plain[piece.prefix + key] for key in piece.shapes]
        parameters, dtypes = totals(inside)
        size = source.files[name].size if len(pieces) == 1 else sum(info.end - info.begin for info in inside)
        near = tuple(_guess(guess, piece) for guess in piece.guesses)
        if (best := piece.sure) is None:
            found.warnings.append(f"{name}: no known layout; its tensors are {_templates(piece.shapes)}")
            label = name if len(pieces) == 1 else f"{name}: the rest"
            made.append(ComponentPlan(label, None, None, "port", "unknown", (name,), size, parameters, dtypes, None, {},
                                      _averaged(piece), None, piece.prefix, near))  # fmt: skip
            continue
        known = best.architecture
        family = families().get(known.family or "")
        found.family = found.family or family
        variant = known.variant(piece.shapes)
        model = variant.name if variant else known.model
        layout: Literal["original", "diffusers"] = "diffusers" if known.layout == "diffusers" else "original"
        title = family.title if family else f"shared by several families ({known.class_name})"
        note = f"{known.layout} layout of {title}, told by {best.score:.0%} of its tensor names"
        part = family.component(known.component) if family else None
        class_name = known.class_name if layout == "diffusers" else part.class_names[0] if part else None
        library = part.library if part else None
        made.append(ComponentPlan(known.component, library, class_name, "port", layout, (name,), size, parameters,
                                  dtypes, None, {}, note, model, piece.prefix, near))  # fmt: skip
    return made


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
