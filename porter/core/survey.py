"""Looking through a source: which pipeline it is, where each component's weights lie, and in which layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from porter.core.architectures import Guess, architectures
from porter.core.checkpoint import TensorInfo
from porter.core.defaults import ClassSource, call_source, class_source, config_source, with_kept_modules
from porter.core.errors import BadInputError, PorterError
from porter.core.family import Component, Family, families, resolve
from porter.core.layout import weightless
from porter.core.libraries import LIBRARIES, library_has, pipeline_module_has, tied_weights
from porter.core.plan import ComponentPlan, Layout, Status
from porter.core.port import MANIFEST, Port, is_manifest
from porter.core.risks import Part, Risk, risks_of_all, unusual
from porter.core.sizes import parameters_by_size
from porter.core.source import LocalSource, Source
from porter.core.weights import WEIGHT_SUFFIXES, Read, WeightSet, shared_tensors, totals

INDEX = "model_index.json"
MODULAR_INDEX = "modular_model_index.json"


@dataclass
class Survey:
    """What was found; `make_plan` turns it into a PortPlan.

    Attributes:
        headers: tensors by component, where a header could be had.
        near: the architectures nearest to a component, as far as they were asked for.
        settings: entries of the index that are no components.
        verdict: what parity said, where the source is a port.
        places: folders of several pipelines, where the source holds them.
    """

    pipeline_class: str | None = None
    family: Family | None = None
    components: list[ComponentPlan] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    headers: dict[str, Mapping[str, TensorInfo]] = field(default_factory=dict)
    near: dict[str, list[Guess]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    verdict: str | None = None
    places: tuple[str, ...] = ()

    def risks(self) -> list[Risk]:
        """What the components' own configs make likely to go wrong."""
        parts = [
            Part(part.name, part.class_name, part.config, source_of(part))
            for part in self.components
            if part.config and part.class_name and not part.custom_code
        ]
        call = call_source(self.pipeline_class) if self.pipeline_class else None
        return risks_of_all(parts, upcasts=call.upcasts_decoder if call else None)


def survey(source: Source) -> Survey:
    """Looks through `source`.

    Raises:
        BadInputError: nothing in it is a pipeline, a component or a known checkpoint.
    """
    from porter.core.loose import loose
    from porter.core.pipelines import modular, nested, pipeline

    for name in (INDEX, MODULAR_INDEX):
        if any(file.startswith(f"{name}/") for file in source.files):
            raise BadInputError(f"{name} is a folder", expected="a JSON file", hint=f"remove {name}/, or repair it")
    if INDEX in source.files:
        found = pipeline(source)
    elif MODULAR_INDEX in source.files:
        found = modular(source)
    else:
        found = nested(source) or loose(source)
    _evidence(source, found)
    return found


def _evidence(source: Source, found: Survey) -> None:
    """Whether the folder is a finished port, and what parity said of it."""
    if isinstance(source, LocalSource) and is_manifest(source.root / MANIFEST):
        if source.json(MANIFEST).get("direction") == "original":
            return
        found.verdict = Port.open(source.root).verdict()
        if found.verdict != "passed":
            found.warnings.append(f"parity of this port: {found.verdict}")


