"""The port folder: manifest, staleness, verdict."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from porter.core.errors import BadInputError, MissingError
from porter.core.port import Port, code_sha256, file_record, file_sha256, hostile_until_proven


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "port"
    (root / "vae").mkdir(parents=True)
    (root / "vae" / "w.bin").write_bytes(b"weights")
    record = file_record(root / "vae" / "w.bin", file_sha256(root / "vae" / "w.bin"))
    manifest = {
        "schema": "porter.manifest/1", "status": "complete", "direction": "diffusers",
        "source": {"spec": "x", "files": {}}, "licence": {},
        "components": {"vae": {"action": "copy", "sources": []}}, "files": {"vae/w.bin": record}, "loss": {},
    }  # fmt: skip
    (root / "manifest.json").write_text(json.dumps(manifest))
    return root


def test_open(folder: Path, tmp_path: Path) -> None:
    port = Port.open(folder)
    assert port.components == ["vae"] and port.component_dir("vae") == folder / "vae"
    with pytest.raises(MissingError, match="no component 'unet'"):
        port.component_dir("unet")
    with pytest.raises(MissingError, match="no such port folder"):
        Port.open(tmp_path / "none")
    with pytest.raises(MissingError, match="not a port"):
        Port.open(folder / "vae")


CONVERTED: dict[str, object] = {
    "action": "convert", "sources": ["a.safetensors"], "config": {}, "source_metadata": {"a": "1"}, "prefix": "",
    "source_dtypes": "F32", "weights": ["vae/a"], "recipe": {"name": "x", "reference": "x", "digest": "x"},
}  # fmt: skip


def test_a_converted_component_is_taken(folder: Path) -> None:
    document = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**document, "components": {"vae": CONVERTED}}))
    assert Port.open(folder).components == ["vae"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": "porter.manifest/9"}, "unknown schema"),
        ({"status": "partial"}, "unfinished port"),
        ({"files": None}, "damaged"),
        ({"files": {"../../etc/passwd": {"size": 1, "mtime_ns": 1, "sha256": ""}}}, "damaged"),
        ({"files": {"/etc/passwd": {"size": 1, "mtime_ns": 1, "sha256": ""}}}, "damaged"),
        ({"files": {"a": {"size": "1", "mtime_ns": 1, "sha256": ""}}}, "damaged"),
        ({"components": {"../vae": {"action": "copy", "sources": []}}}, "damaged"),
        ({"components": {"vae": {"action": "convert", "sources": []}}}, "damaged"),
        ({"source": {}}, "damaged"),
        ({"source": {"spec": "x"}}, "damaged"),
        ({"source": {"spec": "x", "files": {"a": {"size": "1"}}}}, "damaged"),
        ({"base": {"spec": "x", "files": {"a": {"size": "1"}}}}, "damaged"),
        ({"base": {"spec": "x"}}, "damaged"),
        ({"family": ["x"]}, "damaged"),
        ({"licence": None}, "damaged"),
        ({"components": {"vae": {"action": "copy", "sources": [1]}}}, "damaged"),
        ({"components": {"vae": {"action": "copy", "sources": [], "class": 3}}}, "damaged"),
        ({"components": {"vae": {"action": "copy", "sources": ["a\x1b.safetensors"]}}}, "damaged"),
        ({"components": {"vae": CONVERTED | {"source_metadata": {"a": [1]}}}}, "damaged"),
        ({"direction": "original"}, "original layout"),
    ],
)
def test_manifests_that_are_none(folder: Path, change: dict[str, object], message: str) -> None:
    document = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**document, **change}))
    with pytest.raises(BadInputError, match=message):
        Port.open(folder)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(BadInputError, match="not valid JSON"):
        Port.open(folder)


def test_stale_by_size_by_content_and_by_absence(folder: Path) -> None:
    file = folder / "vae" / "w.bin"
    assert Port.open(folder).stale() == [] == Port.open(folder).stale(full=True)
    times = file.stat()
    file.write_bytes(b"weightz")
    assert Port.open(folder).stale() == ["vae/w.bin"]
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert Port.open(folder).stale() == [] and Port.open(folder).stale(full=True) == ["vae/w.bin"]
    file.write_bytes(b"longer weights")
    assert Port.open(folder).stale() == ["vae/w.bin"]
    file.unlink()
    assert Port.open(folder).stale() == ["vae/w.bin"]


def test_stale_by_a_file_that_was_added(folder: Path) -> None:
    (folder / "vae" / "w.bin.index.json").write_text("{}")
    assert Port.open(folder).stale() == ["vae/w.bin.index.json"]


def test_a_copied_port_is_as_good_as_the_first(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile)
    copied = tmp_path / "copy" / "vae" / "w.bin"
    os.utime(copied, ns=(1, 1))
    assert Port.open(tmp_path / "copy").stale() == []


def test_verdict(folder: Path) -> None:
    port = Port.open(folder)
    assert port.verdict() == "missing"
    (folder / "parity").mkdir()
    evidence = folder / "parity" / "parity.json"
    bound = {"manifest_sha256": port.manifest_sha256, "code": {"parity": code_sha256("parity")}}
    evidence.write_text("{")
    assert port.verdict() == "missing"
    for passed, word in ((True, "passed"), (False, "failed"), ("yes", "failed"), (None, "failed")):
        evidence.write_text(json.dumps({**bound, "passed": passed}))
        assert port.verdict() == word
    for other in ({"manifest_sha256": "0" * 64}, {"code": {"parity": "0" * 64}}, {"code": {}}, {"code": {"gone": "0"}}):
        evidence.write_text(json.dumps({**bound, "passed": True, **other}))
        assert port.verdict() == "stale"
    evidence.write_text(json.dumps({**bound, "passed": True}))
    assert port.verdict() == "passed"
    (folder / "vae" / "w.bin").write_bytes(b"WEIGHTS!")
    assert port.verdict() == "stale"


def test_an_unforeseen_error_is_the_models_until_it_is_proven(folder: Path) -> None:
    """A port that passed did run: an error in it is ours, and stays what it is."""
    with pytest.raises(BadInputError, match=r"ZeroDivisionError: no heads"), hostile_until_proven(folder):
        raise ZeroDivisionError("no heads")
    port = Port.open(folder)
    bound = {"manifest_sha256": port.manifest_sha256, "code": {"parity": code_sha256("parity")}, "passed": True}
    (folder / "parity").mkdir()
    (folder / "parity" / "parity.json").write_text(json.dumps(bound))
    with pytest.raises(ZeroDivisionError), hostile_until_proven(folder):
        raise ZeroDivisionError
    (folder / "vae" / "w.bin").write_bytes(b"spoiled")
    with pytest.raises(BadInputError, match=r"changed: vae/w\.bin"), hostile_until_proven(folder):
        raise ZeroDivisionError
    with pytest.raises(MemoryError), hostile_until_proven(folder):
        raise MemoryError
