"""Where formulas of memory are found, and how a config reaches them.

A formula stands in `conversions/<family>/` or `conversions/common/<component>/`, in a file whose name ends in
`memory.py`, under its class's name in `FORMULAS`. Which file, is told from the files' text; only that one is imported.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from porter.core.compression import LARGEST
from porter.core.workload import Workload

Formula = Callable[[Mapping[str, Any], Workload], int]
# (config, workload) -> parameters of a class that stay in float32 when it is loaded in the workload's dtype.
Kept = Callable[[Mapping[str, Any], Workload], int]
LONGEST = 4096  # entries of a list or a table in a config


@cache
def formula_of(class_name: str) -> Formula | None:
    """The formula of a class, from the one module of the catalogue that names it; None where there is none."""
    found: Formula | None = _table(class_name, "FORMULAS").get(class_name)
    return found


def kept_of(class_name: str) -> Kept | None:
    """What stays in float32 of a class, from the same module (`KEPT`); None where nothing does, or nothing is known."""
    found: Kept | None = _table(class_name, "KEPT").get(class_name)
    return found


def _table(class_name: str, name: str) -> Mapping[str, Any]:
    """The table `name` of the module whose source names a class; it alone is imported."""
    wanted = f'"{class_name}":'.encode()
    for module, text in module_sources():
        if wanted in text:
            table: Mapping[str, Any] = getattr(importlib.import_module(module), name, {})
            return table
    return {}


@cache
def module_sources() -> tuple[tuple[str, bytes], ...]:
    """(module name, source) of every file of formulas, without importing any."""
    spec = find_spec("conversions")
    root = Path(next(iter(spec.submodule_search_locations))) if spec and spec.submodule_search_locations else None
    files = [] if root is None else sorted([*root.glob("*/*memory.py"), *root.glob("common/*/memory.py")])
    return tuple(
        ("conversions." + ".".join(file.relative_to(root).with_suffix("").parts), file.read_bytes())
        for file in files
        if root is not None
    )


def facts_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config's values as formulas may compute with them.

    Raises:
        ValueError: a number too large to be meant, or lists too long or too deep.
    """
    return {key: _fact(value) for key, value in config.items()}


class _Text(str):
    """A config's string, which no formula multiplies into gigabytes."""

    def __mul__(self, other: Any) -> Any:
        raise TypeError("a string where a number belongs")

    __rmul__ = __mul__


class _Row(tuple[Any, ...]):
    """A config's list, which no formula multiplies into gigabytes."""

    def __mul__(self, other: Any) -> Any:
        raise TypeError("a list where a number belongs")

    __rmul__ = __mul__


def _fact(value: Any, depth: int = 0) -> Any:
    if isinstance(value, int | float) and not abs(value) <= LARGEST * LARGEST:
        raise ValueError("a number that no model has")
    if isinstance(value, str):
        return _Text(value)
    if isinstance(value, list | tuple):
        if len(value) > LONGEST or depth > 4:
            raise ValueError("a list that no model has")
        return _Row(_fact(each, depth + 1) for each in value)
    if isinstance(value, Mapping):
        if len(value) > LONGEST or depth > 4:
            raise ValueError("a table that no model has")
        return {key: _fact(each, depth + 1) for key, each in value.items()}
    return value
