"""Jobs of 2 and 4 processes under the real torchrun, on the CPU: each way of sharing equals one process up to rounding.

A start costs seconds, so each job tries many modes (`worker.py`), and the tests read its results.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.runtime.parallel.worker import CASES, JOBS
from tests.runtime.ports import write_port

ROOT = Path(__file__).parents[3]
FLOOR = 1e-14  # of float64, times max(1, max |expected|)
MODEL = ["model", "model, uneven", "model, one pass", "lora", "block"]


def torchrun(processes: int, module: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, "-m", f"tests.runtime.parallel.{module}", *words],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module", params=JOBS)
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the job of so many processes found, by mode."""
    folder = tmp_path_factory.mktemp("job")
    write_port(folder / "port", heads=4)
    ended = torchrun(request.param, "worker", str(folder))
    assert ended.returncode == 0, ended.stderr[-4000:]
    found: dict[str, Any] = json.loads((folder / f"results{request.param}.json").read_text())
    return found


def facts(results: dict[str, Any], kind: str) -> dict[str, dict[str, Any]]:
    return {name: found for name, found in results.items() if name.endswith(f"{kind} facts")}


def test_every_mode_equals_one_process_up_to_rounding(results: dict[str, Any]) -> None:
    """In float64 the difference is a thousand times smaller, or nothing: it was rounding."""
    gaps = {name: found for name, found in results.items() if not name.endswith("facts")}
    settings = next(tried for tried in JOBS.values() if f"{tried[0]}: model" in gaps)
    sharing = sum(each.ulysses * each.ring > 1 for each in settings)
    assert len(gaps) == len(settings) * len(MODEL) + sharing * (len(CASES) + 1)
    for name, gap in gaps.items():
        assert gap["float32"] < 2e-6, name
        assert gap["float64"] <= max(gap["float32"] / 1000, FLOOR), name


def test_each_rank_packs_its_own_part_and_holds_no_more(results: dict[str, Any]) -> None:
    for name, found in facts(results, "tensor").items():
        assert found["wrong parts"] == [], name
        assert found["held"] < (0.56 if name.startswith("tp 4") else 0.71), name


def test_a_plain_cut_of_a_packed_projection_shows(results: dict[str, Any]) -> None:
    for name, found in facts(results, "tensor").items():
        assert found["plain"] > 0.01, name


def test_a_lora_beside_shared_weights_changes_the_prediction(results: dict[str, Any]) -> None:
    for name, found in facts(results, "tensor").items():
        assert found["lora"] > 0.01, name


def test_bfloat16_is_as_close_to_float32_as_in_one_process(results: dict[str, Any]) -> None:
    for name, found in facts(results, "tensor").items():
        ours, alone = found["bfloat16"]
        assert 0 < ours < 2 * alone, name


def test_what_cannot_be_shared_is_refused(results: dict[str, Any]) -> None:
    for found in facts(results, "tensor").values():
        assert "--quality exact" in found["exact"]
        assert "to_out cannot be shared" in found["odd"]
    for name, found in facts(results, "sequence").items():
        assert "attention mask cannot be shared" in found["structure"]
        assert "sequence.scatter" in found["length"]
        assert "does not share its tokens" in found["model"]
        assert ("'flex' does not run in a ring" in found.get("backend", "")) == ("ring" in name)
        assert ("3 attention heads" in found["heads"]) == ("ulysses" in name)
    for found in facts(results, "guidance").values():
        assert "3 passes" in found["three passes"]


# how a job ends badly -> its own message, how often; the exit codes of its processes
ENDS = {
    "killed": ("another process of this job died", {5, -9}),
    "killed elsewhere": ("another process of this job died", {5, -9}),
    "raises": ("rank 1 lacks a file", {4}),
}
MORE_ENDS = {
    "silent": ("Timed out waiting", {5}),
    "all raise": ("no rank has the file", {4}),
    "sizes": ("torchrun started 2 processes, and the sizes make 4", {2}),
}


Ended = tuple[str, str, float]


def ended(hows: Iterable[str]) -> dict[str, Ended]:
    """stdout, stderr and seconds of a job of two processes for each way to end badly."""

    def run(how: str) -> Ended:
        began = time.monotonic()
        job = torchrun(2, "failing", how)
        assert job.returncode == 1  # torchrun's own; each process's stands in its report
        return job.stdout, job.stderr, time.monotonic() - began

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(hows, pool.map(run, hows), strict=True))


def check(found: Ended, message: str, codes: set[int]) -> None:
    _, stderr, seconds = found
    assert len(re.findall("^error: ", stderr, re.MULTILINE)) == 1, stderr
    assert stderr.count(message) == 1, stderr
    assert {int(code) for code in re.findall(r"exitcode  : (-?\d+)", stderr)} == codes
    assert "Traceback" not in stderr.partition("torch/distributed/elastic")[0]
    assert seconds < 200  # the waits inside are 300 s long


@pytest.fixture(scope="module")
def ends() -> dict[str, Ended]:
    return ended(ENDS)


@pytest.mark.parametrize("how", ENDS)
def test_a_job_ends_with_one_message_and_its_exit_code(ends: dict[str, Ended], how: str) -> None:
    check(ends[how], *ENDS[how])


@pytest.mark.slow
@pytest.mark.parametrize("how", MORE_ENDS)
def test_further_ends(how: str) -> None:
    check(ended([how])[how], *MORE_ENDS[how])


def test_only_rank_0_is_heard(ends: dict[str, Ended]) -> None:
    stdout, stderr, _ = ends["raises"]
    assert stdout.count("heard from rank 0") == stderr.count("warned by rank 0") == 1
    assert "rank 1" not in stdout
    assert "warned by rank 1" not in stderr
