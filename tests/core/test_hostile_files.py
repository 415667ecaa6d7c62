"""Local files that change, wait or swell while they are read: a clear error, at once, in bounded memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import save_file

from porter import cli
from porter.core.checkpoint import MAX_HEADER, read_header, read_sharded
from porter.core.errors import PorterError
from porter.core.files import MAX_JSON, MAX_MARKS, file_info, read_json
from porter.core.headers import read_any
from porter.core.pickles import read_pickled
from porter.core.source import open_source

READERS: list[Callable[[Path], Any]] = [read_json, read_header, read_any, read_sharded, read_pickled, file_info]


def become_pipe(path: Path) -> None:
    os.mkfifo(path)


def become_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def become_folder(path: Path) -> None:
    path.mkdir()


def vanish(path: Path) -> None:
    pass


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes in this system's folders")
@pytest.mark.parametrize("become", [become_pipe, become_device, become_folder, vanish])
@pytest.mark.parametrize("read", READERS)
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, read: Callable[[Path], Any], become: Any) -> None:
    become(tmp_path / "m.bin")
    if read is file_info and become in (become_folder, vanish):
        return  # never asked of a folder; what vanished is an OSError, which `open_source` names
    with pytest.raises(PorterError) as caught:
        read(tmp_path / "m.bin")
    assert caught.value.exit_code in (4, 6) and caught.value.hint


@pytest.mark.parametrize("become", [become_pipe, become_device, become_folder, vanish])
@pytest.mark.parametrize("name", ["model_index.json", "vae/config.json", "ae.safetensors", "flux1-tiny.safetensors"])
def test_files_that_change_after_they_were_listed(tmp_path: Path, tiny_flux: Path, name: str, become: Any) -> None:
    model = Path(shutil.copytree(tiny_flux, tmp_path / "model"))
    source = open_source(model)
    (model / name).unlink()
    become(model / name)
    with pytest.raises(PorterError) as caught:
        source.json(name) if name.endswith(".json") else source.header(name)
    assert caught.value.exit_code in (4, 6) and name in str(caught.value)


def test_a_file_cut_after_it_was_listed(tmp_path: Path, tiny_flux: Path) -> None:
    model = Path(shutil.copytree(tiny_flux, tmp_path / "model"))
    source = open_source(model)
    for size in (1_000_000, 3000, 100, 7, 0):
        os.truncate(model / "ae.safetensors", size)
        with pytest.raises(PorterError, match=r"truncated|short") as caught:
            source.header("ae.safetensors")
        assert caught.value.exit_code == 6
    (model / "model_index.json").write_text("")
    with pytest.raises(PorterError, match="not valid JSON"):
        source.json("model_index.json")


def test_a_pipe_among_the_files_does_not_hang_the_plan(tmp_path: Path, tiny_flux: Path) -> None:
    model = Path(shutil.copytree(tiny_flux, tmp_path / "model"))
    for name in ("README.md", "config.json", "x.safetensors", "LICENSE"):
        (model / name).unlink(missing_ok=True)
        os.mkfifo(model / name)
    command = [sys.executable, "-m", "porter.cli", "plan", str(model)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    assert cli.main(["plan", str(model / "x.safetensors")]) == 6


# Memory. A process of its own reads one file; its peak is asked of the system, as a parent's would count as its own.

PROBE = """
import sys
from pathlib import Path
from porter.core import plan, survey
from porter.core.errors import PorterError
from porter.core.files import read_json
from porter.core.headers import read_any
from porter.core.checkpoint import read_sharded
try:
    {"json": read_json, "header": read_any, "index": read_sharded}[sys.argv[1]](Path(sys.argv[2]))
    print("read")
except PorterError as error:
    print(error.exit_code, error.what[-60:])
with open("/proc/self/status") as status:
    print(next(int(line.split()[1]) for line in status if line.startswith("VmHWM")))
"""


def fill(piece: str, size: int, start: str = '{"a":[', end: str = "]}") -> bytes:
    count = (size - len(start) - len(end) - 8) // (len(piece) + 1)
    return (start + ",".join([piece] * count) + end).encode()


def distinct(template: str, count: int, start: str = "{", end: str = "}") -> bytes:
    return (start + ",".join(template % (number, number) for number in range(count)) + end).encode()


LIMIT = MAX_HEADER
KEYS = MAX_MARKS // 2 - 10
TEXTS = {
    "nested": b"[" * LIMIT,
    "nested tables": b'{"a":' * (LIMIT // 5),
    "lists": fill("[]", LIMIT),
    "tables": fill("{}", LIMIT),
    "ones": fill("1", LIMIT),
    "words": fill('"ab"', LIMIT),
    "few long words": fill('"' + "x" * 1000 + '"', LIMIT),
    "one astral word": ('{"a":["' + "😀" * (LIMIT // 4 - 10) + '"]}').encode(),
    "a number without end": b'{"a":' + b"9" * (LIMIT - 10) + b"}",
    "keys": distinct('"%06x":"%06x"', KEYS),
    "metadata": distinct('"%06x":"%06x"', KEYS, '{"__metadata__":{', "}}"),
    "tensors": distinct('"%06x":{"dtype":"U8","shape":[],"data_offsets":[%d,0]}', MAX_MARKS // 12),
    "spaces": b"{" + b" " * (LIMIT - 2) + b"}",
    "99 MB of entries": distinct('"%06x":{"dtype":"U8","shape":[1],"data_offsets":[%d,0]}', 1_600_000),
}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell a process's peak memory")
@pytest.mark.parametrize("kind", ["header", "json", "index"])
@pytest.mark.parametrize("name", TEXTS)
def test_memory_is_bounded(tmp_path: Path, name: str, kind: str) -> None:
    text = TEXTS[name]
    path = tmp_path / f"m.{'safetensors' if kind == 'header' else 'json'}"
    path.write_bytes((len(text).to_bytes(8, "little") if kind == "header" else b"") + text)
    done = subprocess.run([sys.executable, "-c", PROBE, kind, str(path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    said, peak = done.stdout.splitlines()
    assert int(peak) < 150_000, f"{said}: {peak} kB"
    assert said.startswith("6 ") or kind == "json" or name in ("metadata", "spaces"), said


def test_limits_name_themselves(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    path.write_bytes(b"[" + b" " * MAX_JSON + b"]")
    with pytest.raises(PorterError, match=f"at most {MAX_JSON} bytes"):
        read_json(path)
    path.write_text(json.dumps([0] * (MAX_MARKS + 1)))
    with pytest.raises(PorterError, match=f"{MAX_MARKS} values"):
        read_json(path)
    path.write_text(json.dumps({f"block.{number}.weight": "m-1-of-1.safetensors" for number in range(200_000)}))
    assert len(read_json(path)) == 200_000


def test_a_header_of_many_tensors_is_taken(tmp_path: Path) -> None:
    """More than any released file has."""
    import numpy

    tensors = {f"model.layers.{i}.mlp.experts.{i}.down_proj.weight": numpy.zeros(1, "uint8") for i in range(35_000)}
    save_file(tensors, tmp_path / "m.safetensors", {"format": "pt"})
    assert len(read_header(tmp_path / "m.safetensors")[0]) == 35_000
