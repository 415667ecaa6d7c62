"""The built wheel, installed into an empty environment, runs the whole demo there, with weights, traces, templates."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command outside the checkout, with none of this environment's Python paths."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder in which an installed `porter demo` ran, and what it printed."""
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--outdir", folder / "dist", ROOT, cwd=folder)
    (wheel,) = (folder / "dist").glob("*.whl")
    venv.create(folder / "empty", with_pip=True)
    python = folder / "empty" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt", wheel, cwd=folder)
    done = run(folder / "empty" / "bin" / "porter", "demo", cwd=folder)
    return folder, done.stdout


def test_the_demo_ends_with_pass_and_prints_every_command(demo: tuple[Path, str]) -> None:
    _, printed = demo
    assert printed.rstrip().splitlines()[-1].startswith("PASS max|Δ| = ")
    for verb in ("plan", "convert", "parity", "generate"):
        assert f"$ porter {verb} " in printed


def test_the_demo_finds_the_planted_fault_by_name(demo: tuple[Path, str]) -> None:
    folder, printed = demo
    (found,) = (line for line in printed.splitlines() if line.startswith("planted fault found"))
    assert "norm_out" in found and "final_layer.adaLN_modulation.1" in found
    verdicts = {
        port: json.loads((folder / "porter-demo" / port / "parity" / "parity.json").read_text())["holds"]
        for port in ("port", "broken-port")
    }
    assert verdicts == {"port": True, "broken-port": False}


def test_the_demo_leaves_pictures_that_show_the_difference(demo: tuple[Path, str]) -> None:
    from tests.builtin.pixel_rule import judge

    folder, printed = demo
    (command,) = (line for line in printed.splitlines() if "$ porter generate" in line and "good.png" in line)
    prompt = command.split("'")[1]
    good, broken = (_pixels(folder / "porter-demo" / name) for name in ("good.png", "broken.png"))
    assert judge(good, prompt) == []
    assert judge(broken, prompt) != []
    with Image.open(folder / "porter-demo" / "contact-sheet.png") as sheet:
        assert sheet.width > 600


def _pixels(path: Path):  # type: ignore[no-untyped-def]
    import numpy as np

    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))
