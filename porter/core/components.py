"""One component: its plan from what its index entry, its config and its headers say, and what is odd about them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from porter.core.architectures import architectures, fold, shapes_of
from porter.core.checkpoint import TensorInfo
from porter.core.companions import part as companions_of
from porter.core.described import full_config
from porter.core.errors import BadInputError, PorterError
from porter.core.family import Component, Family, families, resolve
from porter.core.layout import weightless
from porter.core.libraries import LIBRARIES, library_has, pipeline_module, pipeline_module_has, tied_weights
from porter.core.plan import ComponentPlan, Layout, Status
from porter.core.pointers import pointers
from porter.core.risks import unusual
from porter.core.sizes import parameters_by_size
from porter.core.source import Source
from porter.core.survey import Survey, source_of
from porter.core.weights import Read, WeightSet, shared_tensors, totals

MAX_ENTRIES = 5000  # of one config; the longest have some hundreds
UNLIKE = 0.5  # below this share of tensor names a file is not of the class that it is said to be


def component(
    source: Source,
    found: Survey,
    name: str,
    library: str | None,
    class_name: str | None,
    *,
    config: dict[str, Any],
    layout: Layout,
    weights: WeightSet | None = None,
    read: Read | None = None,
    files: tuple[str, ...] = (),
    note: str = "",
    recipe: str | None = None,
    **more: Any,
) -> ComponentPlan:
    """One component, complete but for what only its caller knows (`more`); warns of whatever is odd.

    Args:
        weights, read: its weight files and their headers; None where it has none.
        files: its files where it has no weights.
        recipe: the recipe that takes its layout, where its tensors told it; default the component's usual one.
    """
    if len(config) > MAX_ENTRIES:
        raise BadInputError(
            f"{name}: its config is none of a model", expected=f"at most {MAX_ENTRIES} entries", found=f"{len(config)}",
            hint="repair or download it again",
        )  # fmt: skip
    known = known_component(found.family, name, class_name)
    code = custom_code(source, name, library, class_name, config)
    header = read.header if read else None
    told = companions_of(header) if header is not None else None
    packed = quantisation(config) or (told.quantised if told else None)
    if packed:
        found.warnings.append(f"{name}: quantised ({packed}); recipes do not take it")
    status: Status = judge(found, name, library, class_name, layout, known, code=code, quantised=bool(packed))
    if header is not None and told and told.factors > len(header) // 2:
        found.warnings.append(f"{name}: {told.factors} of {len(header)} tensors are factors of a LoRA, no model's own")
        status = "port"
    plain = told.plain if told and layout == "diffusers" else {}
    _contradictions(found, name, library, class_name, config, plain)
    count, dtypes = totals(header.values()) if header is not None else (None, {})
    if weights:
        files = weights.files
        if weights.missing:
            lost = ", ".join(map(str, weights.missing[:8])) + (" …" if len(weights.missing) > 8 else "")
            found.warnings.append(f"{name}: shards {lost} are missing")
        if weights.variant:
            found.warnings.append(f"{name}: only the variant {weights.variant} is here")
    absent = pointers(source, files)
    by_config = None
    if config and not packed and (absent or layout == "unknown"):
        by_config = _count_by_config(known, class_name, config)
        if by_config is None:
            by_config = _count_by_config(known, class_name, full_config(library, class_name, config))
    if absent:
        what = "weights" if weights else ", ".join(file.rpartition("/")[2] for file in absent[:3])
        note = note if "not fetched" in note else "; ".join(filter(None, (f"{what} not fetched (Git LFS)", note)))
        fit = parameters_by_size(class_name or "", sum(source.files[file].size for file in files), config)
        if by_config is not None and _count_by_config(known, class_name, config) is None:
            # The class's defaults fill the config: they are believed where the size agrees.
            size = sum(source.files[file].size for file in files)
            by_config = by_config if any(abs(size - by_config * each) < size / 100 for each in (1, 2, 4)) else None
        if fit and not packed and by_config in (None, fit[0]):
            count, note = fit[0], f"{note}; parameters by its size"
            more.setdefault("model", fit[1])
        elif by_config is not None:
            count, note = by_config, f"{note}; parameters by its config"
    elif by_config is not None:
        count, note = by_config, "; ".join(filter(None, (note, "no weights here; parameters by its config")))
    if header is not None:
        found.headers[name] = header
        more.setdefault("model", _released(class_name, header) if layout == "diffusers" else None)
    built = ComponentPlan(
        name=name,
        library=library,
        class_name=class_name,
        status=status,
        layout=layout,
        files=tuple(files),
        bytes=sum(source.files[file].size for file in files),
        parameters=count,
        dtypes=dtypes,
        recipe=(recipe or known.recipe) if known and status == "convert" else None,
        config=config,
        note=note,
        custom_code=code,
        quantised=packed,
        **more,
    )
    tied = _tied(built, header, read.metadata if read else {}) if header else ()
    odd = unusual(config, source_of(built)) if not code else {}
    return built.replace(shared=tuple(tied), unusual={key: list(pair) for key, pair in odd.items()})


def known_component(family: Family | None, name: str, class_name: str | None) -> Component | None:
    """The family's component of this name and class; any family's where the pipeline itself is unknown."""
    for candidate in (family,) if family else families().values():
        for part in candidate.components:
            if class_name in part.class_names and (not family or part.name == name):
                return part
    return None


def judge(
    found: Survey,
    name: str,
    library: str | None,
    class_name: str | None,
    layout: Layout,
    known: Component | None,
    *,
    code: str | None,
    quantised: bool,
) -> Status:
    """What can be done with a component; says why where it is not plain."""
    if layout == "unknown":
        what = "files" if weightless(class_name or "") else "weights"
        found.warnings.append(f"{name}: no {what} found for {class_name}")
    if code:
        where = (
            f"code of the repository ({code})" if code.endswith(".py") else f"not diffusers' or transformers' ({code})"
        )
        found.warnings.append(f"{name}: {library or '?'}.{class_name} is {where}; never run")
        return "port"
    if library is not None and library not in LIBRARIES and not pipeline_module_has(library, class_name or ""):
        found.warnings.append(f"{name}: the installed diffusers.pipelines.{library} has no class {class_name}")
        return "port"
    if (class_name or "").endswith("Pipeline") and layout == "diffusers":
        found.warnings.append(f"{name}: {class_name} is a pipeline, and its folder holds a component's weights")
        return "port"
    if layout == "unread":
        found.warnings.append(f"{name}: its weights are in no format that porter reads")
        return "port"
    if library in LIBRARIES and class_name:
        exists = library_has(library, class_name)
        if exists is None:
            found.warnings.append(f"{name}: {library} is not installed, so {class_name} was not looked up")
        elif not exists and known is None:
            found.warnings.append(f"{name}: the installed {library} has no class {class_name}")
            return "port"
    if layout == "unknown":
        return "missing"
    if layout == "original":
        return "convert" if known and known.recipe and not quantised else "port"
    return "native" if known and known.native_of(class_name) and not quantised else "reuse"


def custom_code(
    source: Source, name: str, library: str | None, class_name: str | None, config: Mapping[str, Any]
) -> str | None:
    """Where the repository's own code for a component is, if its class is no library's; it is never imported.

    `library` may be a module of diffusers' pipelines, which is no custom code.
    """
    if library is not None and library not in LIBRARIES and pipeline_module(library):
        return None
    mapped = config.get("auto_map")
    if isinstance(mapped, Mapping) and mapped:
        target = next((value for value in mapped.values() if isinstance(value, str)), None)
        file = f"{name}/{target.split('--')[-1].rpartition('.')[0].replace('.', '/')}.py" if target else None
        inside = file if file in source.files else None
        if inside or not (class_name and library in LIBRARIES and library_has(library, class_name)):
            return inside or f"auto_map {str(target)[:80]}"
    if library is None or library in LIBRARIES:
        return None
    module = library.replace(".", "/")
    for place in (f"{name}/{module}.py", f"{module}.py", f"{name}/{module}/__init__.py"):
        if place in source.files:
            return place
    return f"module {library}, not in the repository"


def quantisation(config: Mapping[str, Any]) -> str | None:
    """The method that a config's `quantization_config` names."""
    stated = config.get("quantization_config")
    if not stated:
        return None
    if not isinstance(stated, Mapping):
        return "unknown"
    method = str(stated.get("quant_method", "unknown"))
    bits = "nf4" if stated.get("bnb_4bit_quant_type") == "nf4" else "4-bit" if stated.get("load_in_4bit") else ""
    return f"{method} {bits}".strip()[:60]


