"""Recipes from a Python file that the user names with `--recipe`; nothing else of a user's is ever executed."""

from __future__ import annotations

import importlib.util
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from porter.core.errors import MissingError, PorterError, RecipeError, UsageError
from porter.core.recipe import Recipe

_HINT = "porter convert MODEL --recipe FILE.py -o PORT"
_SHAPE = 'RECIPE = Recipe(…), or RECIPES = {"<component>": Recipe(…)}'


@contextmanager
def users_own(recipe: Recipe) -> Iterator[None]:
    """While a user's recipe is asked or compiled: an error that nobody foresaw is the recipe's.

    Raises:
        RecipeError: instead of such an error.
    """
    try:
        yield
    except PorterError:
        raise
    except (Exception, SystemExit) as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise RecipeError(
            f"the recipe {recipe.name} does not run", expected=_SHAPE,
            found=f"{type(error).__name__}: {error} ({Path(frame.filename).name}:{frame.lineno})"[:300],
            hint="repair the file that --recipe names",
        ) from error  # fmt: skip


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
    except (Exception, SystemExit) as error:  # a file that exits must not end the command as if it had worked
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
