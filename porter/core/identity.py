"""The recipe that changes no name: a component taken out of a file that holds several, or put into one file."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from porter.core.architectures import SURE, architectures, guesses, shapes_of, template
from porter.core.checkpoint import ANY, Header, floating, spec
from porter.core.errors import RecipeError
from porter.core.recipe import Config, Recipe, Rule

NAME = "same-names"
_ALIKE = 6  # templates, or places of one, from which on what they have in common is taken for a rule
_SHOWN = 4  # faults that an error names
_INDEX = re.compile(r"(?:(?<=\.)|^)(?:0|[1-9]\d{0,8})(?=\.|$)")


def same_names(names: Iterable[str], source_layout: str, target_layout: str) -> Recipe:
    """A recipe with one rule for each template of `names`, whose sources and targets are called alike."""
    rules: dict[str, Rule] = {}
    for name in names:
        pattern, target, count = "", "", 0
        position = 0
        for found in _INDEX.finditer(name):
            variable = f"i{count}"
            pattern += name[position : found.start()] + "{" + variable + ":int}"
            target += name[position : found.start()] + "{" + variable + "}"
            position, count = found.end(), count + 1
        pattern, target = pattern + name[position:], target + name[position:]
        rules.setdefault(pattern, Rule(pattern, target, why="the same name"))
    return Recipe(
        NAME, source_layout, target_layout, tuple(rules.values()), infer_config=lambda header, config: dict(config)
    )


def for_header(header: Header, source_layout: str, target_layout: str) -> Recipe:
    """The same, which also knows the tensors of its source: those of `header`. Its class's own it does not know."""
    recipe = same_names(header, source_layout, target_layout)

    def headers(config: Config, dtype: str = ANY) -> Header:
        return {name: spec(dtype if floating(info.dtype) else info.dtype, info.shape, name)
                for name, info in header.items()}  # fmt: skip

    return Recipe(
        recipe.name, source_layout, target_layout, recipe.rules, source_headers=headers,
        infer_config=recipe.infer_config,
    )  # fmt: skip


def check_whole(what: str, header: Header) -> None:
    """Refuse tensors of a known class of which some are missing or odd; a recipe that keeps all names misses nothing.

    The class at its released size says which tensors are in equally many places: they are at any depth and width.

    Raises:
        RecipeError: a tensor is missing, is not like its siblings, or holds no weights.
    """
    shapes = shapes_of(header)
    best = next(iter(guesses(shapes, 1)), None)
    if best is None or best.score < SURE:
        return
    known = best.architecture.templates
    places: dict[str, list[str]] = defaultdict(list)
    for name in header:
        places[template(name)].append(name)
    lists: dict[str, dict[str, int]] = defaultdict(dict)
    for each, kinds in known.items():
        if "{}" in each and each in places:
            lists[each[: each.index("{}")]][each] = sum(count for count, _ in kinds)
    like = best.architecture.class_name, best.architecture.layout
    kin = [each for each in architectures() if (each.class_name, each.layout) == like]
    wrong = [f"{name} is missing" for name in best.missing if all(name in each.recorded for each in kin)]
    for stem, members in lists.items():
        wrong += _gaps(stem, members, places)
    for each, kinds in known.items():
        found = Counter(shapes[name] for name in places.get(each, ()))
        if len(kinds) == 1 and kinds[0][0] >= _ALIKE and len(found) > 1:
            usual = found.most_common(1)[0][0]
            odd = next(name for name in places[each] if shapes[name] != usual)
            wrong.append(f"{odd} has the shape {list(shapes[odd])}, its siblings {list(usual)}")
        numbers = [name for name in places.get(each, ()) if not floating(header[name].dtype)]
        wrong += [f"{name} is of {header[name].dtype}, which weights are not" for name in numbers]
    if wrong:
        more = f"; and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise RecipeError(
            f"{what}: its tensors are not those of a whole {best.architecture.class_name}",
            expected="the tensors of the class, in every block and in floating-point numbers",
            found="; ".join(wrong[:_SHOWN]) + more,
            hint="download or export the file again; of a model that is made so, give the rules with --recipe FILE.py",
        )  # fmt: skip


def _gaps(stem: str, members: Mapping[str, int], places: Mapping[str, Sequence[str]]) -> list[str]:
    """What a list of blocks lacks: a block between others, or a tensor that its siblings show to be in every block.

    Args:
        members: the list's templates, with how often the released model has each.
    """
    if len(members) < _ALIKE:
        return []
    at = {each: Counter(int(name[len(stem) :].split(".", 1)[0]) for name in places[each]) for each in members}
    blocks = {number for numbers in at.values() for number in numbers}
    hole = next(number for number in range(len(blocks) + 1) if number not in blocks)
    wrong = [f"{stem}{hole} is missing"] if hole < len(blocks) else []
    for count in dict.fromkeys(members.values()):
        alike = [each for each, often in members.items() if often == count]
        usual, votes = Counter(len(places[each]) for each in alike).most_common(1)[0]
        if len(alike) < _ALIKE or 2 * votes <= len(alike):
            continue
        if 2 * len(alike) > len(members):  # in every block once; so others are there twice
            alike += [each for each, often in members.items() if often > count and often % count == 0]
        for each in alike:
            if len(places[each]) != usual * members[each] // count:
                most = max(at[each].values())
                lacks = [each.replace("{}", str(number), 1) for number in sorted(blocks) if at[each][number] < most]
                wrong += [f"{name} is missing" for name in lacks]
    return wrong
