"""The catalogue: one `Family` record per folder of `conversions/`, found by name and loaded lazily.

A record holds names and `"module:attribute"` strings only, so that listing the catalogue imports no recipe, no model
and no torch. Other distributions add families through the entry point group `porter.families`.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from porter.core.errors import BadInputError, UsageError

Style = Literal["Modular", "Hybrid"]
_GROUP = "porter.families"


@dataclass(frozen=True)
class Component:
    """One part of a pipeline, as its family knows it.

    Attributes:
        name: the component's key in `model_index.json` and its folder's name.
        library: the library of its class (`diffusers`, `transformers`).
        class_names: classes that implement it; the first is the one a conversion writes.
        original_files: file name patterns of the original layout, most specific first.
        original_name: the name that a restored original file gets when no manifest knows a better one.
        original_class: the class of the original layout that the recipe takes, as `layouts.json` calls it; of a layout
            that another family's `layouts.json` holds, `family:class`.
        recipe: `"module:attribute"` of the recipe original → diffusers, or None where nothing is converted.
        native: `"module:attribute"` of the native module for the first of the classes, or None where it is reused.
        recipes: (original class, recipe) of further layouts that a conversion takes; all write `class_names[0]`.
    """

    name: str
    library: str
    class_names: tuple[str, ...]
    original_files: tuple[str, ...] = ()
    original_name: str | None = None
    original_class: str | None = None
    recipe: str | None = None
    native: str | None = None
    recipes: tuple[tuple[str, str], ...] = ()

    def native_of(self, class_name: str | None) -> str | None:
        """The native module that stands for `class_name`, or None."""
        return self.native if class_name == self.class_names[0] else None

    @property
    def layouts(self) -> dict[str, str]:
        """Class of an original layout → the recipe that takes it, the usual one first."""
        usual = {self.original_class: self.recipe} if self.original_class and self.recipe else {}
        return usual | dict(self.recipes)


@dataclass(frozen=True)
class Family:
    """A model family: everything that shared code may know about it.

    Attributes:
        name: the folder's name under `conversions/`.
        title: what people call it.
        pipeline_classes: `_class_name`s of its `model_index.json`s, the plainest first.
        components: its parts, in the pipeline's order.
        pipeline: `"module:attribute"` of the runtime's entry class, or of several.
        native_pipelines: `_class_name`s that these run on native modules; the first needs no more than a prompt.
        bench: `"module:attribute"` of the runtime's benchmark cases.
        cases: `"module:attribute"` of the parity cases.
        originals: modules of the cases against the original code, `porter parity --case FAMILY[:NAME]`.
        reference: what it is proven against: files of its `reference/` folder, or empty (unproven).
        reference_code: the original code, with the commit that was recorded.
        style: pipeline style of the native port, and why.
        license_hint: what a user must know before publishing a port.
        shared_pipelines: pipeline classes of another family that this one's models name too.
        told_by: (component, config key, values) that show a shared pipeline to be this family's.
    """

    name: str
    title: str
    pipeline_classes: tuple[str, ...]
    components: tuple[Component, ...]
    pipeline: str | None = None
    native_pipelines: tuple[str, ...] = ()
    bench: str | None = None
    cases: str | None = None
    originals: tuple[str, ...] = ()
    reference: str | None = None
    reference_code: str | None = None
    style: Style = "Modular"
    style_reason: str = "standard text-to-image"
    license_hint: str = ""
    shared_pipelines: tuple[str, ...] = ()
    told_by: tuple[str, str, tuple[Any, ...]] = ("", "", ())

    def component(self, name: str) -> Component | None:
        """The component called `name`, or None."""
        return next((part for part in self.components if part.name == name), None)


def resolve(reference: str) -> Any:
    """The object that `"module:attribute"` names; its module is imported now."""
    module, _, attribute = reference.partition(":")
    found: Any = importlib.import_module(module)
    for part in attribute.split("."):
        found = getattr(found, part)
    return found


@cache
def families() -> dict[str, Family]:
    """Every known family by name: the folders of `conversions/`, then installed plug-ins.

    Raises:
        BadInputError: two records carry one name or pipeline class, or a record is no `Family`.
    """
    found: dict[str, Family] = {}
    for origin, reference in _records():
        family = resolve(reference)
        if not isinstance(family, Family):
            raise BadInputError(f"{origin} is no Family record", expected=f"{reference} to be a Family")
        for other in found.values():
            shared = set(family.pipeline_classes) & set(other.pipeline_classes)
            if family.name == other.name or shared:
                raise BadInputError(
                    f"two families are called {family.name} or claim {', '.join(sorted(shared)) or 'nothing else'}",
                    found=f"{other.name} ({other.title}) and {family.name} from {origin}",
                    hint="uninstall one of them",
                )
        found[family.name] = family
    return dict(sorted(found.items()))


def _records() -> list[tuple[str, str]]:
    """(where it comes from, `"module:attribute"`) of every record, without importing the families themselves."""
    catalogue = importlib.import_module("conversions")
    folders = [module.name for module in pkgutil.iter_modules(catalogue.__path__) if module.ispkg]
    local = [(f"conversions/{name}", f"conversions.{name}:FAMILY") for name in folders if name != "common"]
    return local + _plugins()


def _plugins() -> list[tuple[str, str]]:
    """Records of other distributions; importlib.metadata takes longer to load than to see that there are none."""
    places = [Path(entry) for entry in sys.path]
    texts = (text for place in places if place.is_dir() for text in place.glob("*.*-info/entry_points.txt"))
    if not any(place.is_file() for place in places) and not any(_GROUP.encode() in text.read_bytes() for text in texts):
        return []
    from importlib.metadata import entry_points

    return [(f"plug-in {point.name}", point.value) for point in entry_points(group=_GROUP)]


def family_of_pipeline(pipeline_class: str) -> Family | None:
    """The family whose `model_index.json` names `pipeline_class`, or None."""
    return next((family for family in families().values() if pipeline_class in family.pipeline_classes), None)


def family_named(name: str) -> Family:
    """The family called `name`.

    Raises:
        UsageError: there is none.
    """
    known = families()
    if name not in known:
        raise UsageError(f"no family is called {name!r}", expected=", ".join(known), hint="porter families")
    return known[name]


def proof(family: Family) -> list[str]:
    """The committed reference traces of `family`, as names inside its reference folder; empty means unproven."""
    if family.reference is None:
        return []
    folder = Path(importlib.import_module("conversions").__path__[0]).parent / family.reference
    return sorted(path.name for path in folder.glob("*.safetensors")) if folder.is_dir() else []
