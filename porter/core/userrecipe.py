"""Recipes from a Python file that the user names with `--recipe`; nothing else of a user's is ever executed."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path

from porter.core.errors import MissingError, UsageError
from porter.core.recipe import Recipe

_HINT = "porter convert MODEL --recipe FILE.py -o PORT"
_SHAPE = 'RECIPE = Recipe(…), or RECIPES = {"<component>": Recipe(…)}'


def read_recipes(path: Path, component: str | None = None) -> Mapping[str, Recipe]:
    """Runs the file and returns its recipes by component.

    Args:
        path: the Python file. It defines `RECIPES`, or one `RECIPE`.
        component: whom a lone `RECIPE` belongs to.

    Raises:
        MissingError: no such file.
        UsageError: it does not run, defines neither, or a lone RECIPE has no component.
    """
    whole = path.expanduser().absolute()
    if not whole.is_file():
        raise MissingError(f"no such recipe file: {path}", hint=_HINT)
    spec = importlib.util.spec_from_file_location("porter_user_recipe", whole)
    if spec is None or spec.loader is None:
        raise UsageError(f"{path} is no Python file", expected="a name that ends in .py", hint=_HINT)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UsageError(
            f"the recipe file {path} does not run", found=f"{type(error).__name__}: {error}", hint=_HINT
        ) from error
    named, lone = getattr(module, "RECIPES", None), getattr(module, "RECIPE", None)
    if named is None and isinstance(lone, Recipe):
        if component is None:
            raise UsageError(
                f"{path} holds one RECIPE, and several components are converted",
                hint='add --component NAME, or write RECIPES = {"NAME": RECIPE}',
            )
        return {component: lone}
    if isinstance(named, Mapping) and named and all(isinstance(item, Recipe) for item in named.values()):
        return dict(named)
    raise UsageError(f"{path} defines no recipes", expected=_SHAPE, hint=_HINT)
