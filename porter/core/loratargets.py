"""Which modules a LoRA's factors change: its keys against the names of a pipeline's components, in every layout that a
recipe knows. A key that fits none is an error, with the nearest names or with the model that the file is for.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from porter.core.adapters import adapted
from porter.core.checkpoint import Header
from porter.core.errors import BadInputError, RecipeError, UsageError
from porter.core.family import Component, families, resolve
from porter.core.lora import Factor, LoraFile
from porter.core.lorakeys import ENCODERS, Place
from porter.core.lowrank import WEIGHT, Delta, Matrix, Term, carry
from porter.core.ops import Reshape
from porter.core.patterns import nearest
from porter.core.recipe import Config, Recipe, compile_recipe
from porter.core.tensorplan import TensorPlan
from porter.core.units import several
from porter.core.views import Shape

_INNER = "text_model."  # a level that text encoders have in some versions of their library, and not in others
_SHOWN = 4


@dataclass(frozen=True)
class Target:
    """A component that a LoRA may change.

    Attributes:
        component: its key in model_index.json.
        header: its tensors in the library's layout.
        plans: original layouts → that one.
        predicts: whether keys that name no component mean it.
    """

    component: str
    class_name: str
    header: Header
    plans: tuple[TensorPlan, ...] = ()
    predicts: bool = False

    @cached_property
    def layouts(self) -> tuple[_Layout, ...]:
        """The library's own layout, then the original ones."""
        return (_Layout(self.header, None), *(_Layout(plan.sources, plan) for plan in self.plans))


def original_plans(known: Component | None, config: Config, header: Header) -> tuple[TensorPlan, ...]:
    """The recipes of a component from its original layouts, compiled for its config.

    A layout that this config does not describe, or does not fit the component's tensors, is not among them.
    """
    plans = []
    for reference in known.layouts.values() if known is not None else ():
        recipe = resolve(reference)
        try:
            assert isinstance(recipe, Recipe)
            plans.append(compile_recipe(recipe, config, recipe.source_headers(config), header))
        except RecipeError:
            continue
    return tuple(plans)


def changes(file: LoraFile, targets: Sequence[Target], component: str | None = None) -> dict[str, dict[str, Delta]]:
    """Component → module → its change, in the library's layout; every factor of the file is in one of them.

    Args:
        component: the one that predicts, where a pipeline has several and the file does not say which.

    Raises:
        UsageError: there are several, and none is named; or none is called so.
        BadInputError: a key fits no module, two fit one, or a factor has another size than its weight.
    """
    predicting = [target.component for target in targets if target.predicts]
    if component is not None and component not in predicting:
        raise UsageError(
            f"the pipeline has no {component} that predicts", expected=" or ".join(predicting), found=component
        )
    found = _matched(file, targets, component)
    if lost := [factor for factor in file.factors if factor.stem not in found]:
        raise _unmatched(file, lost, targets)
    if component is None and len(predicting) > 1 and (open_ := [s for s, m in found.items() if not m.said]):
        raise UsageError(
            f"{file.path.name} does not say which of {' and '.join(predicting)} it changes", expected="one of them",
            found=open_[0], hint=f'name it: add(path, component="{predicting[0]}")',
        )  # fmt: skip
    chosen: dict[tuple[str, int], dict[str, Delta]] = defaultdict(dict)
    users: dict[tuple[str, str], Factor] = {}
    for factor in file.factors:
        match = found[factor.stem]
        layout = match.target.layouts[match.layout]
        first = users.setdefault((match.target.component, match.module), factor)
        if first is not factor:
            raise BadInputError(
                f"{file.path}: {first.stem} and {factor.stem} change the same weight", expected="one of them",
                found=f"{match.module} of {match.target.component} twice", hint="export the file again",
            )  # fmt: skip
        delta = _delta(file, factor, layout.shapes[match.module])
        chosen[match.target.component, match.layout][match.module] = delta
    done: dict[str, dict[str, Delta]] = {}
    for (name, number), deltas in chosen.items():
        plan = next(target for target in targets if target.component == name).layouts[number].plan
        done[name] = deltas if plan is None else carry(deltas, plan)
    return done


class _Match(NamedTuple):
    target: Target
    layout: int
    module: str
    said: bool  # whether the key says which component it is


class _Layout:
    """Names of the modules that have a weight, dotted and flat."""

    def __init__(self, header: Header, plan: TensorPlan | None) -> None:
        self.plan = plan
        self.shapes: dict[str, Shape] = {
            name.removesuffix(WEIGHT): info.shape
            for name, info in header.items()
            if name.endswith(WEIGHT) and len(info.shape) > 1
        }
        self.flat: dict[str, list[str]] = defaultdict(list)
        for module in self.shapes:
            self.flat[module.replace(".", "_")].append(module)

    def find(self, place: Place) -> str | None:
        """The module of a place; none where several are called so once their dots are gone."""
        inner = _INNER.replace(".", "_") if place.flat else _INNER
        for module in (place.module, place.module.removeprefix(inner), inner + place.module):
            if not place.flat and module in self.shapes:
                return module
            if place.flat and len(self.flat.get(module, ())) == 1:
                return self.flat[module][0]
        return None


