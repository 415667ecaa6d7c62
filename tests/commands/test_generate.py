"""`porter generate` through the command line, on real files."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from porter.cli import main
from porter.core.port import MANIFEST, SCHEMA, code_sha256, file_record, file_sha256
from runtime.image import read_metadata
from tests.runtime.ports import write_port

PROMPT = "a large red circle, blue background"
FIRST = "a-large-red-circle-blue-background-seed0.png"
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline folder in the diffusers layout, without a manifest."""
    return write_port(tmp_path_factory.mktemp("generate") / "bare")


@pytest.fixture
def port(bare: Path, tmp_path: Path) -> Path:
    """The same as a port: with a manifest, and a parity verdict that passed."""
    folder = Path(shutil.copytree(bare, tmp_path / "port"))
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    manifest = {
        "schema": SCHEMA,
        "status": "complete",
        "direction": "diffusers",
        "source": {"spec": "builtin:tiny-flux", "files": {}},
        "licence": {},
        "components": {},
        "files": {str(p.relative_to(folder)): file_record(p, file_sha256(p)) for p in files},
        "loss": {},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest))
    judge(folder, True)
    return folder


def judge(port: Path, passed: bool) -> None:
    (port / "parity").mkdir(exist_ok=True)
    code = {"parity": code_sha256("parity")}
    bound = {"manifest_sha256": file_sha256(port / MANIFEST), "code": code}
    document = {"schema": "porter.parity/1", "passed": passed, **bound}
    (port / "parity" / "parity.json").write_text(json.dumps(document))


def generate(*arguments: object) -> int:
    return main(["generate", *map(str, arguments)])


def test_a_picture_its_metadata_and_its_sidecar(port: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert generate(port, PROMPT, "--steps", 2, "--guidance-scale", 0, "-o", out) == 0
    shown = capfd.readouterr()
    assert shown.out == f"{out / FIRST}\n"
    assert shown.err == ""  # parity passed, no terminal: nothing to say
    about = read_metadata(out / FIRST)
    sidecar = json.loads((out / FIRST).with_suffix(".json").read_text())
    assert sidecar == about | {"file": FIRST, "file_sha256": file_sha256(out / FIRST)}
    assert about["port"] == "port"
    assert about["source"] == "builtin:tiny-flux"
    assert about["parity"] == "passed"
    assert about["manifest_sha256"] == file_sha256(port / MANIFEST)
    assert about["versions"]["torch"] == torch.__version__
    expected = {"prompt": PROMPT, "seed": 0, "num_inference_steps": 2, "guidance_scale": 0.0, "height": 64, "width": 64}
    assert {key: about[key] for key in expected} == expected
    with Image.open(out / FIRST) as image:
        assert image.size == (64, 64)
        assert hashlib.sha256(image.tobytes()).hexdigest() == about["pixels_sha256"]
    assert sorted(p.name for p in out.iterdir()) == [Path(FIRST).with_suffix(".json").name, FIRST]


def test_the_same_command_gives_the_same_bytes_and_each_image_repeats_alone(port: Path, tmp_path: Path) -> None:
    options = (port, PROMPT, "--num-inference-steps", 2, "--height", 48)
    assert generate(*options, "--num-images", 3, "--seed", 5, "-o", tmp_path / "three") == 0
    assert generate(*options, "--num-images", 3, "--seed", 5, "-o", tmp_path / "again") == 0
    assert generate(*options, "--seed", 6, "-o", tmp_path / "one") == 0
    three, again, one = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("three", "again", "one"))
    assert len(three) == 6
    assert three == again
    assert len(set(three.values())) == 6
    assert one.items() <= three.items()


