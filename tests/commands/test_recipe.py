"""`porter recipe`: rules in words, and the account of a file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

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
    assert "no recipe is called" in told(capsys, "show", "nosuch", code=2)
    assert "LTX-Video has no recipe" in told(capsys, "show", "ltx", code=2)
    assert sorted(tmp_path.iterdir()) == [lone]


def test_the_account_of_a_file_that_needs_a_base(
    tiny_port: Path, tiny_flux: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What no tensor shows is taken from where `porter convert --base` takes it."""
    lone = shutil.copy(tiny_flux / "ae.safetensors", tmp_path / "ae.safetensors")
    told(capsys, "check", str(lone), code=BadInputError.exit_code)
    assert "148 tensors" in told(capsys, "check", str(lone), "--base", str(tiny_port))


ODD = """
from porter.core.ops import Concat, Constant, Multiply, Split
from porter.core.recipe import Recipe, Rule
RECIPE = Recipe("odd", "old", "new", (
    Rule(("up.weight", "gate.weight"), "up_gate.weight", Concat()),
    Rule(("out.weight", "out.gate"), "out.weight", Multiply()),
    Rule("qkv.weight", ("to_q.weight", "to_k.weight", "to_v.weight"), Split(("h", "h", "h"))),
    Rule((), "scale", Constant(1.0, (1,), "float32")),
), parameters=lambda config: {"h": config["width"]}, target_class="diffusers.FluxTransformer2DModel")
"""


@pytest.fixture
def odd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A layout of nobody's, and a recipe for it."""
    monkeypatch.chdir(tmp_path)
    rows = {"up.weight": 3, "gate.weight": 3, "out.weight": 5, "qkv.weight": 6}
    tensors = {name: np.arange(2 * count, dtype=np.float32).reshape(count, 2) for name, count in rows.items()}
    save_file({**tensors, "out.gate": np.full(5, 2, np.float32)}, "odd.safetensors")
    Path("odd.py").write_text(ODD)
    Path("config.json").write_text('{"width": 2}')
    return tmp_path


@pytest.mark.usefixtures("odd")
def test_a_recipe_of_ones_own_there_and_back(capsys: pytest.CaptureFixture[str]) -> None:
    own = ["--recipe", "odd.py"]
    lone = ["odd.safetensors", *own, "--component", "transformer"]
    said = told(capsys, "check", *lone, code=6)
    assert "the config has no width" in said and "--config FILE, with width in it" in said
    assert "split at the same places" in told(capsys, "show", *own)
    said = told(capsys, "check", *lone, "--config", "config.json")
    assert "another name" not in said and "not checked: which tensors its class has" in said
    assert main(["convert", *lone, "--config", "config.json", "-o", "port"]) == 0
    assert "2 tensors folded into others; manifest.json says which" in capsys.readouterr().out
    (folded,) = json.loads(Path("port/manifest.json").read_text())["loss"]["lossy"]
    assert folded["sources"] == ["out.weight", "out.gate"]
    assert main(["convert", "port", "--to", "original", *own, "-o", "back"]) == 6
    assert "--recipe FILE.py -o OUT" in capsys.readouterr().err
    assert main(["convert", "port", "--to", "original", *own, "--base", "odd.safetensors", "-o", "back"]) == 0
    said = capsys.readouterr().out
    assert (
        "loss      none" in said and "dropped" not in said and "not checked" not in said
    )  # a constant that the recipe made is none of the source's
    back, there = load_file("back/odd.safetensors"), load_file("odd.safetensors")
    assert back.keys() == there.keys() and all(np.array_equal(back[name], there[name]) for name in there)


@pytest.mark.usefixtures("odd")
def test_a_constant_of_no_dtype_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    Path("odd.py").write_text(ODD.replace("float32", "float99"))
    lone = ["odd.safetensors", "--recipe", "odd.py", "--component", "transformer", "--config", "config.json"]
    assert "unknown dtype 'float99'" in told(capsys, "check", *lone, code=6)


@pytest.mark.parametrize("line", [
    ["recipe", "show"], ["recipe", "show", "flux1"], ["recipe", "check", "builtin:tiny-flux"],
    ["convert", "builtin:tiny-flux", "--dry-run"], ["recipe", "--help"], ["convert", "--help"],
])  # fmt: skip
def test_rules_fit_the_width(
    line: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(line) == 0
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80 and "..." not in said.replace("[ARGS]...", "")