def source_of(part: ComponentPlan) -> ClassSource | None:
    """The class that will read a component's config, for its defaults; None for a config of the original code."""
    if part.layout == "original":
        return None
    if part.library == "transformers":
        model_type = part.config.get("model_type")
        found = config_source(model_type) if isinstance(model_type, str) else None
        return with_kept_modules(found, part.class_name or "", str(model_type)) if found else None
    return class_source(part.library, part.class_name) if part.library in LIBRARIES and part.class_name else None


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
    **more: Any,
) -> ComponentPlan:
    """One component, complete but for what only its caller knows (`more`); warns of whatever is odd.

    Args:
        weights, read: its weight files and their headers; None where it has none.
        files: its files where it has no weights.
    """
    known = known_component(found.family, name, class_name)
    code = custom_code(source, name, library, class_name, config)
    packed = quantisation(config)
    if packed:
        found.warnings.append(f"{name}: quantised ({packed}); recipes do not take it")
    status: Status = judge(found, name, library, class_name, layout, known, code=code, quantised=bool(packed))
    header = read.header if read else None
    count, dtypes = totals(header.values()) if header is not None else (None, {})
    if weights:
        files = weights.files
        if weights.missing:
            lost = ", ".join(map(str, weights.missing[:8])) + (" …" if len(weights.missing) > 8 else "")
            found.warnings.append(f"{name}: shards {lost} are missing")
        if weights.variant:
            found.warnings.append(f"{name}: only the variant {weights.variant} is here")
    if any(source.files[file].lfs_pointer for file in files):
        note = note if "not fetched" in note else "; ".join(filter(None, ("weights not fetched (Git LFS)", note)))
        if status in ("convert", "native"):
            count = _count_by_config(known, config)
        told = parameters_by_size(class_name or "", sum(source.files[file].size for file in files), config)
        if count is None and told and not packed:
            count, note = told[0], f"{note}; parameters by its size, which is that of {told[1]}"
            more.setdefault("model", told[1])
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
        recipe=known.recipe if known and status == "convert" else None,
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
    if code:
        found.warnings.append(f"{name}: {library or '?'}.{class_name} is code of the repository ({code}); never run")
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
        what = "files" if weightless(class_name or "") else "weights"
        found.warnings.append(f"{name}: no {what} found for {class_name}")
        return "missing"
    if layout == "original":
        return "convert" if known and known.recipe and not quantised else "port"
    return "native" if known and known.native and not quantised else "reuse"


def custom_code(
    source: Source, name: str, library: str | None, class_name: str | None, config: Mapping[str, Any]
) -> str | None:
    """Where the repository's own code for a component is, if its class is no library's; it is never imported.

    `library` may be a module of diffusers' pipelines, which is no custom code.
    """
    if library is not None and class_name and library not in LIBRARIES and pipeline_module_has(library, class_name):
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
    return f"module {library[:80]}, not in the repository"


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


def _released(class_name: str | None, header: Mapping[str, TensorInfo]) -> str | None:
    """The released model that the tensors of a class show, where its variants are known."""
    shapes = {name: info.shape for name, info in header.items()}
    for known in architectures():
        theirs = known.class_name == class_name and known.layout.startswith(("diffusers", "transformers"))
        if theirs and (variant := known.variant(shapes)):
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


def _count_by_config(known: Component | None, config: dict[str, Any]) -> int | None:
    """Parameters that a config says a component has, where its recipe can tell; for weights that are not here."""
    if known is None or known.recipe is None:
        return None
    try:
        return sum(int(info.numel) for info in resolve(known.recipe).target_headers(config).values())
    except PorterError:  # a config that lacks something: the conversion will say what
        return None


def leftovers(source: Source, found: Survey) -> None:
    """Weights that no component uses, and code: named, so that nothing is passed over in silence."""
    used = {file for part in found.components for file in part.files}
    folders = {part.name for part in found.components}
    spare: dict[str, int] = {}
    for name in source.files:
        if name.endswith(WEIGHT_SUFFIXES) and name not in used and name.split("/")[0] not in folders:
            spare[name] = source.files[name].size
    if spare:
        more = f" and {len(spare) - 4} more" if len(spare) > 4 else ""
        found.warnings.append(f"weights that no component uses: {', '.join(list(spare)[:4])}{more}")
    if code := [name for name in source.files if name.endswith(".py")]:
        more = " …" if len(code) > 3 else ""
        found.warnings.append(f"{len(code)} Python files of the repository are never run: {', '.join(code[:3])}{more}")
    if pointers := [name for name, info in source.files.items() if info.lfs_pointer and name in used]:
        size = sum(source.files[name].size for name in pointers)
        found.warnings.append(f"{len(pointers)} weight files are Git-LFS pointers ({size / 1e9:.1f} GB not fetched)")
