"""Safetensors headers: what the reader takes, and that it refuses everything else by name."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from porter.core.checkpoint import (
    MAX_HEADER,
    dtype_code,
    header_bytes,
    parse_header,
    read_bytes,
    read_header,
    read_sharded,
    spec,
)  # fmt: skip
from porter.core.errors import CheckpointError, MissingError, PorterError


def write(path: Path, document: object, data: bytes = b"", length: int | None = None) -> Path:
    """A file with any header, honest or not."""
    text = document if isinstance(document, bytes) else json.dumps(document).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: object = "U8", shape: object = (4,), offsets: object = (0, 4)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_reads_what_safetensors_wrote(tmp_path: Path) -> None:
    tensors = {
        "b": np.arange(6, dtype=np.float32).reshape(2, 3),
        "a": np.arange(4, dtype=np.int8),
        "e": np.zeros((0, 2)),
    }
    save_file(tensors, tmp_path / "x.safetensors", {"format": "np", "k": "v"})
    header, metadata = read_header(tmp_path / "x.safetensors")
    assert metadata == {"format": "np", "k": "v"}
    assert {name: info.shape for name, info in header.items()} == {"b": (2, 3), "a": (4,), "e": (0, 2)}
    assert {name: info.dtype for name, info in header.items()} == {"b": "F32", "a": "I8", "e": "F64"}
    for name, tensor in tensors.items():
        assert read_bytes(header[name]) == tensor.tobytes()
        assert header[name].nbytes == tensor.nbytes == header[name].end - header[name].begin
    assert [info.begin for info in header.values()] == sorted(info.begin for info in header.values())


def test_writes_what_safetensors_reads(tmp_path: Path) -> None:
    from safetensors import safe_open

    data = np.arange(6, dtype=np.float32).tobytes() + bytes([1, 2])
    head = header_bytes([spec("F32", (2, 3), "x"), spec("U8", (2,), "ä")], {"format": "pt"})
    assert len(head) % 8 == 0
    (tmp_path / "x.safetensors").write_bytes(head + data)
    with safe_open(tmp_path / "x.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
        assert file.get_tensor("x").tolist() == [[0, 1, 2], [3, 4, 5]]
        assert file.get_tensor("ä").tolist() == [1, 2]


BAD = {
    "empty file": (b"", None, "too short"),
    "not a header": (b"[]", None, "not a JSON object"),
    "not json": (b"{nope", None, "not JSON"),
    "not utf-8": (b"\xff\xfe", None, "not JSON"),
    "deep json": (b"[" * 100_000, None, "not JSON"),
    "duplicate tensor": (b'{"a":{},"a":{}}', None, "'a' appears twice"),
    "duplicate field": (b'{"a":{"dtype":"U8","dtype":"I8"}}', None, "'dtype' appears twice"),
    "metadata not strings": (json.dumps({"__metadata__": {"a": 1}}).encode(), None, "__metadata__"),
    "unknown dtype": (entry("Q7"), None, "'w' has an unknown dtype"),
    "dtype not a word": (entry(["U8"]), None, "'w' has an unknown dtype"),
    "extra field": ({**entry(), "x": 1}, None, "'w' is badly described"),
    "missing field": ({"dtype": "U8"}, None, "'w' is badly described"),
    "negative size": (entry(shape=(-4,)), None, "'w' has a bad shape"),
    "fractional size": (entry(shape=(4.0,)), None, "'w' has a bad shape"),
    "boolean size": (entry(shape=(True,), offsets=(0, 1)), None, "'w' has a bad shape"),
    "too many dims": (entry(shape=(1,) * 1000), None, "'w' has a bad shape"),
    "overflow": (entry(shape=(2**40, 2**40)), None, "'w' has an impossible size"),
    "half a byte": (entry("F4", (1,), (0, 1)), None, "'w' has an impossible size"),
    "offsets reversed": (entry(offsets=(4, 0)), None, "'w' does not fill"),
    "one offset": (entry(offsets=(4,)), None, "'w' has bad data_offsets"),
    "too few bytes": (entry(shape=(5,)), None, "'w' does not fill"),
    "past the end": (entry(shape=(9,), offsets=(0, 9)), None, "truncated"),
    "gap before": (entry(offsets=(0, 4), shape=(4,)) | {"data_offsets": [2, 6]}, None, "'w' leaves a gap"),
    "longer header than file": (b"{}", 1000, "truncated in its header"),
    "huge header": (b"{}", MAX_HEADER + 1, "header too long"),
}


@pytest.mark.parametrize("name", BAD)
def test_refuses(tmp_path: Path, name: str) -> None:
    document, length, words = BAD[name]
    path = tmp_path / "bad.safetensors"
    if document == b"":
        path.write_bytes(b"123")
    else:
        write(path, document if isinstance(document, bytes) else {"w": document}, b"\0" * 4, length)
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert words in caught.value.what and str(path) in caught.value.what
    assert caught.value.expected and caught.value.found and caught.value.hint
    assert caught.value.exit_code == 6


def test_refuses_overlap_and_gap_between_tensors(tmp_path: Path) -> None:
    for second, words in (((3, 7), "overlaps"), ((5, 9), "gap"), ((0, 4), "overlaps")):
        path = write(tmp_path / "x.safetensors", {"a": entry(), "b": entry(offsets=second)}, b"\0" * second[1])
        with pytest.raises(CheckpointError, match=words):
            read_header(path)


def test_truncated_by_one_byte(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", {"a": entry()}, b"\0" * 4)
    read_header(path)
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(CheckpointError, match="truncated") as caught:
        read_header(path)
    assert caught.value.found == f"{path.stat().st_size} bytes"
    path.write_bytes(path.read_bytes() + b"\0\0")
    with pytest.raises(CheckpointError, match="longer"):
        read_header(path)


def test_lfs_pointer_says_git_lfs_pull(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(CheckpointError, match="LFS pointer") as caught:
        read_header(path)
    assert caught.value.hint == "git lfs pull --include w.safetensors"


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(MissingError):
        read_header(tmp_path / "none.safetensors")
    with pytest.raises(MissingError):
        read_sharded(tmp_path / "none.index.json")
    with pytest.raises(CheckpointError, match="is a folder"):
        read_header(tmp_path)


ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "U8", "F4", "??"]) | st.integers() | st.none(),
        "shape": st.lists(st.integers(-1, 2**63), max_size=4) | st.text(max_size=3),
        "data_offsets": st.lists(st.integers(-1, 2**64), max_size=3) | st.none(),
    }
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(st.text(max_size=4), ENTRIES | st.integers() | st.text(max_size=2), max_size=3),
    st.binary(max_size=40),
)
def test_hostile_headers_never_get_through(tmp_path: Path, document: dict[str, object], data: bytes) -> None:
    path = write(tmp_path / "h.safetensors", document, data)
    try:
        header, _ = read_header(path)
    except PorterError as error:
        assert error.exit_code == 6 and error.what
        return
    # What gets through is whole: every byte belongs to one tensor, and can be read.
    assert sum(info.nbytes for info in header.values()) == len(data)
    assert b"".join(read_bytes(info) for info in header.values()) == data


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 300))
def test_random_bytes_never_get_through_silently(text: bytes, size: int) -> None:
    try:
        header, _ = parse_header(text, Path("remote.safetensors"), size)
    except CheckpointError:
        return
    assert sum(info.nbytes for info in header.values()) == size - 8 - len(text)


def shards(root: Path) -> dict[str, str]:
    write(root / "a.safetensors", {"x": entry()}, b"\1" * 4)
    write(root / "b.safetensors", {"y": entry()}, b"\2" * 4)
    return {"x": "a.safetensors", "y": "b.safetensors"}


def test_sharded(tmp_path: Path) -> None:
    index = tmp_path / "m.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": shards(tmp_path)}))
    header = read_sharded(index)
    assert list(header) == ["x", "y"] and read_bytes(header["y"]) == b"\2" * 4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x": "../a.safetensors"}, "leaves the folder"),
        ({"x": "/etc/passwd"}, "leaves the folder"),
        ({"x": "sub\\..\\a.safetensors"}, "leaves the folder"),
        ({"x": "link.safetensors"}, "link out of its folder"),
        ({"x": "none.safetensors"}, "missing"),
        ({"x": "b.safetensors"}, "'x'"),
        ({"z": "a.safetensors"}, "'z'"),
        ({"x": 3}, "weight_map"),
    ],
)
def test_sharded_refuses(tmp_path: Path, changes: dict[str, object], words: str) -> None:
    root = tmp_path / "model"
    root.mkdir()
    places = shards(root)
    write(tmp_path / "outside.safetensors", {"x": entry()}, b"\1" * 4)
    (root / "link.safetensors").symlink_to(tmp_path / "outside.safetensors")
    index = root / "m.index.json"
    index.write_text(json.dumps({"weight_map": {**places, **changes}}))
    with pytest.raises((CheckpointError, MissingError), match=words):
        read_sharded(index)


def test_sharded_takes_the_hub_caches_links(tmp_path: Path) -> None:
    repository = tmp_path / "models--a--b"
    snapshot = repository / "snapshots" / "0123" / "transformer"
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    write(repository / "blobs" / "cafe", {"x": entry()}, b"\1" * 4)
    (snapshot / "a.safetensors").symlink_to("../../../blobs/cafe")
    (snapshot / "m.index.json").write_text(json.dumps({"weight_map": {"x": "a.safetensors"}}))
    assert list(read_sharded(snapshot / "m.index.json")) == ["x"]


def test_dtype_names() -> None:
    assert [dtype_code(n) for n in ("bf16", "torch.bfloat16", "BF16", "float32", "half")] == ["BF16"] * 3 + [
        "F32",
        "F16",
    ]
    with pytest.raises(CheckpointError, match="unknown dtype 'float7'"):
        dtype_code("float7")
