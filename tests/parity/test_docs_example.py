"""The case that docs/parity.md shows, as it stands there, with a repository and a port to go with it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from porter.cli import main

ROOT = Path(__file__).resolve().parents[2]
THEIRS = """from tests.parity.pair import Original


class Transformer(Original):
    def __init__(self, **config):
        super().__init__(config)

    def forward(self, latents, t, text, mask=None):
        return super().forward(latents, t / 1000, text, mask)
"""
MINE = """from types import SimpleNamespace

from tests.parity.pair import Port, convert  # noqa: F401


class MyTransformer(Port):
    def __init__(self, scale=1000, **config):
        super().__init__(config)
        self.scale = scale

    def forward(self, latents, t, text, mask):
        return SimpleNamespace(**super().forward(latents, t / self.scale, text, mask))
"""
CONFIG = {"width": 16, "heads": 2, "depth": 3, "channels": 4, "context": 32}


@pytest.mark.parametrize("right", [True, False])
def test_the_documented_case_runs_as_it_stands(
    right: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only its two `{...}` are filled in."""
    page = (ROOT / "docs" / "parity.md").read_text("utf-8")
    (code,) = [c for c in re.findall(r"^```python\n(.*?)^```", page, re.M | re.S) if "case = Case(" in c]
    assert len([line for line in code.splitlines() if line.strip()]) <= 25 and code.count("{...}") == 2
    mine = CONFIG if right else CONFIG | {"scale": 999}
    (tmp_path / "my_case.py").write_text(code.replace("{...}", str(CONFIG), 1).replace("{...}", str(mine), 1))
    (tmp_path / "my_port.py").write_text(MINE)
    (tmp_path / "checkout" / "their_repo").mkdir(parents=True)
    (tmp_path / "checkout" / "their_repo" / "model.py").write_text(THEIRS)
    monkeypatch.chdir(tmp_path)
    found = main(["parity", "--case", "my_case.py", "--reference-repo", "checkout", "-o", "report"])
    out = capsys.readouterr()
    assert found == (0 if right else 1), out.out + out.err
    (result,) = json.loads((tmp_path / "report" / "parity.json").read_text())["components"]
    assert result["passed"] == right and result["counts"]["compared"] > 30
    assert right or str(result["faults"][0]["text"]).startswith("the code before time_embed ↔ time")
