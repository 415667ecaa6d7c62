"""Looking through a source: which pipeline it is, where each component's weights lie, and in which layout."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from porter.core.checkpoint import TensorInfo
from porter.core.defaults import class_source, config_source
from porter.core.errors import BadInputError, PorterError
from porter.core.family import Component, Family, Style, families, family_of_pipeline, resolve
from porter.core.layout import (
    LIBRARIES,
    WEIGHT_SUFFIXES,
    find_weights,
    highlights,
    library_has,
    missing_shards,
    weightless,
)
from porter.core.plan import ComponentPlan, Status
from porter.core.port import MANIFEST, Port, is_manifest
from porter.core.risks import Risk, risks_of
from porter.core.source import LocalSource, Source

INDEX = "model_index.json"
# Classes that rewrite or caption a prompt, or emit tokens one by one, before the first denoising step.
_AUTOREGRESSIVE = re.compile(r"ForConditionalGeneration$|ForCausalLM$|VLModel$|ImageTextToText")


@dataclass
class Survey:
    """What was found; `make_plan` turns it into a PortPlan."""

    pipeline_class: str | None = None
    family: Family | None = None
    style: Style = "Modular"
    style_reason: str = "standard text-to-image"
    components: list[ComponentPlan] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)
    is_port: bool = False

    def risks(self) -> list[Risk]:
        """What the components' own configs make likely to go wrong."""
        found = []
        for part in self.components:
            config = self.configs.get(part.name)
            if config is None or not part.class_name:
                continue
            model_type = config.get("model_type")
            if part.library == "transformers":
                source = config_source(model_type) if isinstance(model_type, str) else None
            else:
                source = class_source(part.library, part.class_name) if part.library in LIBRARIES else None
            found += risks_of(part.name, part.class_name, config, source)
        return found


def survey(source: Source) -> Survey:
    """Looks through `source`.

    Raises:
        BadInputError: nothing in it is a pipeline, a component or a known checkpoint.
    """
    from porter.core.loose import loose_files, one_component

    if INDEX in source.files:
        return _pipeline(source)
    if any(name.startswith(f"{INDEX}/") for name in source.files):
        raise BadInputError(f"{INDEX} is a folder", expected="a JSON file", hint=f"remove {INDEX}/, or repair it")
    if "config.json" in source.files and find_weights(source.files, "").files:
        return one_component(source)
    return loose_files(source)


def _pipeline(source: Source) -> Survey:
    index = source.json(INDEX)
    if not isinstance(index, dict) or not isinstance(index.get("_class_name"), str):
        raise BadInputError(f"{INDEX} names no pipeline class", expected="a `_class_name`", hint="is it a pipeline?")
    found = Survey(index["_class_name"])
    found.family = family_of_pipeline(index["_class_name"])
    entries = {name: value for name, value in index.items() if not name.startswith("_") and _is_entry(value)}
    if not entries:
        raise BadInputError(
            f"{INDEX} names no components", expected='entries such as "vae": ["diffusers", …]', hint="is it a pipeline?"
        )
    for name in index.keys() - entries.keys():
        if any(file.startswith(f"{name}/") for file in source.files):
            raise BadInputError(
                f"{INDEX} describes {name} badly, and its folder is here",
                expected=f'"{name}": ["library", "class"]',
                found=repr(index[name])[:80],
                hint=f"repair {INDEX}, or remove {name}/",
            )
    claimed: set[str] = set()
    for name, (library, class_name) in entries.items():
        if "/" in name or "\\" in name or name.startswith("."):
            raise BadInputError(f"{INDEX} names a component {name!r}", expected="a plain name", hint="repair it")
        if class_name is None:
            found.warnings.append(f"{name}: the pipeline leaves it out")
            continue
        found.components.append(_component(source, found, name, library, class_name, claimed))
    _style(found, source)
    leftovers(source, found)
    _evidence(source, found)
    return found


def _evidence(source: Source, found: Survey) -> None:
    """Whether the folder is a finished port, and what parity said of it."""
    if isinstance(source, LocalSource) and is_manifest(source.root / MANIFEST):
        if source.json(MANIFEST).get("direction") == "original":
            return
        found.is_port = True
        if (verdict := Port.open(source.root).verdict()) != "passed":
            found.warnings.append(f"parity of this port: {verdict}")


