"""`porter recipe`: rules in words, and the account of a file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from porter.cli import main
from porter.core.errors import BadInputError
from porter.core.family import families

OWN = """
from porter.core.ops import Drop, Split
from porter.core.recipe import Recipe, Rule
RECIPE = Recipe("mine", "old", "new", (
    Rule("qkv.weight", ("q.weight", "k.weight", "v.weight"), Split((2, 2, 2)), "fused in the old code"),
    Rule("step", (), Drop("a counter of the training")),
))
"""


def told(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    assert main(["recipe", *arguments]) == code
    captured = capsys.readouterr()
    return captured.err if code else captured.out


def test_every_recipe_is_listed_with_its_users(capsys: pytest.CaptureFixture[str]) -> None:
    listed = json.loads(told(capsys, "show", "--json"))["recipes"]
    users = {user for recipe in listed for user in recipe["users"]}
    assert users == {f"{f.name}/{p.name}" for f in families().values() for p in f.components if p.layouts}
    assert [recipe["name"] for recipe in listed] == told(capsys, "show", "--quiet").split()


def test_a_recipe_in_words(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    said = told(capsys, "show", "flux1/transformer")
    assert "split [h, h, h, 4*h]" in said and "back  undo swap halves" in said
    assert said == told(capsys, "show", "flux1-transformer")
    document = json.loads(told(capsys, "show", "flux1", "--json"))
    assert {recipe["name"] for recipe in document["recipes"]} == {"flux1-transformer", "autoencoder-kl"}
    (tmp_path / "mine.py").write_text(OWN)
    said = told(capsys, "show", "--recipe", str(tmp_path / "mine.py"))
    assert "concat" in said and "only with --base" in said and "a counter of the training" in said


def test_the_account_of_a_file(
    capsys: pytest.CaptureFixture[str], tiny_flux: Path, tiny_port: Path, tmp_path: Path
) -> None:
    document = json.loads(told(capsys, "check", "builtin:tiny-flux", "--json"))
    parts = {part["name"]: part["coverage"] for part in document["components"]}
    for name, cover in parts.items():
        assert sum(rule["source_tensors"] for rule in cover["rules"]) == cover["totals"]["source"], name
        assert sum(rule["target_tensors"] for rule in cover["rules"]) == cover["totals"]["target"], name
        assert all(rule["inverse"] for rule in cover["rules"])
    lone = tmp_path / "flux.safetensors"
    shutil.copy(tiny_flux / "flux1-tiny.safetensors", lone)
    said = told(capsys, "check", str(lone), code=6)
    assert "axes_dims_rope" in said
    config = str(tiny_port / "transformer" / "config.json")
    assert "every tensor of both sides stands in one rule" in told(capsys, "check", str(lone), "--config", config)
    assert "no recipe" in told(capsys, "show", "nosuch", code=2)
    assert sorted(tmp_path.iterdir()) == [lone]


def test_the_account_of_a_file_that_needs_a_base(
    tiny_port: Path, tiny_flux: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What no tensor shows is taken from where `porter convert --base` takes it."""
    lone = shutil.copy(tiny_flux / "ae.safetensors", tmp_path / "ae.safetensors")
    told(capsys, "check", str(lone), code=BadInputError.exit_code)
    assert "148 tensors" in told(capsys, "check", str(lone), "--base", str(tiny_port))
