"""Which of many cases of one kind the quick suite runs; `make test-slow` runs the others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def some(cases: Iterable[Any], keep: int) -> list[Any]:
    """`cases` for parametrize: of every so many one stays quick, so that `keep` do; the others are slow ones."""
    every = list(cases)
    step = max(1, len(every) // keep)
    quick = set(range(0, len(every), step))
    return [case if i in quick else pytest.param(case, marks=pytest.mark.slow) for i, case in enumerate(every)]
