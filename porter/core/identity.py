"""The recipe that changes no name: a component taken out of a file that holds several, or put into one file."""

from __future__ import annotations

import re
from collections.abc import Iterable

from porter.core.checkpoint import ANY, Header, specs
from porter.core.recipe import Config, Recipe, Rule

NAME = "same-names"
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
    """The same, which also knows the tensors of both sides: those of `header`."""
    recipe = same_names(header, source_layout, target_layout)
    shapes = {name: info.shape for name, info in header.items()}

    def headers(config: Config, dtype: str = ANY) -> Header:
        return specs(shapes, dtype)

    return Recipe(
        recipe.name, source_layout, target_layout, recipe.rules, source_headers=headers, target_headers=headers,
        infer_config=recipe.infer_config,
    )  # fmt: skip
