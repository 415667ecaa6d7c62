"""Original-layout files: which component of which family their tensor names show, and whether a recipe takes them."""

from __future__ import annotations

from collections import Counter
from fnmatch import fnmatchcase
from functools import cache
from typing import NamedTuple

from porter.core.architectures import SURE, Architecture, architectures, guesses, shapes_of
from porter.core.family import Component, Family, families
from porter.core.libraries import LIBRARIES
from porter.core.plan import ComponentPlan
from porter.core.source import Source
from porter.core.weights import WeightSet, read_set, weight_sets

# Components that many families take as they are: finding one says nothing about the family.
ENCODERS = ("text_encoder", "image_encoder", "tokenizer", "feature_extractor", "image_processor", "scheduler", "safety")


class Known(NamedTuple):
    """An architecture with the family and component of the catalogue that it belongs to."""

    architecture: Architecture
    family: Family | None
    component: Component | None

    @property
    def recipe(self) -> str | None:
        """The recipe that takes this layout."""
        if is_dialect(self.architecture):
            return None
        part = self.component
        return recipe_for(self.family, part, self.architecture) if part else None


def recipe_for(family: Family | None, part: Component, found: Architecture) -> str | None:
    """The recipe of a family's component that takes an original layout, its own or one that it names of another's."""
    own = family is None or found.family in (None, family.name)
    return part.layouts.get(found.class_name if own else f"{found.family}:{found.class_name}")


def kept_recipe(family: Family | None, found: Architecture) -> str | None:
    """The recipe for a layout that is the class's own: of models that were released under the class's names.

    The family's; of a component that families share, the one recipe that any of them has. None where an original
    layout of other names is called as the class is.
    """
    names, homes = found.recorded.keys(), (None, found.family, family.name if family else None)
    for other in architectures():
        if other.class_name == found.class_name and other.layout != "diffusers" and other.family in homes:
            theirs = other.recorded.keys()
            if not is_dialect(other) and len(names & theirs) < SURE * len(names | theirs):
                return None
    part = family.component(found.component) if family else None
    if part is not None and (own := recipe_for(family, part, found)):
        return own
    if found.family is not None:
        return None
    parts = (part for each in families().values() for part in each.components)
    shared = {part.layouts[found.class_name] for part in parts if found.class_name in part.layouts}
    return shared.pop() if len(shared) == 1 else None


def is_dialect(known: Architecture) -> bool:
    """Whether a layout is a library's own in the words of another version, which that library still reads.

    Such a class may be called as the original's is; the original's recipe does not know its names.
    """
    return known.layout != "diffusers" and known.layout.startswith(LIBRARIES)


def original_of(
    source: Source, family: Family, known: Component, claimed: set[str]
) -> tuple[WeightSet, str | None] | None:
    """The weights outside any component's folder that are `known` in an original layout, and the recipe that takes it.

    They are found by name, then told by their tensors.
    """
    sets = [
        one for one in weight_sets(source.files, "") if not claimed & set(one.files) and _rank(known, one) is not None
    ]
    for one in sorted(sets, key=lambda one: (_rank(known, one), one.stem)):
        header = read_set(source, one).header
        if header is None:  # a Git-LFS pointer: its name is all there is, if no other component's is like it
            if _alone(one, known, family):
                return one, known.recipe
            continue
        best = next(iter(guesses(shapes_of(header), 1)), None)
        if best and best.score >= SURE and _is(best.architecture, family, known):
            return one, recipe_for(family, known, best.architecture)
    return None


def _alone(one: WeightSet, known: Component, family: Family) -> bool:
    """Whether no other component of the family has original files of this name (an all-in-one file is everybody's)."""
    return all(_rank(part, one) is None for part in family.components if part is not known)


def _rank(known: Component, one: WeightSet) -> int | None:
    base = one.files[0].rpartition("/")[2].lower()
    return next((i for i, pattern in enumerate(known.original_files) if fnmatchcase(base, pattern)), None)


def _is(found: Architecture, family: Family, known: Component) -> bool:
    if found.layout == "diffusers" or is_dialect(found) or found.component != known.name:
        return False
    return not known.layouts or recipe_for(family, known, found) is not None


def takes(role: Component, part: ComponentPlan) -> bool:
    """Whether a family's component has a recipe for the original layout that a part was told to be."""
    return bool(role.recipe and part.guesses and role.original_class == part.guesses[0]["class"])


def as_role(part: ComponentPlan, role: Component) -> ComponentPlan:
    """A part as that component of a family: in the original layout, its recipe and class are the component's too.

    A part that only has to be taken out of its file is converted where the component is of its class; with the
    component's own recipe if it has one, which knows what older files hold besides.
    """
    recipe = role.recipe if part.recipe and takes(role, part) else None
    if part.layout == "diffusers":
        part = part.replace(name=role.name, library=role.library)
        if part.status != "convert":
            return part
        if part.class_name not in role.class_names:
            note = f"{part.note}; {role.name} is of {' or '.join(role.class_names)} here"
            return part.replace(status="port", recipe=None, note=note)
        own = recipe if part.guesses[0]["layout"] == "diffusers" else None  # no dialect of it
        return part.replace(recipe=own or part.recipe)
    status = "port" if part.recipe and not recipe else part.status
    return part.replace(
        name=role.name, library=role.library, class_name=role.class_names[0], recipe=recipe, status=status
    )


def belongs(found: Architecture, prefer: Family | None = None) -> Known:
    """The family and component of an architecture.

    Of one that families share, or whose original layout `prefer`'s component takes too: `prefer`red. Else the family
    with a recipe for it, else none of them.
    """
    same = prefer.component(found.component) if prefer and found.layout != "diffusers" else None
    if same and recipe_for(prefer, same, found):
        return Known(found, prefer, same)
    homes = [family for family in families().values() if found.family in (None, family.name)]
    pairs = [(family, part) for family in homes for part in family.components if part.name == found.component]
    if found.layout == "diffusers":
        pairs = [(family, part) for family, part in pairs if found.class_name in part.class_names]
    elif not is_dialect(found):
        for family, part in pairs:
            if found.class_name in part.layouts:
                return Known(found, prefer if found.family is None and prefer else family, part)
    if found.family is None:  # shared by families: none of them owns it
        own = prefer.component(found.component) if prefer else None
        return Known(found, prefer if own else None, own if own and found.layout != "diffusers" else None)
    return next((Known(found, *pair) for pair in pairs), Known(found, families().get(found.family), None))


@cache
def named_by_class(class_name: str) -> Architecture | None:
    """The architecture that a class of this name writes: for configs whose weights were not fetched.

    Where classes of several families share the name, the family with most layouts of it.
    """
    found = [known for known in architectures() if known.class_name == class_name]
    homes = Counter(known.family for known in found)
    return max(found, key=lambda known: homes[known.family], default=None)


def named_by_file(name: str, prefer: Family | None = None) -> tuple[Family, Component] | None:
    """The component whose original files are called like `name`; `prefer`'s where other families' are too."""
    base = name.rpartition("/")[2].lower()
    found = [
        (family, part)
        for family in families().values()
        for part in family.components
        if any(fnmatchcase(base, pattern) for pattern in part.original_files)
    ]
    own = [pair for pair in found if pair[0] is prefer]
    return own[0] if own else found[0] if len(found) == 1 else None
