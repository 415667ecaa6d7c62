"""Checkpoints that are no safetensors: GGUF and torch's own files, listed without torch and without running them."""

from __future__ import annotations

import os
import pickle
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from porter.core.errors import CheckpointError, MissingError
from porter.core.headers import read_any
from porter.core.pickles import read_pickled
from porter.core.planning import plan

ROOT = Path(__file__).parents[2]


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def gguf(tensors: list[tuple[str, tuple[int, ...], int, int]], *, offsets: list[int] | None = None,
         pairs: bytes = b"", count: int = 0, version: int = 3, data: int | None = None) -> bytes:  # fmt: skip
    """A GGUF file: (name, shape in torch's order, type, bytes); written against the format's own description."""
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), count) + pairs
    place, body = 0, b""
    for number, (name, shape, kind, size) in enumerate(tensors):
        offset = offsets[number] if offsets else place
        dims = b"".join(struct.pack("<Q", dim) for dim in reversed(shape))
        body += text(name) + struct.pack("<I", len(shape)) + dims + struct.pack("<IQ", kind, offset)
        place += -(-size // 32) * 32
    whole = head + body
    return whole + b"\0" * (-len(whole) % 32) + b"\0" * (place if data is None else data)


GOOD = [("a.weight", (64, 512), 12, 64 * 2 * 144), ("a.bias", (64,), 0, 256), ("b", (3, 5), 1, 30)]


def test_gguf(tmp_path: Path) -> None:
    pairs = text("general.architecture") + struct.pack("<I", 8) + text("flux")
    pairs += text("list") + struct.pack("<IIQ", 9, 4, 3) + struct.pack("<III", 1, 2, 3)
    pairs += text("words") + struct.pack("<IIQ", 9, 8, 2) + text("x") + text("yz")
    (tmp_path / "m.gguf").write_bytes(gguf(GOOD, pairs=pairs, count=3))
    tensors, notes = read_any(tmp_path / "m.gguf")
    assert {name: (info.dtype, info.shape, info.end - info.begin) for name, info in tensors.items()} == {
        "a.weight": ("Q4_K", (64, 512), 18432), "a.bias": ("F32", (64,), 256), "b": ("F16", (3, 5), 30),
    }  # fmt: skip
    assert notes == {"general.architecture": "flux", "list": 3, "words": 2}
    planned = plan(tmp_path / "m.gguf")
    assert planned.components[0].dtypes == {"Q4_K": 18432, "F32": 256, "F16": 30}
    assert any("GGUF Q4_K (1 tensor)" in line for line in planned.warnings)


@pytest.mark.parametrize(("raw", "words"), [
    (gguf(GOOD, version=9), "version"),
    (gguf(GOOD, data=100), "truncated"),
    (gguf(GOOD, offsets=[0, 0, 0]), "overlapping"),
    (gguf(GOOD, offsets=[0, 18432 + 7, 18720]), "misaligned"),
    (gguf([("a", (2,), 99, 4)]), "unknown type"),
    (gguf([("a", (2,), 0, 8), ("a", (2,), 0, 8)]), "twice"),
    (gguf([("a", (7,), 12, 144)]), "blocks"),
    (gguf([("a", (2,) * 9, 0, 4)]), "dims"),
    (gguf(GOOD)[:60], "do not end"),
    (b"GGUF" + struct.pack("<IQQ", 3, 90_000, 0), "do not end"),
    (b"GGUF" + struct.pack("<IQQ", 3, 100_001, 0), "too many tensors"),
    (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), "too many tensors"),
    (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60), "too many key-value pairs"),
    (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("k") + struct.pack("<IIQ", 9, 8, 2**40), "too many words"),
    (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 2**62), "do not end"),
    (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("k") + struct.pack("<IIQ", 9, 9, 2**40), "unknown type"),
])  # fmt: skip
def test_broken_gguf(tmp_path: Path, raw: bytes, words: str) -> None:
    (tmp_path / "m.gguf").write_bytes(raw)
    with pytest.raises(CheckpointError, match=words):
        read_any(tmp_path / "m.gguf")