def _is_entry(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(item is None or isinstance(item, str) for item in value)


def _component(
    source: Source, found: Survey, name: str, library: str | None, class_name: str, claimed: set[str]
) -> ComponentPlan:
    """One entry of model_index.json: its files, its layout, and what can be done with it."""
    known = known_component(found.family, name, class_name)
    config_name = next((f"{name}/{file}" for file in ("config.json", "scheduler_config.json", "tokenizer_config.json",
                        "preprocessor_config.json") if f"{name}/{file}" in source.files), None)  # fmt: skip
    config = source.json(config_name) if config_name else {}
    if not isinstance(config, dict):
        raise BadInputError(f"{config_name} is not a JSON object", hint="repair or download it again")
    found.configs[name] = config
    weights = find_weights(source.files, name)
    files, layout, note = weights.files, "diffusers", ""
    if weights.pickled:
        found.warnings.append(f"{name}: only pickled weights ({files[0]}); they are never unpickled, no header is read")
    if weights.variant:
        found.warnings.append(f"{name}: only the variant {weights.variant} is here")
    if weights.other_variants:
        note = "also as " + ", ".join(variant or "plain" for variant in weights.other_variants)
    if lost := missing_shards(files):
        found.warnings.append(f"{name}: shards {', '.join(map(str, lost))} are missing")
    originals = _originals(source, known, claimed) if found.family else ()
    if not files and originals:
        files, layout = originals, "original"
        claimed.update(originals)
    elif files and originals:
        claimed.update(originals)
        found.warnings.append(f"{name}: {originals[0]} is here in the original layout as well; {name}/ is used")
    if not files:
        layout = "none" if weightless(class_name) else "unknown"
        files = tuple(file for file in source.files if file.startswith(f"{name}/")) if layout == "none" else ()
    if quantised := config.get("quantization_config"):
        method = quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else "unknown"
        found.warnings.append(f"{name}: quantised ({method}); recipes do not take it")
    status = judge(found, name, library, class_name, layout, known, quantised=bool(config.get("quantization_config")))
    parameters, dtypes = measure(source, files) if layout in ("original", "diffusers") else (None, {})
    if parameters is None and files and status in ("convert", "native"):
        parameters = _count_by_config(known, config)
    return ComponentPlan(
        name=name,
        library=library,
        class_name=class_name,
        status=status,
        layout=layout,  # type: ignore[arg-type]
        files=tuple(files),
        bytes=sum(source.files[file].size for file in files),
        parameters=parameters,
        dtypes=dtypes,
        recipe=known.recipe if known and status == "convert" else None,
        config=highlights(config),
        note=note or pointer_note(source, files),
    )


def known_component(family: Family | None, name: str, class_name: str | None) -> Component | None:
    """The family's component of this name and class; any family's where the pipeline itself is unknown."""
    candidates: Iterable[Family] = (family,) if family else families().values()
    for candidate in candidates:
        for part in candidate.components:
            if class_name in part.class_names and (not family or part.name == name):
                return part
    return None


def judge(
    found: Survey,
    name: str,
    library: str | None,
    class_name: str,
    layout: str,
    known: Component | None,
    *,
    quantised: bool,
) -> Status:
    if library not in LIBRARIES:
        found.warnings.append(f"{name}: {library}.{class_name} is code of the repository; porter never runs it")
        return "port"
    exists = library_has(library, class_name)
    if exists is None:
        found.warnings.append(f"{name}: {library} is not installed, so {class_name} was not looked up")
    elif not exists and known is None:
        found.warnings.append(f"{name}: the installed {library} has no class {class_name}")
        return "port"
    if layout == "unknown":
        found.warnings.append(f"{name}: no weights found for {class_name}")
        return "missing"
    if layout == "original":
        return "convert" if known and known.recipe and not quantised else "port"
    return "native" if known and known.native and not quantised else "reuse"


def _originals(source: Source, known: Component | None, claimed: set[str]) -> tuple[str, ...]:
    """The file at the root that is `known` in its original layout: named like it, and with its tensor names."""
    if known is None or not known.recipe:
        return ()
    roots = [name for name in source.files if "/" not in name and name not in claimed and known.names_file(name)]
    for name in sorted(roots, key=lambda name: _pattern_rank(known, name)):
        if source.files[name].lfs_pointer or known.detects(source.header(name)[0]):
            return (name,)
    return ()


def _pattern_rank(known: Component, name: str) -> tuple[int, str]:
    from fnmatch import fnmatchcase

    return next(i for i, pattern in enumerate(known.original_files) if fnmatchcase(name.lower(), pattern)), name


def measure(source: Source, files: Iterable[str]) -> tuple[int | None, dict[str, int]]:
    """(parameters, bytes per dtype) from the headers of `files`; (None, {}) where one of them cannot be read."""
    names = list(files)
    if any(source.files[name].lfs_pointer or not name.endswith((".safetensors", ".sft")) for name in names):
        return None, {}
    with ThreadPoolExecutor(max_workers=8 if source.kind == "hub" else 1) as pool:
        headers = list(pool.map(lambda name: source.header(name)[0], names))
    return totals(info for header in headers for info in header.values())


def totals(tensors: Iterable[TensorInfo]) -> tuple[int, dict[str, int]]:
    """(parameters, bytes per dtype) of some tensors."""
    sizes: Counter[str] = Counter()
    count = 0
    for info in tensors:
        sizes[info.dtype] += info.end - info.begin
        count += info.numel
    return count, dict(sizes.most_common())


def _count_by_config(known: Component | None, config: dict[str, Any]) -> int | None:
    """Parameters that a config says a component has, where its recipe can tell; for weights that are not here."""
    if known is None or known.recipe is None:
        return None
    try:
        return sum(int(info.numel) for info in resolve(known.recipe).target_headers(config).values())
    except PorterError:  # a config that lacks something: the conversion will say what
        return None


def pointer_note(source: Source, files: Iterable[str]) -> str:
    return "weights not fetched (Git LFS)" if any(source.files[name].lfs_pointer for name in files) else ""


def _style(found: Survey, source: Source) -> None:
    """The table of pipeline styles: the first row that holds."""
    classes = [part.class_name or "" for part in found.components]
    own_code = [part.name for part in found.components if part.library not in LIBRARIES]
    talking = next((name for name in classes if _AUTOREGRESSIVE.search(name)), None)
    if found.family:
        found.style, found.style_reason = found.family.style, found.family.style_reason
    elif talking:
        found.style, found.style_reason = "Hybrid", f"{talking} captions or emits tokens before denoising"
    elif own_code:
        found.style, found.style_reason = "Hybrid", f"custom steps: {', '.join(own_code)} is code of the repository"
    elif kin := next(
        (f for f in families().values() for p in f.components if p.native and set(p.class_names) & set(classes)), None
    ):
        found.style, found.style_reason = "Modular", f"a variant of {kin.title}: callbacks only"
    else:
        found.style, found.style_reason = "Modular", "standard text-to-image or -video: encoders, denoiser, decoder"


def leftovers(source: Source, found: Survey) -> None:
    """Weights that no component uses, and code: named, so that nothing is passed over in silence."""
    used = {file for part in found.components for file in part.files}
    folders = {part.name for part in found.components}
    rest = [
        name
        for name in source.files
        if name.endswith(WEIGHT_SUFFIXES) and name not in used and name.split("/")[0] not in folders
    ]
    if rest:
        more = f" and {len(rest) - 4} more" if len(rest) > 4 else ""
        found.warnings.append(f"weights that no component uses: {', '.join(rest[:4])}{more}")
    if code := [name for name in source.files if name.endswith(".py")]:
        found.warnings.append(f"{len(code)} Python files of the repository are never run: {', '.join(code[:3])}")
    if pointers := [name for name, info in source.files.items() if info.lfs_pointer and name in used]:
        size = sum(source.files[name].size for name in pointers)
        found.warnings.append(f"{len(pointers)} weight files are Git-LFS pointers ({size / 1e9:.1f} GB not fetched)")
    if gate := source.declared.get("gated"):
        found.warnings.append(f"gated repository ({gate}): its terms hold for every port of it")
