"""The pytest plug-in: `assert_parity(case)` in a project's own tests, with a report where it is asked for.

    def test_port(assert_parity):
        assert_parity(case)                 # a parity.case.Case

`--parity-report DIR` writes each comparison's report there. Torch is imported when the fixture is first called.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--parity-report DIR`."""
    group = parser.getgroup("parity")
    group.addoption("--parity-report", metavar="DIR", default=None, help="write each parity comparison's report here")


@pytest.fixture
def assert_parity(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """`assert_parity(case, seed=0, gate=1e-3, level="module", …)` -> the comparison; fails the test unless it passes.

    Options are those of `parity.outcome.Options`.
    """

    def check(case: Any, **options: Any) -> Any:
        from parity.document import write
        from parity.outcome import Options
        from parity.own import run_case, verdict_text

        outcome = run_case(case, Options(**options))
        (result,) = outcome.components
        where = request.config.getoption("--parity-report")
        if where:
            name = re.sub(r"[^\w.-]+", "-", request.node.name)
            write(outcome, f"pytest {request.node.nodeid}", Path(where) / name)
        if not result.passed:
            pytest.fail(verdict_text(result), pytrace=False)
        return result

    return check
