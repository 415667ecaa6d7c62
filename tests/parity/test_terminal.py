"""What a user of `porter parity --case` sees: on the terminal, in Markdown, JUnit and on the page; nothing twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from porter.cli import main
from tests.parity.cases import write_case

SAME = "Reference = Net\n"
# The mask of this one changes nothing, and its candidate differs in every block.
FAULTY = """
class Masked(Net):
    def forward(self, x, mask):
        return super().forward(x)

def Reference():
    return Masked()

def inputs(config, draw):
    return {"x": draw("x", 2, 3, 4), "mask": torch.ones(2, 3, dtype=torch.bool)}

class Wrong(Masked):
    def __init__(self):
        super().__init__()
        for block in self.blocks:
            for part in (block.up, block.down):
                part.register_forward_hook(lambda m, given, out: out * 1.001)

    def forward(self, x, mask):
        return super().forward(x, mask)

Net = FAULT
"""
REASON = "changing mask changes nothing in the reference's output"


def parity(folder: Path, reference: str, *options: str, code: int = 0) -> None:
    case = write_case(folder, reference)
    assert main(["parity", "--case", case, "-o", str(folder / "report"), *options]) == code


def test_each_thing_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parity(tmp_path, FAULTY.replace("FAULT", "Wrong"), code=1)
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert lines[-1].startswith("FAIL first guilty module: blocks.0.up ↔ blocks.0.up (rule ")
    assert said.out.count("blocks.0.up ↔ blocks.0.up") == 1 and "blocks.0.up" not in said.err
    others = lines[lines.index("  further faults:") + 1 :][:3]
    names = [f"    {path} ↔ {path}, call 0" for path in ("blocks.0.down", "blocks.1.up", "blocks.1.down")]
    assert others == names
    assert said.out.count(REASON) == 1 and "nan" not in said.out  # the reason of what was not compared, on its own line


def test_a_long_list_is_cut_with_its_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = "Block.forward = lambda self, x: x + self.down(self.up(x))\nNet.__init__ = longer(Net.__init__)\n"
    longer = """
def longer(init):
    def build(self):
        init(self)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
    return build
"""
    parity(tmp_path, longer + more + FAULTY.replace("FAULT", "Wrong"), code=1)
    out = capsys.readouterr().out
    assert "    and 2 more, see the report" in out and "blocks.3.up ↔" not in out
    document = json.loads((tmp_path / "report" / "parity.json").read_text())
    assert len(document["components"][0]["faults"]) == 8
    assert "blocks.3.up ↔ blocks.3.up" in (tmp_path / "report" / "report.html").read_text()


@pytest.mark.parametrize("fault", ["Masked", "Wrong"])
def test_why_something_was_not_compared_stands_in_every_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: str
) -> None:
    """Also where another fault is the verdict; the number in the table is that of what was compared."""
    code = FAULTY.replace("FAULT", fault)
    parity(tmp_path, code, "--junit", str(tmp_path / "parity.xml"), code=1)
    text = capsys.readouterr().out
    assert text.count(REASON) == 1 and "nan" not in text and "name it in the case's `free`" in text
    parity(tmp_path, code, "--markdown", code=1)
    markdown = capsys.readouterr().out.partition("<details>")[0]
    assert markdown.count(REASON) == 1
    page = (tmp_path / "report" / "report.html").read_text().replace("&#39;", "'")
    assert REASON in page.partition("Outputs</h3>")[0]
    assert REASON in (tmp_path / "parity.xml").read_text()
    document = json.loads((tmp_path / "report" / "parity.json").read_text())
    assert document["components"][0]["headline"]["max_abs"] is not None


def test_the_level_component_claims_nothing_of_modules(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = "class Reference(Net):\n    def forward(self, x):\n        return 1.001 * super().forward(x)\n"
    only = "only outputs were compared, no module was looked at"
    parity(tmp_path, wrong, "--level", "component", code=1)
    out = capsys.readouterr().out
    assert only in out and "every module" not in out and "FAIL net (Net) against reference: forward: differs: " in out
    page = (tmp_path / "report" / "report.html").read_text()
    assert "every module" not in page and "First guilty module" not in page
    parity(tmp_path, SAME, "--level", "component")
    assert only in capsys.readouterr().out
    assert only in (tmp_path / "report" / "report.html").read_text()
