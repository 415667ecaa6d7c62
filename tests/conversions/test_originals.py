"""Original implementations against diffusers, as the cases of each family declare them."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

from conversions.publish import checkout_of, original_cases
from parity.casefile import compare_case_file
from parity.compare import DIFFERS, OVER
from parity.loading import load_case
from parity.named import Pinned, case_file
from parity.outcome import Options, reason_of
from parity.reference import commit_of
from porter.core.family import families

CASES = [case for family in families() for case in original_cases(family)]


def known_faults(case: str) -> str | None:
    """The module at which the two really part, by the `KNOWN` of the case's file."""
    spec = importlib.util.spec_from_file_location("known", case_file(case).partition(".py:")[0] + ".py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: str | None = getattr(module, "KNOWN", {}).get(case.partition(":")[2])
    return found


@pytest.mark.parametrize("case", CASES)
def test_a_case_is_found_by_name_and_says_what_it_runs(case: str) -> None:
    file = case_file(case)
    pinned = Pinned.of(file)
    assert load_case(file).name and len(pinned.commit) == 40 and pinned.repository.count("/") == 1


def test_every_file_of_cases_belongs_to_its_family() -> None:
    files = {path.relative_to(Path.cwd()) for path in Path("conversions").absolute().glob("*/original*.py")}
    assert files == {Path(m.replace(".", "/") + ".py") for f in families().values() for m in f.originals} != set()


@pytest.mark.slow
@pytest.mark.reference
@pytest.mark.filterwarnings("ignore")  # what the originals use is theirs to mend
@pytest.mark.skipif(not os.environ.get("PORTER_REFERENCES"), reason="PORTER_REFERENCES names no folder with checkouts")
@pytest.mark.parametrize("case", CASES)
def test_the_original_and_diffusers_compute_the_same(case: str) -> None:
    checkout = checkout_of(case)
    assert checkout is not None and commit_of(checkout) == Pinned.of(case_file(case)).commit
    (result,) = compare_case_file(case, None, Options(reference_repo=checkout, shims=())).components
    known = known_faults(case)
    if known is None:
        assert result.passed, reason_of(result)
    else:
        assert result.status in (DIFFERS, OVER) and result.guilty is not None
        assert result.guilty.candidate.endswith(known), reason_of(result)
