"""A model's code imported without what keeps it from running here: its assertions, its packages' `__init__`.

Stand-alone (the standard library only).
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.machinery import SourceFileLoader
from types import ModuleType
from typing import Any


def without_init(packages: Iterable[str]) -> None:
    """Make packages importable whose `__init__` is not run: outer ones before those inside.

    Raises:
        ModuleNotFoundError: there is no such package.
    """
    for name in packages:
        if name in sys.modules:
            continue
        spec = importlib.util.find_spec(name)
        if spec is None or spec.submodule_search_locations is None:
            raise ModuleNotFoundError(f"no package {name}, of which a case's `bare` speaks", name=name)
        module = sys.modules[name] = ModuleType(name, "Its `__init__` was not run: a case's `bare`.")
        module.__path__ = list(spec.submodule_search_locations)
        module.__spec__ = spec


@contextmanager
def without_asserts(wanted: bool = True) -> Iterator[None]:
    """What is imported inside the block has no assertions; nothing changes where that is not wanted."""
    before = SourceFileLoader.get_code

    def get_code(self: SourceFileLoader, fullname: str) -> Any:  # from the source: cached bytecode has them
        return compile(self.get_data(self.path), self.path, "exec", dont_inherit=True, optimize=1)

    if wanted:
        SourceFileLoader.get_code = get_code  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        SourceFileLoader.get_code = before  # type: ignore[method-assign]