def _contradictions(
    found: Survey,
    name: str,
    library: str | None,
    class_name: str | None,
    config: Mapping[str, Any],
    header: Mapping[str, TensorInfo],
) -> None:
    """Warns where index, config and tensors do not speak of the same class."""
    said = config.get("_class_name")
    if isinstance(said, str) and class_name and said != class_name and library == "diffusers":
        found.warnings.append(f"{name}: the index says {class_name}, its config says {said}")
    layouts = [known for known in architectures() if known.class_name == class_name]
    if not header or not layouts:
        return
    shapes = fold(shapes_of(header))
    best = max(
        len(shapes.keys() & known.templates.keys()) / len(shapes.keys() | known.templates.keys()) for known in layouts
    )
    if best < UNLIKE:
        found.warnings.append(f"{name}: its tensors are not those of {class_name}: {best:.0%} of the names agree")


def _released(class_name: str | None, header: Mapping[str, TensorInfo]) -> str | None:
    """The released model that the tensors of a class show, where its variants are known."""
    shapes = shapes_of(header)
    folded = fold(shapes)
    for known in architectures():
        theirs = known.class_name == class_name and known.layout.startswith(("diffusers", "transformers"))
        if theirs and (variant := known.variant(shapes, folded)):
            return variant.name
    return None


def _tied(part: ComponentPlan, header: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> list[str]:
    declared: Mapping[str, str] = {}
    if part.library == "transformers" and part.class_name and isinstance(part.config.get("model_type"), str):
        declared = tied_weights(part.class_name, part.config["model_type"])
    text = part.config.get("text_config")
    inner = text if isinstance(text, Mapping) else {}
    if not part.config.get("tie_word_embeddings", inner.get("tie_word_embeddings", True)):
        declared = {name: kept for name, kept in declared.items() if "lm_head" not in name}
    return shared_tensors(header, metadata, declared)


def _count_by_config(known: Component | None, class_name: str | None, config: dict[str, Any]) -> int | None:
    """Parameters that a config says a component has, where its recipe can tell; for weights that are not here."""
    if known is None or known.recipe is None or class_name != known.class_names[0]:  # the class that a recipe makes
        return None
    try:
        return sum(int(info.numel) for info in resolve(known.recipe).target_headers(config).values())
    except PorterError:  # a config that lacks something: the conversion will say what
        return None
