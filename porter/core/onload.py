"""On-load recipes: the layout on disk → a native module's own, while the weights are read.

A native model packs what its kernels want packed (q, k and v in one matrix); on disk the names stay the library's. The
rules name only what changes; every other tensor keeps its name, and the account is exact all the same. A rule's `shard`
says how tensor-parallel ranks share its targets.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from porter.core.checkpoint import Header
from porter.core.identity import same_names
from porter.core.patterns import Pattern
from porter.core.recipe import Config, Recipe, Rule, compile_recipe
from porter.core.tensorplan import TensorPlan

NATIVE = "native"
_VARIABLE = re.compile(r"\{([A-Za-z_]\w*)(?::([^{}]*))?\}")


def on_load(name: str, *rules: Rule, parameters: Callable[[Config], Mapping[str, int]] = lambda config: {}) -> Recipe:
    """The recipe diffusers → native of one model; rules that match nothing in a file do nothing."""
    return Recipe(name, "diffusers", NATIVE, rules, parameters=parameters)


def compile_on_load(
    recipe: Recipe | None, config: Mapping[str, Any], source: Header, target: Header | None = None
) -> TensorPlan:
    """`recipe` over the tensors of `source`, with every tensor that no rule takes under its own name.

    Args:
        recipe: what `on_load` made; None keeps every name.
        target: the module's own tensors; None: whatever the rules make.

    Raises:
        RecipeError: a tensor of either side is not accounted for exactly once, or has another shape.
    """
    rules = recipe.rules if recipe is not None else ()
    parameters = recipe.parameters(config) if recipe is not None else {}
    used, taken = [], set[str]()
    for rule in rules:
        found = list(Pattern(rule.sources[0]).find(source, parameters))
        if found:
            used.append(rule)
        for name, values in found:
            taken.add(name)
            taken.update(n for text in rule.sources[1:] for n in Pattern(text).fill_all(values, parameters))
    rest = same_names((name for name in source if name not in taken), "diffusers", NATIVE)
    name = recipe.name if recipe is not None else rest.name
    whole = Recipe(name, "diffusers", NATIVE, (*used, *rest.rules), parameters=lambda config: parameters)
    return compile_recipe(whole, config, source, target)


def on_disk(recipe: Recipe | None, config: Mapping[str, Any], names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Of each of a native module's tensors the names that it is made of on disk, in the rule's order."""
    parameters = recipe.parameters(config) if recipe is not None else {}
    rules = [(rule, [Pattern(_typed(text, rule.sources[0])) for text in rule.targets])
             for rule in (recipe.rules if recipe is not None else ())]  # fmt: skip
    found: dict[str, tuple[str, ...]] = {}
    for name in names:
        found[name] = (name,)
        for rule, patterns in rules:
            values = next((v for p in patterns if (v := p.match(name, parameters)) is not None), None)
            if values is not None:
                found[name] = tuple(n for text in rule.sources for n in Pattern(text).fill_all(values, parameters))
                break
    return found


def _typed(target: str, source: str) -> str:
    """A target pattern whose variables have the types that the source pattern gives them, so that it can be matched."""
    kinds = {name: kind for name, kind in _VARIABLE.findall(source) if kind}
    return _VARIABLE.sub(lambda found: f"{{{found[1]}:{kinds.get(found[1], 'int')}}}", target)
