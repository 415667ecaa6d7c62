"""Pickles that attack: no code, no endless time or memory, and nothing taken that could not be a state dict."""

from __future__ import annotations

import io
import pickle
import struct
import subprocess
import sys
import time
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from porter.core.errors import CheckpointError
from porter.core.headers import read_any
from porter.core.pickles import MAX_DIRECTORY, MAX_PICKLE, read_pickled


def word(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


def name(module: str, what: str) -> bytes:
    return f"c{module}\n{what}\n".encode()


def number(value: int) -> bytes:
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little")
    return b"\x8b" + struct.pack("<I", len(raw)) + raw


def tensor(sizes: bytes = b"(K\x01t", strides: bytes = b"(K\x01t", state: bytes = b"", elements: int = 1) -> bytes:
    storage = b"(" + word("storage") + name("torch", "FloatStorage") + word("0") + word("cpu") + number(elements)
    view = name("torch._utils", "_rebuild_tensor_v2") + b"(" + storage + b"tQK\x00" + sizes + strides + b"\x89)tR"
    return view + state


def state_dict(*pairs: bytes) -> bytes:
    return b"\x80\x02}(" + b"".join(pairs) + b"u."


def zipped(path: Path, body: bytes, data: int = 4) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", body)
        archive.writestr("archive/data/0", b"\0" * data)
    return path


def old(path: Path, body: bytes) -> Path:
    heads = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({}, 2)
    path.write_bytes(heads + body + b"\0" * 64)
    return path


W = word("w")
HUGE = b"\x8a\x06" + (2**40).to_bytes(6, "little")
PAIRS = b")" + b"2\x86" * 60  # a tuple of twice the tuple before, 60 times: hashing it takes 2**60 steps
BAD = {
    "shape by state": state_dict(W, tensor(state=b"}" + word("shape") + word("abc") + b"sb")),
    "dtype by state": state_dict(W, tensor(state=b"}" + word("dtype") + b"]sb")),
    "rank 33": state_dict(W, tensor(b"(" + b"K\x01" * 33 + b"t", b"(" + b"K\x01" * 33 + b"t")),
    "rank 300,000": state_dict(W, tensor(b"(" + HUGE * 300_000 + b"t")),
    "strides of another rank": state_dict(W, tensor(b"(K\x01K\x01t")),
    "a size below 0": state_dict(W, tensor(b"(J\xff\xff\xff\xfft")),
    "a size that is true": state_dict(W, tensor(b"(\x88t")),
    "a view beyond its storage": state_dict(W, tensor(b"(K\x02t")),
    "a storage that is not there": state_dict(W, tensor(b"(" + HUGE + b"t", elements=2**40)),
    "an endless view of one element": state_dict(W, tensor(b"(" + HUGE + b"t", b"(K\x00t")),
    "a storage described twice": state_dict(word("v"), tensor(), W, tensor(elements=2)),
    "a number as long as a book": state_dict(number(1 << 40_000), tensor()),
    "a number of 65 bits": state_dict(number(1 << 65), tensor()),
    "a tuple as key": state_dict(b"K\x01K\x02\x86", tensor()),
    "a key of 2**60 steps": state_dict(PAIRS, tensor()),
    "half a character": state_dict(word("w\ud800"), tensor()),
    "a control character": state_dict(word("w\x1b[31m"), tensor()),
    "a name of two lines": state_dict(word("w\nnext"), tensor()),
    "a name of 1 MB": state_dict(word("w" * 1_000_000), tensor()),
    "one name twice": state_dict(word("a.b"), tensor(), word("a"), b"}" + word("b") + tensor() + b"s"),
    "a memo index out of line": b"\x80\x02Nr\xff\xff\xff\x7f.",
    "memo indexes ever further apart": b"\x80\x02N" + b"".join(
        b"r" + struct.pack("<I", i << 16) for i in range(9)) + b".",
    "a value that is not there": b"\x80\x02\x86.",
    "an extension": b"\x80\x02\x82\x01.",
}  # fmt: skip


@pytest.mark.parametrize("write", [zipped, old])
@pytest.mark.parametrize("attack", BAD)
def test_no_state_dict_no_tensors(tmp_path: Path, attack: str, write: object) -> None:
    began = time.monotonic()
    with pytest.raises(CheckpointError) as caught:
        read_any(write(tmp_path / "m.ckpt", BAD[attack]))  # type: ignore[operator]
    assert (caught.value.hint and str(caught.value).isprintable()) or "\n" in str(caught.value)
    assert time.monotonic() - began < 3


def test_the_same_without_the_attack_is_taken(tmp_path: Path) -> None:
    for write in (zipped, old):
        tensors, notes = read_any(write(tmp_path / "m.ckpt", state_dict(W, tensor(), number(7), tensor())))
        assert {key: (info.dtype, info.shape) for key, info in tensors.items()} == {
            "w": ("F32", (1,)), "7": ("F32", (1,)),
        }  # fmt: skip
        assert notes == {"pickled": "true", "shared": "w = 7"}
    body = state_dict(name("callbacks", "Checkpoint"), b"}", b"N", b"N", W, tensor())  # what training frameworks write
    assert read_any(zipped(tmp_path / "m.ckpt", body))[1]["code"] == "callbacks.Checkpoint"


BOMBS = {
    "tables": b"\x80\x02" + b"}" * (MAX_PICKLE - 10) + b".",
    "nothing, again and again": b"\x80\x02" + b"N0" * (MAX_PICKLE // 2 - 5) + b".",
    "words": b"\x80\x04" + b"\x8c\x02\xc4\x80" * (MAX_PICKLE // 4 - 5) + b".",
    "one list copied": b"\x80\x02" + name("collections", "OrderedDict")
    + b"q\x00](" + b"NN\x86" * 400_000 + b"e\x85q\x01"
    + b"h\x00h\x01R0" * 100_000 + b".",
    "one long name": b"\x80\x04" + word("m" * 8_000_000) + b"\x94" + b"h\x00h\x00\x930" * 200_000 + b".",
    "one long key": b"\x80\x02}" + word("k" * 4_000_000) + b"}(" + b"".join(
        word(str(i)) + (tensor() + b"q\x00" if not i else b"h\x00") for i in range(100_000)) + b"us.",
}  # fmt: skip
PROBE = """
import sys, time
from pathlib import Path
from porter.core.errors import CheckpointError
from porter.core.pickles import read_pickled
began = time.monotonic()
try:
    print(len(read_pickled(Path(sys.argv[1]))[0]))
except CheckpointError as error:
    print(error.found)
print(time.monotonic() - began)
with open("/proc/self/status") as status:
    print(next(int(line.split()[1]) for line in status if line.startswith("VmHWM")))
"""


def probe(path: Path) -> tuple[str, float, int]:
    done = subprocess.run([sys.executable, "-c", PROBE, str(path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-500:]
    said, seconds, peak = done.stdout.rsplit("\n", 3)[:3]
    return said, float(seconds), int(peak)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell a process's peak memory")
@pytest.mark.parametrize("bomb", BOMBS)
def test_time_and_memory_are_bounded(tmp_path: Path, bomb: str) -> None:
    said, seconds, peak = probe(zipped(tmp_path / "m.ckpt", BOMBS[bomb]))
    assert seconds < 30 and peak < 250_000, (said, seconds, peak)
    assert "Refused" in said or bomb == "one long name"


def directory(path: Path, entries: int) -> Path:
    """A good archive whose directory ends in `entries` more of nothing."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", state_dict(W, tensor()))
        archive.writestr("archive/data/0", b"\0" * 4)
    raw = buffer.getvalue()
    start, count = archive.start_dir, entries + 2
    more = b"PK\x01\x02" + struct.pack("<HHHHHHIIIHHHHHII", 20, 20, *(0,) * 7, 1, *(0,) * 6) + b"a"
    table = raw[start : raw.rindex(b"PK\x05\x06")] + more * entries
    end = b"PK\x06\x06" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, count, count, len(table), start)
    end += b"PK\x06\x07" + struct.pack("<IQI", 0, start + len(table), 1)
    end += b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    path.write_bytes(raw[:start] + table + end)
    return path


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell a process's peak memory")
def test_a_directory_of_many_entries(tmp_path: Path) -> None:
    assert probe(directory(tmp_path / "m.ckpt", 10))[0] == "1"
    most = MAX_DIRECTORY // 47 - 10
    said, seconds, peak = probe(directory(tmp_path / "m.ckpt", most))
    assert said == "1" and seconds < 30 and peak < 250_000, (said, seconds, peak)
    assert "directory" in probe(directory(tmp_path / "m.ckpt", most + 20))[0]


def test_views_dtypes_and_ties_that_torch_writes(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    state = OrderedDict(
        whole=base, part=base[1:, 2:], turned=base.T, none=torch.zeros(0, 5), wide=torch.ones(1).expand(4),
        small=torch.ones(3).to(torch.float8_e4m3fn), odd=torch.ones(2, dtype=torch.uint16), one=torch.tensor(1.5),
    )  # fmt: skip
    torch.save({"state_dict": state, 3: torch.nn.Parameter(torch.ones(2))}, tmp_path / "new.pt")
    tensors, notes = read_pickled(tmp_path / "new.pt")
    assert {key: info.shape for key, info in tensors.items()} == {key: tuple(v.shape) for key, v in state.items()}
    assert {key: info.end for key, info in tensors.items()} == {key: v.nbytes for key, v in state.items()}
    assert (tensors["small"].dtype, tensors["odd"].dtype) == ("F8_E4M3", "U16")
    assert notes["shared"] == "whole = part = turned"
    del state["small"], state["odd"]
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert set(read_pickled(tmp_path / "old.pt")[0]) == set(state)
