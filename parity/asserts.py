"""Assertions of a model's code left out: those that a run on the CPU or in another precision would only break.

Stand-alone (the standard library only).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import SourceFileLoader
from typing import Any


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