def test_json_is_one_document(port: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert generate(port, PROMPT, "--steps", 1, "--num-images", 2, "-o", tmp_path / "out", "--json") == 0
    document = json.loads(capfd.readouterr().out)
    assert document["schema"] == "porter.generate/1"
    assert [image["seed"] for image in document["images"]] == [0, 1]
    for image in document["images"]:
        assert file_sha256(Path(image["file"])) == image["file_sha256"]
        assert Path(image["sidecar"]).is_file()
    assert document["parity"] == "passed"
    assert document["warnings"] == []


@pytest.mark.parametrize("verdict", ["missing", "failed", "stale", "no manifest"])
def test_an_unproven_port_runs_with_one_loud_line(
    port: Path, tmp_path: Path, verdict: str, capfd: pytest.CaptureFixture[str]
) -> None:
    if verdict == "missing":
        (port / "parity" / "parity.json").unlink()
    elif verdict == "failed":
        judge(port, False)
    elif verdict == "stale":
        path = port / WEIGHTS
        tensors = load_file(path)
        tensors["proj_out.bias"] += 1
        save_file(tensors, path, metadata={"format": "pt"})
    else:
        (port / MANIFEST).unlink()
    assert generate(port, PROMPT, "--steps", 1, "-o", tmp_path / "out", "--quiet") == 0
    shown = capfd.readouterr()
    (line,) = shown.err.splitlines()
    assert line.startswith("warning: ")
    assert (f"parity {verdict}" if verdict != "no manifest" else "manifest.json") in line
    assert ("porter parity" in line) == (verdict != "no manifest")
    assert read_metadata(tmp_path / "out" / FIRST)["parity"] == verdict


def test_nothing_is_overwritten_without_the_flag(port: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert generate(port, PROMPT, "--steps", 1, "-o", out) == 0
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    assert generate(port, PROMPT, "--steps", 2, "-o", out) == 2
    assert "--overwrite" in capfd.readouterr().err
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert generate(port, PROMPT, "--steps", 2, "-o", out, "--overwrite") == 0
    assert read_metadata(out / FIRST)["num_inference_steps"] == 2


def test_one_named_file_without_metadata(port: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "picture.png"
    assert generate(port, PROMPT, "--steps", 1, "-o", out, "--no-metadata") == 0
    assert [p.name for p in out.parent.iterdir()] == ["picture.png"]
    with Image.open(out) as image:
        assert image.info == {}


def test_true_cfg_and_dtype_reach_the_picture(port: Path, tmp_path: Path) -> None:
    options: list[tuple[object, ...]] = [
        (),
        ("--negative-prompt", "green", "--true-cfg-scale", 4),
        ("--dtype", "bfloat16"),
        ("--guidance-scale", 0),
        ("--width", 96),
    ]
    pixels = []
    for i, extra in enumerate(options):
        out = tmp_path / f"{i}.png"
        assert generate(port, PROMPT, "--steps", 1, "-o", out, *extra) == 0
        pixels.append(read_metadata(out)["pixels_sha256"])
    assert len(set(pixels)) == len(options)
    assert read_metadata(tmp_path / "2.png")["dtype"] == "bfloat16"


def _missing(port: Path) -> None:
    path = port / WEIGHTS
    tensors = load_file(path)
    del tensors["proj_out.bias"]
    save_file(tensors, path, metadata={"format": "pt"})


def _truncated(port: Path) -> None:
    path = port / WEIGHTS
    path.write_bytes(path.read_bytes()[:-10])


def _no_index(port: Path) -> None:
    (port / "model_index.json").unlink()


def _original(port: Path) -> None:
    shutil.move(port / WEIGHTS, port / "flux1.safetensors")


BAD: dict[str, tuple[Any, tuple[object, ...], int, str]] = {
    "bad height": (None, ("--height", 50), 2, "height"),
    "seed": (None, ("--seed", -1), 2, "seed"),
    "steps": (None, ("--steps", 0), 2, "--steps"),
    "guidance": (None, ("--guidance-scale", "-1"), 2, "guidance_scale"),
    "negative prompt alone": (None, ("--negative-prompt", "x"), 2, "true_cfg_scale"),
    "device": (None, ("--device", "cuda:99"), 2, "cuda:99"),
    "no such device": (None, ("--device", "abacus"), 2, "abacus"),
    "dtype": (None, ("--dtype", "int8"), 2, "--dtype"),
    "two into one file": (None, ("--num-images", 2, "-o", "x.png"), 2, "do not fit"),
    "below a file": (None, ("-o", "/dev/null/x"), 5, "/dev/null"),
    "missing tensor": (_missing, (), 6, "proj_out.bias"),
    "truncated": (_truncated, (), 6, "diffusion_pytorch_model.safetensors"),
    "no index": (_no_index, (), 6, "porter convert"),
    "original layout": (_original, (), 6, "porter convert"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_ends_with_its_code_and_leaves_nothing(
    port: Path, tmp_path: Path, kind: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    damage, options, code, named = BAD[kind]
    if damage:
        damage(port)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert generate(port, PROMPT, "--steps", 1, *options) == code
    shown = capfd.readouterr()
    assert named in shown.err
    assert shown.out == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_settings_are_refused_before_weights_are_read(port: Path, capfd: pytest.CaptureFixture[str]) -> None:
    _truncated(port)
    assert generate(port, PROMPT, "--height", 50) == 2
    assert "height" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("name", "code", "hint"),
    [
        ("builtin:tiny-flux", 6, "porter convert builtin:tiny-flux -o tiny-flux-port"),
        ("black-forest-labs/FLUX.1-dev", 4, "porter convert black-forest-labs/FLUX.1-dev -o FLUX.1-dev-port"),
        ("weights.safetensors", 6, "porter convert weights.safetensors -o weights-port"),
    ],
)
def test_what_is_not_a_port_is_answered_with_the_command_that_makes_one(
    tmp_path: Path, name: str, code: int, hint: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights.safetensors").write_bytes(b"")
    assert generate(name, PROMPT) == code
    assert hint in capfd.readouterr().err


def test_an_empty_prompt_is_a_prompt(port: Path, tmp_path: Path) -> None:
    assert generate(port, "", "--steps", 1, "-o", tmp_path / "out") == 0
    assert (tmp_path / "out" / "image-seed0.png").is_file()


def test_progress_and_its_absence_in_a_real_process(bare: Path, tmp_path: Path) -> None:
    """A bar on a terminal; with stderr elsewhere nothing but the warning. Help needs no torch."""
    base = [sys.executable, "-m", "porter.cli", "generate"]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    arguments = [str(bare), PROMPT, "--steps", "3", "-o", str(tmp_path / "out")]
    leader, follower = pty.openpty()
    process = subprocess.Popen([*base, *arguments], stdout=subprocess.DEVNULL, stderr=follower, env=environment)
    os.close(follower)
    screen = b""
    while True:
        try:
            chunk = os.read(leader, 65536)
        except OSError:  # the other end is closed
            break
        if not chunk:
            break
        screen += chunk
    assert process.wait() == 0
    os.close(leader)
    assert "3/3" in screen.decode()
    code = "import sys; from porter.commands.generate import command; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_a_full_disk_leaves_no_half_picture(port: Path, tmp_path: Path, monkeypatch: Any) -> None:
    out = tmp_path / "out"

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert generate(port, PROMPT, "--steps", 1, "-o", out) == 5
    assert list(out.iterdir()) == []
