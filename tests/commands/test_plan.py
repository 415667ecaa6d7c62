"""`porter plan` as a user meets it."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest

from porter import cli
from porter.core.plan import PortPlan, plan


def test_what_it_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "builtin:tiny-flux"]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    for word in (
        "FluxPipeline", "flux1", "Modular: standard text-to-image", "FluxTransformer2DModel", "AutoencoderKL",
        "CLIPTextModel", "5.22 M", "BF16", "10.5 MB", "convert", "reuse", "conversions.flux1.recipe:TRANSFORMER",
    ):  # fmt: skip
        assert word in shown.out, word
    assert shown.out.splitlines()[-1].split(None, 1) == ["next", "porter convert builtin:tiny-flux -o tiny-flux-port"]


def test_verbose_shows_configs_and_quiet_only_the_next_command(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["plan", "builtin:tiny-flux", "-v"])
    assert "axes_dims_rope [8, 12, 12]" in capsys.readouterr().out
    cli.main(["plan", "builtin:tiny-flux", "-q"])
    assert capsys.readouterr().out == "porter convert builtin:tiny-flux -o tiny-flux-port\n"


def test_json_and_saved_plan_are_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "builtin:tiny-flux", "--json", "-o", str(tmp_path / "plan.json"), "-q"]) == 0
    printed = json.loads(capsys.readouterr().out)
    saved = json.loads((tmp_path / "plan.json").read_text())
    assert printed == saved and PortPlan.from_json(saved) == plan("builtin:tiny-flux")


def test_the_next_command_can_be_pasted(tiny_flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole chain from a folder with a space in its name: plan, the command it prints, plan of the result."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_flux, tmp_path / "my model")
    (command,) = plan("my model").next
    words = shlex.split(command)
    assert words[0] == "porter" and cli.main([*words[1:], "-q"]) == 0
    port = tmp_path / "my model-port"
    found = plan(port)
    assert {part.name: part.status for part in found.components}["transformer"] == "native"
    assert found.warnings == ("parity of this port: missing",)
    assert found.next == (f"porter parity '{port}'", f"porter generate '{port}' \"a prompt\"")


def test_markup_in_names_is_text(tmp_path: Path, tiny_flux: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = Path(shutil.copytree(tiny_flux, tmp_path / "[red]model[/nothing]"))
    assert cli.main(["plan", str(model)]) == 0
    assert "[red]model[/nothing]" in capsys.readouterr().out
    assert cli.main(["plan", str(model / "none[/bold]")]) == 4
    assert "none[/bold]" in capsys.readouterr().err
