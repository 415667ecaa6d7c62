"""What can be known before anything runs is refused before torch is imported, and nothing is written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from parity import early
from parity.foreign import KIT
from parity.shims import USUAL, VERSIONS
from porter.cli import main
from porter.core.errors import MissingError, ResourceError, UsageError
from tests.parity.cases import write_case

ROOT = Path(__file__).resolve().parents[2]
CASE = ["parity", "--case", "case.py"]
REFUSED = {
    "no such case": (["parity", "--case", "nothing.py"], 4, "no such case file: nothing.py"),
    "no such family": (["parity", "--case", "nothing"], 4, "no family nothing"),
    "original code without a checkout": (["parity", "--case", "dit"], 2, "a checkout of facebookresearch/DiT"),
    "no such checkout": ([*CASE, "--reference-repo", "no"], 4, "no such checkout: no does not exist"),
    "a file as checkout": ([*CASE, "--reference-repo", "case.py"], 4, "no such checkout: case.py is a file"),
    "no such interpreter": ([*CASE, "--reference-python", "no"], 4, "no interpreter no"),
    "a time limit of nothing": ([*CASE, "--limit", "nan"], 2, "a number of seconds above zero"),
    "a gate of nothing": ([*CASE, "--gate", "nan"], 2, "--gate must be positive"),
    "shims of nothing": ([*CASE, "--shims=,,"], 2, "no stand-in for ''"),
    "shims of something else": ([*CASE, "--shims=numba"], 2, "no stand-in for 'numba'"),
    "shims of an odd version": ([*CASE, "--shims=flash_attn==new"], 2, "no stand-in for 'flash_attn==new'"),
    "a report in a file": ([*CASE, "-o", "case.py"], 2, "case.py is a file"),
    "a report below a file": ([*CASE, "-o", "case.py/report"], 2, "case.py is a file"),
    "a report behind a broken link": ([*CASE, "-o", "link"], 2, "leads nowhere"),
    "JUnit in no folder": ([*CASE, "--junit", "no/parity.xml"], 4, "there is no folder no"),
    "no such trace": ([*CASE, "--against", "trace", "no.safetensors"], 4, "no.safetensors does not exist"),
    "a trace over a case": (["parity", "record", "case.py", "-o", "case.py"], 2, "would be lost"),
    "a trace over weights": (["parity", "record", "case.py", "-o", "weights.safetensors"], 2, "would be lost"),
    "a trace over a folder": (["parity", "record", "case.py", "-o", "."], 2, "is a folder"),
    "a trace in no folder": (["parity", "record", "case.py", "-o", "no/t.safetensors"], 4, "there is no folder no"),
    "two traces that are not there": (["parity", "compare", "a", "b"], 4, "A: a does not exist"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_before_torch_is_imported(name: str, tmp_path: Path) -> None:
    write_case(tmp_path)
    (tmp_path / "link").symlink_to("nowhere")
    save_file({"x": torch.ones(1)}, tmp_path / "weights.safetensors")
    before = {path.name: path.lstat().st_mtime_ns for path in tmp_path.iterdir()}
    words, code, says = REFUSED[name]
    program = f"import sys; from porter.cli import main; code = main({words!r}); print(code, 'torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, env=environment
    )
    assert done.stdout == f"{code} False\n", done.stdout + done.stderr
    assert says in done.stderr and "  next:     " in done.stderr
    assert {path.name: path.lstat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_a_folder_that_may_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may write everywhere, so the answer of the system is given here."""
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ResourceError, match="cannot be written"):
        early.report_folder(tmp_path / "new" / "report")
    for refuse in (early.junit_file, early.trace_file):
        with pytest.raises(ResourceError, match="cannot be written"):
            refuse(tmp_path / "new")


def test_what_may_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    early.report_folder(tmp_path / "a" / "b")
    early.report_folder(tmp_path)
    early.report_folder(None)
    case = write_case(tmp_path)
    for _ in range(2):  # the second time over the first
        early.trace_file(Path("t.safetensors"))
        assert main(["parity", "record", case, "-o", "t.safetensors", "--quiet"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["case.py", "t.safetensors"]


@pytest.mark.parametrize("content", [b"", b"\xff" * 9, b"\x02\0\0\0\0\0\0\0[]", b"\xff\0\0\0\0\0\0\0" + b"[" * 255])
def test_what_is_no_trace_is_not_replaced(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "t.safetensors").write_bytes(content)
    with pytest.raises(UsageError, match="would be lost"):
        early.trace_file(tmp_path / "t.safetensors")


def test_names_of_stand_ins() -> None:
    assert early.shim_names(None) is None and early.shim_names("") == ()
    assert early.shim_names("flash_attn==2.6, cuda") == ("flash_attn==2.6", "cuda")
    assert set(VERSIONS) == set(early.SHIMMED) and {*USUAL} <= {*early.SHIMMED, "cuda"}
    assert "early.py" not in KIT
    with pytest.raises(MissingError):
        early.checkout(Path("/nowhere"))
