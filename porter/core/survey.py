"""Looking through a source: which pipeline it is, where each component's weights lie, and in which layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from porter.core.architectures import Guess
from porter.core.checkpoint import TensorInfo
from porter.core.defaults import ClassSource, call_source, class_source, config_source, with_kept_modules
from porter.core.errors import BadInputError
from porter.core.family import Family
from porter.core.libraries import LIBRARIES
from porter.core.plan import ComponentPlan, Extra
from porter.core.pointers import unfetched
from porter.core.port import MANIFEST, Port, is_manifest
from porter.core.risks import Part, Risk, risks_of_all
from porter.core.source import LocalSource, Source
from porter.core.units import several
from porter.core.weights import WEIGHT_SUFFIXES

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
        told: files that no component uses, and that a component's note names already.
        lacking: components whose conversion lacks something, with what it is.
        factors: whether what is here are factors of a LoRA.
        bases: released models that they may be for.
    """

    pipeline_class: str | None = None
    family: Family | None = None
    components: list[ComponentPlan] = field(default_factory=list)
    extras: list[Extra] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    headers: dict[str, Mapping[str, TensorInfo]] = field(default_factory=dict)
    near: dict[str, list[Guess]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    verdict: str | None = None
    places: tuple[str, ...] = ()
    told: set[str] = field(default_factory=set)
    lacking: dict[str, str] = field(default_factory=dict)
    factors: bool = False
    bases: tuple[str, ...] = ()

    def risks(self) -> list[Risk]:
        """What the components' own configs make likely to go wrong."""
        parts = [
            Part(part.name, part.class_name, part.config, source_of(part))
            for part in self.components
            if part.config and part.class_name and not part.custom_code
        ]
        call = call_source(self.pipeline_class) if self.pipeline_class else None
        encoders = [part for part in self.components if "encoder" in part.name.rpartition("/")[2]]
        whole = all(part.config and not part.custom_code for part in encoders)
        return risks_of_all(parts, upcasts=call.upcasts_decoder if call else None, whole=whole)


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
    if isinstance(source, LocalSource) and MANIFEST in source.files and is_manifest(source.root / MANIFEST):
        if source.json(MANIFEST).get("direction") != "diffusers":
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


def leftovers(source: Source, found: Survey) -> None:
    """Weights that no component uses, and code: named, so that nothing is passed over in silence."""
    used = {file for part in found.components for file in part.files}
    # What lies in a component's folder was looked at with it; a pipeline inside has named its own.
    within = tuple(f"{place}/" for place in found.places)
    folders = tuple(f"{part.name}/" for part in found.components) + within
    apart = [name for name in source.files if not name.startswith(within)]
    spare = [
        name for name in source.files
        if name.endswith(WEIGHT_SUFFIXES) and name not in used | found.told and not name.startswith(folders)
    ]  # fmt: skip
    if spare:
        more = f" and {len(spare) - 4} more" if len(spare) > 4 else ""
        found.warnings.append(f"weights that no component uses: {', '.join(spare[:4])}{more}")
    if code := [name for name in apart if name.endswith(".py")]:
        more = " …" if len(code) > 3 else ""
        are = "is" if len(code) == 1 else "are"
        said = f"{several(len(code), 'Python file')} of the repository {are} never run"
        found.warnings.append(f"{said}: {', '.join(code[:3])}{more}")
    if lacks := unfetched(source, [name for name in apart if name in used]):
        found.warnings.append(lacks)
