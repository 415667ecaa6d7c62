"""A saved plan as the input of the next step."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from porter import cli
from porter.core.errors import BadInputError, MissingError
from porter.core.plan import PortPlan
from porter.core.planned import open_planned, port_of, read_plan
from porter.core.planning import plan


@pytest.fixture
def model(tiny_flux: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_flux, tmp_path / "model"))


@pytest.fixture
def saved(model: Path, tmp_path: Path) -> Path:
    assert cli.main(["plan", str(model), "-o", str(tmp_path / "plan.json"), "-q"]) == 0
    return tmp_path / "plan.json"


def test_it_opens_what_it_was_made_from(model: Path, saved: Path) -> None:
    assert read_plan(saved) == plan(model)
    assert open_planned(saved).spec == str(model)
    assert plan(saved) == plan(model)


def test_convert_and_parity_take_it(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingError, match="no port of"):
        port_of(saved)
    assert cli.main(["convert", str(saved), "-o", "model-port", "-q"]) == 0
    assert port_of(saved) == Path("model-port")
    assert cli.main(["parity", str(saved), "--component", "transformer", "-q"]) == 0
    assert (tmp_path / "model-port" / "parity" / "partial" / "parity.json").is_file()
    assert cli.main(["plan", "model-port", "-o", "port.json", "-q"]) == 0
    assert port_of(Path("port.json")) == tmp_path / "model-port"
    capsys.readouterr()


def test_a_source_that_changed_since_is_refused(model: Path, saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = model / "scheduler" / "scheduler_config.json"
    file.write_text(file.read_text() + " ")
    with pytest.raises(BadInputError, match="has changed since") as caught:
        open_planned(saved)
    assert "scheduler/scheduler_config.json" in str(caught.value) and str(saved) in str(caught.value)
    assert cli.main(["convert", str(saved), "-o", str(model.parent / "out")]) == 6
    assert not (model.parent / "out").exists()
    capsys.readouterr()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema": "porter.plan/9"}, "not a plan"),
        ({"source": 3}, "damaged plan"),
        ({"content": {"a": "large"}}, "damaged plan"),
        ({"content": [1]}, "damaged plan"),
        ({"components": 5}, "damaged plan"),
        ({"components": [3]}, "a damaged plan"),
        ({"more": 1}, "missing or unknown keys"),
        ({"source": "other.json"}, "a plan of a plan"),
    ],
)
def test_damaged_plans(saved: Path, change: dict[str, object], words: str) -> None:
    document = {**json.loads(saved.read_text()), **change}
    saved.write_text(json.dumps(document))
    with pytest.raises(BadInputError, match=words):
        plan(saved)


def test_a_revision_cannot_be_given_for_a_plan(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(saved), "--revision", "main"]) == 2
    assert "--revision main means nothing" in capsys.readouterr().err


def test_all_of_it_survives_json(model: Path) -> None:
    found = plan(model)
    assert PortPlan.from_json(json.loads(json.dumps(found.to_json()))) == found
