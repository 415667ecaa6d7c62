"""Fixtures of the runtime's tests."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.runtime.ports import write_port


@pytest.fixture(scope="session")
def bare_port(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A port folder to read; tests that change it copy it first."""
    return write_port(tmp_path_factory.mktemp("ports") / "tiny")


@pytest.fixture
def own_bare_port(bare_port: Path, tmp_path: Path) -> Path:
    """A copy of `bare_port` to damage."""
    return Path(shutil.copytree(bare_port, tmp_path / "port"))
