"""What a plan must not do: replace what is there, wait for a pipe, or take a machine's time and memory."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from porter import cli
from porter.core.atomic import write_json
from porter.core.errors import BadInputError, PorterError, ResourceError, UsageError
from porter.core.files import check_counts, list_files, read_json
from porter.core.port import Port, file_sha256, is_manifest
from porter.core.source import open_source

PLAN = {"schema": "porter.plan/1", "x": 1}


def link(path: Path) -> None:
    path.with_name("precious").write_text(json.dumps(PLAN))
    path.symlink_to("precious")


def dangling(path: Path) -> None:
    path.symlink_to("nothing")


def bind(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


THERE: dict[str, Callable[[Path], Any]] = {
    "no plan": lambda path: path.write_text("precious"),
    "a symbolic link": link,
    "symbolic link": dangling,
    "a pipe": os.mkfifo,
    "a folder": Path.mkdir,
    "a socket": bind,
    "that is no plan": lambda path: path.write_bytes(b" " * 5000 + b'"schema": "porter.plan/1"'),
}


@pytest.mark.parametrize("words", THERE)
def test_a_plan_replaces_nothing_but_a_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    path = Path("out.json")
    THERE[words](path)
    before = os.lstat(path)
    with pytest.raises(UsageError, match=words) as caught:
        write_json(path, PLAN)
    assert caught.value.hint and "out.json" in caught.value.what
    after = os.lstat(path)
    assert (before.st_ino, before.st_mode, before.st_size) == (after.st_ino, after.st_mode, after.st_size)
    assert not [left for left in tmp_path.iterdir() if left.name.endswith(".partial")]


def test_what_a_plan_and_others_may_replace(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    for number in (1, 2):
        write_json(path, {**PLAN, "x": number})
        assert json.loads(path.read_text())["x"] == number
    manifest = tmp_path / "manifest.json"
    manifest.write_text("half of one")
    write_json(manifest, {"schema": "porter.manifest/1"})
    assert is_manifest(manifest)
    with pytest.raises(ResourceError, match=r"no folder .*none") as caught:
        write_json(tmp_path / "none" / "out.json", PLAN)
    assert "mkdir -p" in (caught.value.hint or "")


def test_the_weights_survive_the_command(tmp_path: Path, tiny_flux: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = Path(shutil.copy(tiny_flux / "ae.safetensors", tmp_path))
    before = weights.read_bytes()
    assert cli.main(["plan", str(weights), "-o", str(weights)]) == 2
    assert weights.read_bytes() == before and "next:" in capsys.readouterr().err


def huge(path: Path) -> None:
    with path.open("wb") as file:
        file.write(b'{"schema": "porter.manifest/1", "a": "')
        file.truncate(3 << 30)


@pytest.mark.parametrize("become", [os.mkfifo, huge, Path.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_manifest_and_verdict_are_read_with_limits(tmp_path: Path, become: Callable[[Path], Any]) -> None:
    began = time.monotonic()
    become(tmp_path / "manifest.json")
    assert not is_manifest(tmp_path / "manifest.json")
    with pytest.raises(PorterError):
        Port.open(tmp_path)
    (tmp_path / "parity").mkdir()
    become(tmp_path / "parity" / "parity.json")
    assert Port(tmp_path, {"components": {}, "files": {}}).verdict() == "missing"
    assert time.monotonic() - began < 3


def test_a_verdict_imports_and_hashes_nothing_strange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "w")
    with pytest.raises(BadInputError):
        file_sha256(tmp_path / "w")
    port = Port(tmp_path, {"components": {}, "files": {"w": {"size": 0, "mtime_ns": 0, "sha256": ""}}})
    assert port.stale() == ["w"]
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil" / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    (tmp_path / "parity").mkdir()
    verdict = {"manifest_sha256": file_sha256(tmp_path / "manifest.json"), "code": {"evil.x": "0"}, "passed": True}
    (tmp_path / "parity" / "parity.json").write_text(json.dumps(verdict))
    assert Port(tmp_path, {"components": {}, "files": {}}).verdict() == "stale"


def test_folders_of_links_end(tmp_path: Path) -> None:
    for level in range(11, 0, -1):
        folder = tmp_path / f"d{level}"
        folder.mkdir()
        for number in range(8 if level < 11 else 0):
            (folder / f"l{number}").symlink_to(tmp_path / f"d{level + 1}")
    (tmp_path / "a.json").write_text("{}")
    began = time.monotonic()
    with pytest.raises(BadInputError, match="too many folders"):
        list_files(tmp_path)
    assert time.monotonic() - began < 5


DOCUMENTS = {
    '{"a": 12345678901234567890}': "20 digits",
    '{"a": -9223372036854775809}': "digits",
    f'{{"a": {"9" * 5000}}}': "5000 digits",
    '{"a": 1e400}': "too large for a float",
    '{"a": -1e400}': "too large for a float",
    '{"a": NaN}': "NaN",
    '{"a": ' + "[" * 100 + "]" * 100 + "}": "100 levels",
    '{"a": "' + "x" * ((1 << 20) + 1) + '"}': "text of 1048577",
    '{"' + "x" * ((1 << 20) + 1) + '": 1}': "text of 1048577",
    '{"b": {"a\\u001b": 1, "c": 2, "a\\u001b": 3}}': r"the key 'a.x1b' stands in it twice",
    '{"a": ["\\ud800"]}': "surrogate",
    '{"\\ud800": 1}': "surrogate",
}


@pytest.mark.parametrize("text", DOCUMENTS, ids=range(len(DOCUMENTS)))
def test_json_that_no_configuration_has(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(BadInputError, match=DOCUMENTS[text]) as caught:
        read_json(tmp_path / "c.json")
    assert caught.value.exit_code == 6 and caught.value.hint


def test_json_that_configurations_have(tmp_path: Path) -> None:
    document = {
        "model_max_length": int(1e30), "least": -3.4028234663852886e38, "most": 2**63, "eps": 1e-400, "a": [[{}]],
        "template": "x" * 100_000, "words": "\u00e9\U0001f600", "deep": json.loads("[" * 98 + "]" * 98),
    }  # fmt: skip
    (tmp_path / "c.json").write_text(json.dumps(document))
    assert read_json(tmp_path / "c.json") == document
    (tmp_path / "c.json").write_text('{"a": [NaN, -Infinity]}')  # a verdict may hold them
    assert read_json(tmp_path / "c.json", constants=True)["a"][1] == float("-inf")


COUNTS: list[dict[str, Any]] = [
    {"layers_per_block": 10**8},
    {"layers_per_block": [2, 10**8]},
    {"transformer_layers_per_block": [[1], [1, 10**6]]},
    {"text_config": {"num_hidden_layers": 10**9}},
    {"blocks": [{"depth": 10**5}]},
    {"num_layers": -5},
    {"block_out_channels": [1] * 5000},
    {"down_block_types": ["x"] * 5000},
]


@pytest.mark.parametrize("config", COUNTS, ids=lambda config: next(iter(config)))
def test_counts_of_layers_are_checked_in_every_config(tmp_path: Path, tiny_flux: Path, config: dict[str, Any]) -> None:
    model = Path(shutil.copytree(tiny_flux, tmp_path / "model"))
    (model / "vae" / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL", **config}))
    with pytest.raises(BadInputError, match=r"vae/config.json of .* is beyond any model"):
        open_source(model).json("vae/config.json")
    assert cli.main(["plan", str(model)]) == 6


def test_lists_of_words_may_be_long() -> None:
    check_counts({"additional_special_tokens": ["<x>"] * 5000, "num_layers": 1000, "sizes": [1] * 4096}, "here")