def _matched(file: LoraFile, targets: Sequence[Target], component: str | None) -> dict[str, _Match]:
    """Stem → the module that it changes. Of a component's layouts the one is taken that most of the stems fit."""
    fits: dict[tuple[str, int], int] = defaultdict(int)
    originals = sum(any(place.original for place in factor.places) for factor in file.factors)
    for factor in file.factors:
        for target in targets:
            for number, layout in enumerate(target.layouts):
                fits[target.component, number] += any(
                    layout.find(place) is not None for place in _meant(factor, target, targets, component)
                )
    best: dict[str, int] = {}
    for target in targets:
        order = list(range(len(target.layouts)))
        if 2 * originals > len(file.factors):  # names that several layouts have: as writers of such files mean them
            order = [*order[1:], 0]
        best[target.component] = max(order, key=lambda number: fits[target.component, number])
    found: dict[str, _Match] = {}
    for factor in file.factors:
        ways: list[tuple[Place, _Match]] = []
        for target in targets:
            layout = target.layouts[best[target.component]]
            for place in _meant(factor, target, targets, component):
                if (module := layout.find(place)) is not None:
                    said = place.component is not None
                    ways.append((place, _Match(target, best[target.component], module, said)))
        ways.sort(key=lambda way: factor.places.index(way[0]))
        if len(ways) > 1 and ways[0][0].component == ENCODERS:  # two encoders have such a module: the sizes tell
            sized = [way for way in ways if _sized(factor, way[1])]
            ways = sized if len(sized) == 1 else []
        if ways:
            found[factor.stem] = ways[0][1]
    return found


def _meant(factor: Factor, target: Target, targets: Sequence[Target], component: str | None) -> list[Place]:
    """The readings of a factor's key that mean `target`."""
    predicting = [each.component for each in targets if each.predicts]
    names = [each.component for each in targets]
    found = []
    for place in factor.places:
        said = place.component
        if said == ENCODERS:  # where the one that the key numbers is none of the pipeline's
            own = next((other.component for other in factor.places if other.component != ENCODERS), None)
            means = target.component.startswith("text_encoder") and own not in names
        elif said is None or (component is not None and said in predicting):
            means = target.predicts and component in (None, target.component)
        else:
            means = said == target.component
        if means:
            found.append(place)
    return found


def _sized(factor: Factor, match: _Match) -> bool:
    shape = match.target.layouts[match.layout].shapes[match.module]
    return (factor.b.shape[0], math.prod(factor.a.shape[1:])) == (shape[0], math.prod(shape[1:]))


def _delta(file: LoraFile, factor: Factor, shape: Shape) -> Delta:
    """The change of one weight of `shape`.

    Raises:
        BadInputError: the factors are for a weight of another size.
    """
    a, b = factor.a, factor.b
    for info, want, have in ((a, shape[1:], a.shape[1:]), (b, shape[:1], b.shape[:1])):
        if _bare(have) != _bare(want):
            whole = [factor.rank, *want] if info is a else [*want, factor.rank]
            raise BadInputError(
                f"{file.path}: {info.name} does not fit its weight of shape {list(shape)}", expected=f"{whole}",
                found=f"{list(info.shape)}", hint="take a LoRA for a model of this size",
            )  # fmt: skip
    inner, outer = (factor.rank, *shape[1:]), (shape[0], factor.rank)
    pair = [Matrix(info.shape, info.name) for info in (a, b)]
    pair = [each if each.shape == want else each.through(Reshape(want, each.shape), want)
            for each, want in zip(pair, (inner, outer), strict=True)]  # fmt: skip
    return Delta(shape, (Term(pair[0], pair[1], factor.scale, stem=factor.stem),))


def _bare(shape: Shape) -> Shape:
    """A shape without the 1s at its end: a matrix may be stored as a convolution's kernel."""
    while len(shape) > 1 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _unmatched(file: LoraFile, lost: Sequence[Factor], targets: Sequence[Target]) -> BadInputError:
    """Says of a file that changes what no component has for which model it is, or which names are near."""
    near, share = adapted(name for factor in file.factors for name in (factor.a.name, factor.b.name))
    classes = {target.class_name for target in targets}
    others = [known for known in near if known.class_name not in classes]
    mine = ", ".join(f"{target.component} ({target.class_name})" for target in targets)
    count = f"{several(len(lost), 'key')} of {len(file.factors)} fit no module"
    if 2 * len(lost) > len(file.factors) and others and len(others) == len(near):
        titles = [f"{families()[k.family].title if k.family else k.component} ({k.class_name})" for k in others[:3]]
        return BadInputError(
            f"{file.path} is a LoRA for {' or '.join(titles)}", expected=f"one for {mine}",
            found=f"{count}, beginning with {lost[0].stem}; {share:.0%} of its names are that model's",
            hint="take a LoRA for the pipeline's model, or run it with that model",
        )  # fmt: skip
    lines = []
    for factor in lost[:_SHOWN]:
        likely = _likely(factor, targets)
        lines.append(f"{factor.stem}" + (f" (nearest: {', '.join(likely)})" if likely else ""))
    more = f"; and {len(lost) - _SHOWN} more" if len(lost) > _SHOWN else ""
    return BadInputError(
        f"{file.path}: {lost[0].stem} is no module of the pipeline", expected=f"modules of {mine}",
        found=f"{count}: {'; '.join(lines)}{more}",
        hint="take a LoRA for this very model; keys that fit nothing are never skipped",
    )  # fmt: skip


def _likely(factor: Factor, targets: Sequence[Target]) -> list[str]:
    place = factor.places[0]
    names: list[str] = []
    for target in targets:
        for layout in target.layouts if place in _meant(factor, target, targets, None) else ():
            names += layout.flat if place.flat else layout.shapes
    return nearest(place.module, names, 2)
