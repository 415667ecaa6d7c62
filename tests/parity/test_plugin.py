"""The pytest plug-in in a project of its own: real test files, run by a real pytest."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = """
from dataclasses import replace
from tests.parity.pair import case, convert

def test_right(assert_parity):
    assert assert_parity(case, level="component").passed

def test_wrong(assert_parity):
    assert_parity(replace(case, candidate=replace(case.candidate, build=wrong)))

def wrong(config):
    port = case.candidate.build(config)
    port.layers[1].norm_a.eps = 1e-3
    return port
"""


def test_a_project_of_its_own_asserts_parity(tmp_path: Path) -> None:
    (tmp_path / "test_port.py").write_text(TESTS)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--parity-report", "reports", "test_port.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "1 failed, 1 passed" in done.stdout, done.stdout + done.stderr
    assert "layers.1.norm_a ↔ blocks.1.norm1" in done.stdout and "eps 1e-06 in the reference, 0.001" in done.stdout
    documents = {p.parent.name: json.loads(p.read_text()) for p in (tmp_path / "reports").glob("*/parity.json")}
    assert documents["test_right"]["holds"] and not documents["test_wrong"]["holds"]
    assert (tmp_path / "reports" / "test_wrong" / "report.html").is_file()
