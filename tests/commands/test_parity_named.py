"""Cases by the name of a family, and case files that say which original code they were written for."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from parity.named import Pinned
from porter.cli import main

ROOT = Path(__file__).resolve().parents[2]
CODE = f"""import sys
sys.path.insert(0, {str(ROOT)!r})
from dataclasses import replace

from tests.parity.pair import case as pair

REPOSITORY = "someone/original"
COMMIT = "{{commit}}"


def build(config):
    import original  # of the checkout

    return original.Reference(config)


case = replace(pair, reference=replace(pair.reference, build=build))
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "original"
    folder.mkdir()
    (folder / "original.py").write_text("from tests.parity.pair import Original as Reference\n")
    alone = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull}
    for words in (("init", "-q"), ("add", "."), ("-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-qm", "1")):
        subprocess.run(["git", "-C", str(folder), *words], check=True, env=alone)
    return folder


def commit(folder: Path) -> str:
    command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_the_original_code_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything runs: which code, at which commit, and with which option."""
    file = tmp_path / "mine.py"
    file.write_text(CODE.format(commit="f" * 40))
    assert main(["parity", "--case", str(file), "-o", str(tmp_path / "r")]) == 2
    printed = capsys.readouterr().err
    assert f"someone/original at {'f' * 40}" in printed and "--reference-repo" in printed
    assert not (tmp_path / "r").exists()


@pytest.mark.slow
@pytest.mark.parametrize("other", [False, True])
def test_another_commit_than_the_case_s_is_said(tmp_path: Path, checkout: Path, other: bool) -> None:
    file = tmp_path / "mine.py"
    file.write_text(CODE.format(commit="f" * 40 if other else commit(checkout)))
    words = ["--reference-repo", str(checkout), "-o", str(tmp_path / "r"), "--quiet"]
    assert main(["parity", "--case", str(file), *words]) == 0
    (result,) = json.loads((tmp_path / "r" / "parity.json").read_text())["components"]
    said = [note for note in result["notes"] if "was written for someone/original" in note]
    assert len(said) == other and all(commit(checkout) in note for note in said)
    assert result["reference"].endswith(f" at {commit(checkout)[:7]}")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("fluks1", "the nearest is flux1"),
        ("z_image", "porter parity PORT compares its recorded reference"),
        ("none.py", "no such case file"),
        ("no/such", "no such case file"),
    ],
)
@pytest.mark.parametrize("verb", [["parity", "--case"], ["parity", "record"]])
def test_no_such_case(name: str, words: str, verb: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*verb, name]) in (2, 4)
    assert words in capsys.readouterr().err


def test_a_file_that_cannot_be_read_names_no_code(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_bytes(b"COMMIT = '\xff'\nREPOSITORY = 1\n")
    assert Pinned.of(str(tmp_path / "a.py")) == Pinned.of(str(tmp_path / "b.py:x")) == Pinned()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--inputs", "nope.safetensors"], "--inputs nope.safetensors has no effect"),
        (["--prompt", "a circle"], "--prompt has no effect"),
        (["--steps", "3"], "--steps has no effect"),
        (["--component", "vae"], "--component has no effect"),
        (["--device", "nonsense"], "no such device"),
        (["--device", "meta"], "not available"),
    ],
)
def test_options_that_a_case_would_ignore(
    words: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(CODE.format(commit=""))
    words = [*words, "--reference-repo", str(tmp_path)]
    assert main(["parity", "--case", str(file), *words, "-o", str(tmp_path / "r")]) == 2
    assert says in capsys.readouterr().err and not (tmp_path / "r").exists()


def test_the_folder_of_the_code_may_be_named_itself(tmp_path: Path) -> None:
    (tmp_path / "packages" / "core").mkdir(parents=True)
    pinned = Pinned(source="packages/core")
    assert pinned.folder(tmp_path) == tmp_path / "packages" / "core" == pinned.folder(tmp_path / "packages" / "core")
    assert not pinned.folder(tmp_path / "packages").is_dir()  # which is said
    assert Pinned().folder(tmp_path) == tmp_path
