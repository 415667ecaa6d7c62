"""`porter families` as a user meets it."""

from __future__ import annotations

import json

import pytest

from porter import cli
from porter.core.family import families, proof


def test_what_it_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["families"]) == 0
    shown = capsys.readouterr().out
    for family in families().values():
        for word in (family.name, family.title, *family.pipeline_classes, family.license_hint):
            assert word in shown
        assert ("proven against" if proof(family) else "unproven") in shown
        for part in family.components if any(part.recipe for part in family.components) else ():
            assert part.name in shown and (part.recipe or "reused as it is") in shown


def test_json_and_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["families", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "porter.families/1"
    for entry in document["families"]:
        family = families()[entry["name"]]
        assert entry["proven"] == bool(proof(family)) and entry["traces"] == proof(family)
        assert [part["name"] for part in entry["components"]] == [part.name for part in family.components]
    assert cli.main(["families", "-q"]) == 0
    assert capsys.readouterr().out.split() == list(families())


def test_a_family_without_a_trace_is_unproven(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dataclasses import replace

    from porter.commands import families as verb

    known = {name: replace(family, reference="conversions/nowhere") for name, family in families().items()}
    monkeypatch.setattr(verb, "families", lambda: known)
    assert cli.main(["families"]) == 0
    assert "unproven" in capsys.readouterr().out


def test_its_columns_are_aligned(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main(["families", "-v"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = {part.name for family in families().values() for part in family.components}
    rows = [line for line in lines if line.startswith("  ") and line.split()[0] in names]
    assert len({len(line) - len(line.lstrip().split(maxsplit=1)[1]) for line in rows}) == 1
    assert max(map(len, lines)) <= 80 and all(line.startswith("  ") or line.split()[0] in families() for line in lines)
