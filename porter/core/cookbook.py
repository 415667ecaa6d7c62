"""The catalogue's recipes by name, and a recipe in words: its rules, and what the way back does with each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from porter.core.errors import RecipeError, UsageError
from porter.core.family import families, resolve
from porter.core.ops import Concat, Constant
from porter.core.patterns import nearest
from porter.core.recipe import Recipe, Rule
from porter.core.tensorplan import weakest


@dataclass(frozen=True)
class Known:
    """A recipe of the catalogue: where it stands, and which components of which families it is for."""

    recipe: Recipe
    reference: str
    users: tuple[str, ...]


def catalogue() -> dict[str, Known]:
    """Every recipe of the catalogue by its name."""
    users: dict[str, list[str]] = {}
    for family in families().values():
        for part in family.components:
            for reference in part.layouts.values():
                users.setdefault(reference, []).append(f"{family.name}/{part.name}")
    found: dict[str, Known] = {}
    for reference, names in users.items():
        recipe: Recipe = resolve(reference)
        found[recipe.name] = Known(recipe, reference, tuple(names))
    return dict(sorted(found.items()))


def recipes_named(name: str) -> list[Known]:
    """The recipe called `name`; or those of a family, or of `family/component`.

    Raises:
        UsageError: there is none.
    """
    known = catalogue()
    if name in known:
        return [known[name]]
    found = [each for each in known.values() if any(user == name or user.startswith(f"{name}/") for user in each.users)]
    if found:
        return found
    family = families().get(name.partition("/")[0])
    near = nearest(name, [user for each in known.values() for user in (*each.users, each.recipe.name)])
    raise UsageError(
        f"{family.title} has no recipe of this name" if family else f"no recipe is called {name!r}",
        expected="a recipe, a family that has some, or FAMILY/COMPONENT",
        found=f"{name} (nearest: {', '.join(near)})" if near else name, hint="porter recipe show",
    )  # fmt: skip


def in_words(recipe: Recipe) -> dict[str, Any]:
    """A recipe as JSON data: layouts, digest, and for each rule what it does, why, and what undoes it."""
    return {
        "name": recipe.name,
        "source_layout": recipe.source_layout,
        "target_layout": recipe.target_layout,
        "digest": recipe.digest,
        "keep_dtype": list(recipe.keep_dtype),
        "rules": [_rule(rule) for rule in recipe.rules],
    }


def _rule(rule: Rule) -> dict[str, Any]:
    return {
        "sources": list(rule.sources),
        "targets": list(rule.targets),
        "ops": ", ".join(op.describe() for op in rule.ops) or "rename",
        "inverse": _inverse(rule),
        "exactness": weakest(op.exactness for op in rule.ops),
        "when": rule.when,
        "why": rule.why,
    }


def _inverse(rule: Rule) -> str:
    """What the way back does, in words; the sizes it takes are those of the file at hand."""
    if any(isinstance(op, Constant) for op in rule.ops):
        return "checks that the tensor is that constant, and leaves it out"
    if any(op.exactness == "needs-base" for op in rule.ops):
        return "only with --base: the original's tensor is copied"
    words = []
    for op in reversed(rule.ops):
        if isinstance(op, Concat) and not op.sizes:
            words.append("split at the same places")
            continue
        try:
            words.append(op.inverse().describe())
        except (RecipeError, NotImplementedError, TypeError, IndexError):  # its sizes are those of a file at hand
            words.append(f"undo {op.describe()}")
    return ", ".join(words) or "rename back"


def line_of(rule: Mapping[str, Any]) -> str:
    """A rule of `in_words`, or of a plan's account, in one line."""
    sources, targets = " + ".join(rule["sources"]) or "nothing", ", ".join(rule["targets"]) or "nothing"
    when = f"  (if {rule['when']})" if rule.get("when") else ""
    return f"{sources} → {targets}: {rule['ops']}{when}"
