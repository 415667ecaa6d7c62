"""Fixtures that several rooms share."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest

from porter import builtin

# A runner may say how wide its own output is; what the commands print here goes to no terminal.
os.environ.pop("COLUMNS", None)

# A runner in the background of a shell ignores Ctrl-C, and so would every process that the tests stop with it.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The file that takes longest goes first: with two workers, neither is left alone with it at the end."""
    items.sort(key=lambda item: item.path.name != "test_wheel.py")


@pytest.fixture(scope="session")
def tiny_flux() -> Path:
    """The files of the embedded model, in the original layout. Read only."""
    found = builtin.locate("tiny-flux")
    assert found is not None
    return found


@pytest.fixture(scope="session")
def tiny_port(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model's port, converted once per session. Read only: tests that change it take `own_port`."""
    from porter.core.convert import convert

    output = tmp_path_factory.mktemp("session") / "tiny-flux-port"
    convert("builtin:tiny-flux", output)
    return output


@pytest.fixture
def own_port(tiny_port: Path, tmp_path: Path) -> Path:
    """A copy of the port that a test may change."""
    return Path(shutil.copytree(tiny_port, tmp_path / "port"))
