"""Packages that a case names as imported and empty."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from parity import stubs
from parity.foreign import record_elsewhere
from porter.core.errors import BadInputError, MissingError
from tests.parity.cases import write_case

REFERENCE = """
def Reference():
    from nowhere.registry import Registry, Base
    from nowhere import logging as log
    import neither.deep, apex
    MODELS = Registry("models")
    @MODELS.register_module(name="net")
    class Theirs(Net, Base):
        def forward(self, x):
            {0}
            return super().forward(x)
    log.info("built")
    assert not isinstance(MODELS, Base) and not issubclass(Theirs, Base) and Base in (Base, Net)
    return Theirs()
"""


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    """No stub outlives its test."""
    yield
    stubs._FINDER.names.clear()
    stubs._INNER.names.clear()
    for path in [p for p in sys.modules if p.partition(".")[0] in ("nowhere", "theirs")]:
        del sys.modules[path]


@pytest.mark.slow
def test_a_package_that_is_only_imported(tmp_path: Path) -> None:
    case = write_case(tmp_path, REFERENCE.format("pass"))
    with pytest.raises(MissingError) as caught:
        record_elsewhere(case)
    assert "stubs=('nowhere', 'neither')" in str(caught.value.hint)
    assert "no module nowhere, neither, apex" in str(caught.value) and "--shims=apex" in str(caught.value.hint)
    text = Path(case).read_text().replace("call=", "stubs=('nowhere', 'neither', 'apex', 'torch'), call=")
    Path(case).write_text(text)
    trace = record_elsewhere(case)
    assert "imported and empty: nowhere, neither, apex" in trace.meta["notes"]  # torch is there, and stays
    assert trace.events["forward/=.out.0"].noise > 0


def test_nothing_is_computed_with_it(tmp_path: Path) -> None:
    case = write_case(tmp_path, REFERENCE.format("x = Registry.scale(x)"))
    Path(case).write_text(Path(case).read_text().replace("call=", "stubs=('nowhere', 'neither', 'apex'), call="))
    with pytest.raises(BadInputError, match=r"nowhere.registry.Registry.scale is called with a tensor"):
        record_elsewhere(case)
    stubs.install(["nowhere"])
    thing = importlib.import_module("nowhere.deep").thing
    assert importlib.util.find_spec("nowhere") is None and importlib.util.find_spec("torch") is not None
    for wrong in (lambda: thing + torch.ones(1), lambda: torch.ones(1) * thing, lambda: torch.as_tensor(thing)):
        with pytest.raises((TypeError, RuntimeError, ValueError)):
            wrong()


def test_names_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="names packages"):
        stubs.install(["a b"])
    (tmp_path / "nowhere").mkdir()  # a folder without code is no package
    monkeypatch.syspath_prepend(str(tmp_path))
    assert stubs.install(["nowhere"]) == ["nowhere"] == stubs.install(["nowhere"])


def test_what_a_stand_in_lacks_is_empty_where_the_case_names_it(tmp_path: Path) -> None:
    """Its arithmetic stays the stand-in's."""
    uses = """
def Reference():
    from timm.data.augment import rand_augment
    from timm.models.layers import DropPath, create_conv2d
    class Theirs(Net):
        def forward(self, x):
            return DropPath(0.0)(super().forward({0}))
    rand_augment("rand-m9")
    return Theirs()
"""
    case = write_case(tmp_path, uses.format("x"))
    with pytest.raises(BadInputError, match=r"has no timm\.data") as caught:
        record_elsewhere(case, shims=["timm"])
    assert "stubs=('timm',)" in str(caught.value.hint)
    Path(case).write_text(Path(case).read_text().replace("call=", "stubs=('timm',), call="))
    trace = record_elsewhere(case, shims=["timm"])
    assert "imported and empty: timm" in trace.meta["notes"]
    Path(case).write_text(Path(case).read_text().replace("forward(x)", "forward(create_conv2d(x))"))
    with pytest.raises(BadInputError, match=r"timm\.models\.layers\.create_conv2d is called with a tensor"):
        record_elsewhere(case, shims=["timm"])


def test_a_module_of_a_package_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "theirs" / "utils").mkdir(parents=True)
    for file, text in (
        ("__init__.py", ""),
        ("utils/__init__.py", "SIZE = 3"),
        ("utils/log.py", "*options, last = __import__('sys').logger._options"),
        ("model.py", "from theirs.utils import SIZE, log\nlog.info('imported')"),
    ):
        (tmp_path / "theirs" / file).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(AttributeError):
        importlib.import_module("theirs.model")
    assert stubs.install(["theirs.utils.log"]) == ["theirs.utils.log"]
    assert importlib.import_module("theirs.model").SIZE == 3
