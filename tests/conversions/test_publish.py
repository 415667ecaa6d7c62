"""What stands in reports/ belongs to what is committed: every family with a trace, compared with that very trace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from conversions.publish import against_trace, drawn_cases, merged
from parity.document import document
from parity.recorder import file_sha256
from porter.core.family import families, resolve

REPORTS = Path(__file__).resolve().parents[2] / "reports"
PROVEN = [name for name, family in families().items() if family.reference]


def published(family: str) -> list[dict[str, Any]]:
    folders = [REPORTS / family, *REPORTS.glob(f"{family}-components")]
    return [json.loads(path.read_text()) for folder in folders if (path := folder / "parity.json").is_file()]


@pytest.mark.parametrize("family", PROVEN)
def test_every_trace_has_its_published_comparison(family: str) -> None:
    """A trace that was recorded again makes the report a claim about another one: `make reports`."""
    found = {
        trace["sha256"] for data in published(family) for trace in data["traces"].values() if trace and data["holds"]
    }
    wanted = {case.trace.name: file_sha256(case.trace) for case in resolve(str(families()[family].cases)).components}
    assert {name for name, sha256 in wanted.items() if sha256 not in found} == set()


def test_the_scoreboard_lists_every_report() -> None:
    pages = {path.parent.name for path in REPORTS.glob("*/report.html")}
    for file in ("README.md", "index.html"):
        text = (REPORTS / file).read_text()
        assert [name for name in pages if f"{name}/report.html" not in text] == []


def test_a_published_result_is_what_a_comparison_says() -> None:
    """Variants of a component keep their names, hashes and verdicts apart."""
    cases = [case for name, case in drawn_cases() if name == "sd3"][:2]
    data = document(merged("sd3", [against_trace("sd3", case) for case in cases]), "make reports")
    names = [case.trace.stem for case in cases]
    told = [c["component"] for c in data["components"]]  # each with the trace, and both ports with each other
    assert list(dict.fromkeys(told)) == names == list(data["traces"]) == list(data["weights"])
    assert told == [name for name in names for _ in range(3)]
    assert data["passed"] and len({t["sha256"] for t in data["traces"].values()}) == 2