def test_torch_files_new_and_old(tmp_path: Path) -> None:
    state = OrderedDict(a=torch.ones(2, 3), b=torch.ones(4, dtype=torch.bfloat16), c=torch.nn.Parameter(torch.ones(2)))
    wanted = {"a": ("F32", (2, 3)), "b": ("BF16", (4,)), "c": ("F32", (2,))}
    torch.save(state, tmp_path / "new.pt")
    torch.save(state, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    torch.save({"state_dict": state, "epoch": 3, "optimizer": {"m": torch.zeros(3)}}, tmp_path / "train.ckpt")
    for name in ("new.pt", "old.bin", "train.ckpt"):
        tensors, notes = read_any(tmp_path / name)
        assert {key: (info.dtype, info.shape) for key, info in tensors.items()} == wanted, name
        assert notes["pickled"] == "true"
    nested: dict[str, Any] = {"one": {"w": torch.ones(1)}, "two": {"w": torch.ones(2)}}
    nested["self"] = nested
    torch.save(nested, tmp_path / "nested.pt")
    assert set(read_any(tmp_path / "nested.pt")[0]) == {"one.w", "two.w"}


class Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {os.environ['EVIL']}",)


def test_what_a_pickle_names_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVIL", str(tmp_path / "ran"))
    torch.save({"state_dict": {"w": torch.ones(2)}, "x": Evil()}, tmp_path / "evil.ckpt")
    _, notes = read_any(tmp_path / "evil.ckpt")
    assert notes["code"] == "posix.system" and not (tmp_path / "ran").exists()
    assert any("names code, which nobody ran: posix.system" in line for line in plan(tmp_path / "evil.ckpt").warnings)
    torch.load(tmp_path / "evil.ckpt", weights_only=False)  # it would have
    assert (tmp_path / "ran").exists()


def test_torch_files_are_read_without_torch(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "a.pt")
    code = "import sys; from porter.core.planning import plan; plan(sys.argv[1]); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.pt")], check=True, cwd=ROOT)


@pytest.mark.parametrize("raw", [
    b"", b"\x80", b"\x80\x02junk", b"\x80\x02Nr\xff\xff\xff\x7f.", b"PK\x03\x04", b"PK" + b"\0" * 100,
    pickle.dumps({"w": 1}), pickle.dumps([]), b"\x80\x04\x95" + b"\xff" * 8,
])  # fmt: skip
def test_broken_torch_files(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "m.bin").write_bytes(raw)
    with pytest.raises(CheckpointError):
        read_pickled(tmp_path / "m.bin")
    with pytest.raises(MissingError):
        read_pickled(tmp_path / "none.bin")


def test_a_compressed_bomb_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", b"\0" * 200_000_000)
    with pytest.raises(CheckpointError, match="compressed or too large"):
        read_pickled(tmp_path / "bomb.pt")


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.binary(max_size=400), st.sampled_from([b"GGUF\x03\0\0\0", b"\x80\x02", b"PK\x03\x04", b""]))
def test_any_bytes_end_in_a_clear_error(tmp_path_factory: pytest.TempPathFactory, raw: bytes, start: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.bin"
    path.write_bytes(start + raw)
    with pytest.raises((CheckpointError, MissingError)) as caught:
        if read_any(path)[0] == {}:  # a file with no tensors is a file
            raise CheckpointError("empty")
    assert str(caught.value)


def test_a_quoted_string_is_refused_without_a_warning(tmp_path: Path) -> None:
    """Found by the fuzz test: Python decodes escapes in text opcodes, and warns of those it does not know."""
    (tmp_path / "x.pt").write_bytes(b"PK\x03\x04S'\\\x00'\n.")
    (tmp_path / "y.pt").write_bytes(b"\x80\x02S'\\\x00'\n.")
    for name in ("x.pt", "y.pt"):
        with pytest.raises(CheckpointError):
            read_any(tmp_path / name)


def test_what_is_called_gguf_and_is_none(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(bytes(range(7, 90)))
    with pytest.raises(CheckpointError, match="is no GGUF file"):
        read_any(tmp_path / "m.gguf")
    save_file({"a": numpy.zeros(2, "float16")}, tmp_path / "n.gguf")  # another format is told by its beginning
    assert set(read_any(tmp_path / "n.gguf")[0]) == {"a"}
