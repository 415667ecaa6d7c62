"""`porter generate --offload --weights`: what metadata says, and what is refused before weights are read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from porter.commands.generate import command
from porter.core.errors import UsageError

SMALL = ("--height", "32", "--width", "32", "--steps", "1")


def sidecar(port: Path, out: Path, *arguments: str) -> dict[str, object]:
    done = CliRunner().invoke(command, [str(port), "a red circle", *SMALL, "-o", str(out), *arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    found: dict[str, object] = json.loads(out.with_suffix(".json").read_text())
    return found


def test_metadata_says_it_and_repeats_it(bare_port: Path, tmp_path: Path) -> None:
    plain = sidecar(bare_port, tmp_path / "plain.png")
    assert (plain["offload"], plain["weights"]) == ("none", None)
    layers = sidecar(bare_port, tmp_path / "layers.png", "--offload", "layer")
    assert (layers["offload"], layers["device"], layers["dtype"]) == ("layer", "cpu", "float32")
    assert layers["pixels_sha256"] == plain["pixels_sha256"]
    small = sidecar(bare_port, tmp_path / "small.png", "--weights", "fp8", "--quality", "lossy")
    assert (small["weights"], small["dtype"], small["quality"]) == ("fp8", "float32", "lossy")
    assert small["pixels_sha256"] != plain["pixels_sha256"]
    again = tmp_path / "again.png"
    asked = [str(bare_port), "--from-metadata", str(tmp_path / "small.json"), "-o", str(again)]
    done = CliRunner().invoke(command, asked)
    assert done.exception is None, done.output
    repeated = json.loads(again.with_suffix(".json").read_text())
    assert (repeated["weights"], repeated["pixels_sha256"]) == ("fp8", small["pixels_sha256"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--weights", "fp8"), "promises the stored ones"),
        (("--weights", "int3", "--quality", "lossy"), "no weights int3"),
        (("--offload", "layer", "--executor", "diffusers"), "diffusers' own pipeline"),
        (("--offload", "layer", "--compile"), "compiled code"),
        (("--weights", "gguf:x.gguf", "--quality", "lossy", "--lora", "x.safetensors"), "do not run beside a GGUF"),
    ],
)
def test_refused(bare_port: Path, tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        sidecar(bare_port, tmp_path / "x.png", *arguments)
    assert not list(tmp_path.iterdir())
