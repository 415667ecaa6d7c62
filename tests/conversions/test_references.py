"""What the original code computed, against a port of the same weights: drawn, converted by the engine, run."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conversions.publish import drawn_cases, port_of
from conversions.record_reference import MAX_BYTES, Original, changed_files, record_original
from parity.case import ComponentCase
from parity.component import ComponentResult, compare_component
from parity.run import alignment_of
from parity.trace import Trace
from porter.core.convert import convert
from porter.core.errors import UsageError

REFERENCES = os.environ.get("PORTER_REFERENCES")


def _originals(family: str) -> dict[str, Original]:
    return {o.name: o for o in importlib.import_module(f"conversions.{family}.record").ORIGINALS}


CASES = drawn_cases()
every = pytest.mark.parametrize(
    ("family", "case"), CASES, ids=lambda value: getattr(value, "trace", Path(str(value))).stem
)


@every
def test_the_port_computes_what_the_original_computed(family: str, case: ComponentCase, tmp_path: Path) -> None:
    port = port_of(family, case, tmp_path)
    trace = Trace.open(case.trace)
    for candidate in case.candidates:
        alignment = alignment_of(case, port, candidate.on_load)
        result = ComponentResult(case.component, "trace", candidate.name, "")
        compare_component(candidate.load(port), candidate, trace, alignment, result, step_names=case.output_step)
        bad = [f"{v.name}: {v.status} {v.max_abs:.2e} {v.note}" for v in result.verdicts if not v.passed][:8]
        assert result.passed, (result.status, result.reason, result.guilty, bad, result.unused, result.unwatched)
        assert result.counts["compared"] > 10 and not result.counts["missing"], result.counts
        assert not result.warnings, "weights at zero or one hide faults"
    with pytest.raises(UsageError, match="nothing to convert"):  # what is converted stays as it is
        convert(port, tmp_path / "again")
    assert not (tmp_path / "again").exists()


@every
def test_a_trace_is_small_and_says_where_it_comes_from(family: str, case: ComponentCase) -> None:
    meta = Trace.open(case.trace).meta
    originals = _originals(family)
    original = originals[case.trace.stem]
    assert case.trace.stat().st_size <= MAX_BYTES
    assert meta["reference"]["commit"] == original.commit and original.repository in meta["reference"]["repository"]
    assert set(meta["reference"]["files"]) == set(original.files)
    assert json.dumps(meta["config"]) == json.dumps(dict(original.config))


@pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")
def test_what_is_not_as_its_commit_has_it_is_found(tmp_path: Path) -> None:
    """A trace names a commit; a file changed since would make that a lie."""
    original = replace(next(iter(_originals("dit").values())), files=("models.py", "sub/kept.py", "new.py"))
    (tmp_path / "sub").mkdir()
    for name in original.files[:2]:
        (tmp_path / name).write_text(f"# {name}\n")
    who = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    alone = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull}
    for words in (("init", "-q"), ("add", "."), (*who, "commit", "-q", "-m", "first")):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True, env=alone)
    assert changed_files(replace(original, files=original.files[:2]), tmp_path) == []
    (tmp_path / "models.py").write_text("# other\n")
    (tmp_path / "new.py").write_text("# new\n")
    assert changed_files(original, tmp_path) == ["models.py", "new.py"]


@pytest.mark.reference
@pytest.mark.filterwarnings("ignore")  # what the originals use is theirs to mend
@pytest.mark.skipif(not REFERENCES, reason="PORTER_REFERENCES names no folder with checkouts")
@every
def test_the_committed_trace_is_what_the_original_computes(family: str, case: ComponentCase) -> None:
    originals = _originals(family)
    original = originals[case.trace.stem]
    checkout = Path(str(REFERENCES)) / original.repository.rpartition("/")[2]
    committed = Trace.open(case.trace)
    fresh = Trace.of(record_original(original, family, checkout, committed.meta["seed"]))
    assert list(fresh.events) == list(committed.events)
    for key in committed.events:
        torch.testing.assert_close(fresh.value(key).high, committed.value(key).high, rtol=0, atol=1e-9)
