"""Original implementations against diffusers, as `conversions/<family>/original.py` declares them."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from types import ModuleType

import pytest

import conversions
from parity.case import Case
from parity.foreign import record_elsewhere
from parity.outcome import reason_of
from parity.own import compare_case
from parity.reference import commit_of

REFERENCES = os.environ.get("PORTER_REFERENCES")
FILES = sorted(Path(conversions.__file__).parent.glob("*/original.py"))


def declared() -> list[tuple[ModuleType, str]]:
    """Every case of every family's file."""
    modules = [importlib.import_module(f"conversions.{file.parent.name}.original") for file in FILES]
    return [(module, name) for module in modules for name, value in vars(module).items() if isinstance(value, Case)]


CASES = declared()


@pytest.mark.slow
@pytest.mark.reference
@pytest.mark.filterwarnings("ignore")  # what the originals use is theirs to mend
@pytest.mark.skipif(not REFERENCES, reason="PORTER_REFERENCES names no folder with checkouts")
@pytest.mark.parametrize(("module", "name"), CASES, ids=[f"{m.__name__.split('.')[1]}-{n}" for m, n in CASES])
def test_the_original_and_diffusers_compute_the_same(module: ModuleType, name: str) -> None:
    """Passes, or differs at the module that `KNOWN` names, as a real difference between the two."""
    checkout = Path(str(REFERENCES)) / module.REPOSITORY.rpartition("/")[2]
    assert commit_of(checkout) == module.COMMIT
    repo = checkout / getattr(module, "SOURCE", "")
    trace = record_elsewhere(f"{module.__file__}:{name}", repo=repo, shims=())
    result = compare_case(getattr(module, name), trace=trace)
    known = getattr(module, "KNOWN", {}).get(name)
    if known is None:
        assert result.passed, reason_of(result)
    else:
        assert (result.status, result.guilty and result.guilty.candidate) == known, reason_of(result)
