"""Any bytes at all: the readers of headers, indexes, JSON and pointers end in a result or in an error of ours.

The examples are the same in every run. GGUF and torch files are fuzzed in `test_formats.py`.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from porter.core.card import read_card
from porter.core.checkpoint import BITS, parse_header, read_bytes, read_header, read_sharded
from porter.core.errors import BadInputError, MissingError, PorterError
from porter.core.files import FileInfo, file_info, list_files, read_json
from porter.core.headers import read_any, read_ranged
from porter.core.hub import listed
from porter.core.trouble import Trouble


def stable(examples: int) -> settings:
    return settings(max_examples=examples, derandomize=True, deadline=None, database=None,
                    suppress_health_check=list(HealthCheck))  # fmt: skip


@contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def ours(read: Callable[[], Any]) -> Any:
    """The result of a reader, or the error of ours that it ended in; whatever else it raises fails the test."""
    try:
        return read()
    except PorterError as error:
        assert isinstance(error, BadInputError | MissingError) and str(error) and error.hint
        return error


names = st.text(max_size=8) | st.sampled_from(["__metadata__", "a", "b", "../x", "\0", ""])
numbers = st.integers(-2, 40) | st.sampled_from([2**31, 2**62, 2**63 - 1, 2**63, 2**64, 10**30, -1])
junk = st.recursive(
    st.none() | st.booleans() | numbers | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4),
    max_leaves=8,
)
fields = {
    "dtype": st.sampled_from([*BITS, "Q4", ""]) | junk,
    "shape": st.lists(numbers, max_size=4) | junk,
    "data_offsets": st.lists(numbers, min_size=2, max_size=2) | junk,
}
entries = st.fixed_dictionaries(fields) | st.dictionaries(st.sampled_from([*fields, "x"]), junk) | junk
documents = st.dictionaries(names, entries, max_size=4) | junk


@stable(300)
@given(st.binary(max_size=200) | documents.map(lambda found: json.dumps(found).encode("utf-8", "surrogatepass")),
       st.integers(0, 300))  # fmt: skip
def test_headers(text: bytes, data: int) -> None:
    """As text, as a file, and by ranges: the same result."""
    whole = len(text).to_bytes(8, "little") + text + b"\0" * data
    with folder() as place:
        path = place / "m.safetensors"
        path.write_bytes(whole)
        results = [
            ours(lambda: parse_header(text, path, len(whole))),
            ours(lambda: read_header(path)),
            ours(lambda: read_any(path)),
            ours(lambda: read_ranged(lambda begin, end: whole[begin:end], path, len(whole), 16)),
        ]
        assert len({str(result) for result in results[:2]}) == 1
        if not isinstance(results[0], PorterError):
            assert results[0] == results[1] == results[2] == results[3]


@stable(200)
@given(st.binary(max_size=120), st.integers(0, 2**64 - 1) | st.integers(0, 200))
def test_lengths(rest: bytes, length: int) -> None:
    with folder() as place:
        (place / "m.safetensors").write_bytes(length.to_bytes(8, "little") + rest)
        assert isinstance(ours(lambda: read_header(place / "m.safetensors")), PorterError | tuple)
        (place / "m.safetensors").write_bytes(rest)
        ours(lambda: read_any(place / "m.safetensors"))


arrays = st.builds(
    lambda dtype, shape: np.arange(int(np.prod(shape))).astype(dtype).reshape(shape),
    st.sampled_from(["float32", "float16", "int8", "uint8", "int64", "bool", "float64"]),
    st.lists(st.integers(0, 4), max_size=3),
)
plain = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6).filter(lambda n: n != "__metadata__")


@stable(150)
@given(st.dictionaries(plain, arrays, max_size=4), st.dictionaries(plain, plain, max_size=2))
def test_what_safetensors_writes_comes_back(tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    with folder() as place:
        path = place / "m.safetensors"
        path.write_bytes(save(tensors, metadata or None))  # of nothing and {} it writes no JSON
        header, found = read_header(path)
        assert found == metadata and set(header) == set(tensors)
        for name, tensor in tensors.items():
            assert header[name].shape == tensor.shape and read_bytes(header[name]) == tensor.tobytes()


@stable(300)
@given(st.data())
def test_what_is_taken_safetensors_takes_too(data: st.DataObject) -> None:
    """A good file with one byte changed, cut or added: whatever still reads as a header is one to safetensors."""
    raw = bytearray(save({"a": np.ones((2, 3), "float32"), "b": np.ones(5, "int8")}, {"k": "v"}))
    at = data.draw(st.integers(0, len(raw) - 1))
    how = data.draw(st.sampled_from(["change", "remove", "insert"]))
    if how == "change":
        raw[at] = data.draw(st.integers(0, 255))
    elif how == "remove":
        del raw[at]
    else:
        raw.insert(at, data.draw(st.integers(0, 255)))
    with folder() as place:
        path = place / "m.safetensors"
        path.write_bytes(raw)
        found = ours(lambda: read_header(path))
        if isinstance(found, PorterError):
            return
        try:
            with safe_open(path, "np") as file:
                assert set(file.keys()) == set(found[0])
        except SafetensorError as error:
            raise AssertionError(f"safetensors refuses what we took: {error}, {bytes(raw)!r}") from error


spans = st.tuples(st.integers(0, 6), st.integers(0, 3))


@stable(300)
@given(st.lists(spans, max_size=4), st.integers(-1, 2))
def test_ranges_that_are_taken_safetensors_takes_too(places: list[tuple[int, int]], more: int) -> None:
    """Tensors anywhere, often back to back: gaps and overlaps are refused, and what is left is whole."""
    entries = {
        str(number): {"dtype": "U8", "shape": [size], "data_offsets": [begin, begin + size]}
        for number, (begin, size) in enumerate(places)
    }
    text = json.dumps(entries).encode()
    data = max([0, *(begin + size for begin, size in places)]) + more
    with folder() as place:
        path = place / "m.safetensors"
        path.write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * data)
        taken = not isinstance(ours(lambda: read_header(path)), PorterError)
        covered = sorted(at for begin, size in places for at in range(begin, begin + size))
        assert not taken or covered == list(range(data))
        try:
            with safe_open(path, "np") as file:
                file.keys()
        except SafetensorError as error:
            assert not taken, f"safetensors refuses what we took: {error}, {entries}"


PLACES = [
    "s.safetensors", "t.safetensors", "../s.safetensors", "/etc/passwd", "a/../../x", "out", "loop", "sub", "C:x", ".",
    "sub/s.safetensors", "pipe",
]  # fmt: skip
shards = st.sampled_from([*PLACES, "", "x" * 300, "a\0b", "a\\b"]) | names


@stable(200)
@given(
    st.dictionaries(st.sampled_from(["a", "b", "c"]), shards | junk, max_size=4) | junk, junk, st.binary(max_size=30)
)
def test_indexes(places: Any, metadata: Any, tail: bytes) -> None:
    with folder() as outer:
        place = outer / "model"
        (place / "sub").mkdir(parents=True)
        (outer / "s.safetensors").write_bytes(save({"a": np.ones(2, "int8")}))
        (place / "s.safetensors").write_bytes(save({"a": np.ones(2, "int8"), "b": np.ones(1, "int8")}))
        (place / "t.safetensors").write_bytes(save({"c": np.ones(3, "int8")}))
        (place / "out").symlink_to(outer / "s.safetensors")
        (place / "loop").symlink_to("loop")
        os.mkfifo(place / "pipe")
        index = place / "m.safetensors.index.json"
        index.write_bytes(json.dumps({"metadata": metadata, "weight_map": places}).encode("utf-8", "surrogatepass"))
        found = ours(lambda: read_sharded(index))
        if isinstance(found, dict):
            assert isinstance(places, dict) and set(found) == set(places)
            assert all(info.file.resolve().is_relative_to(place.resolve()) for info in found.values() if info.file)
        else:
            assert isinstance(found, BadInputError | MissingError)
        index.write_bytes(tail)
        ours(lambda: read_sharded(index))


@stable(300)
@given(st.binary(max_size=60) | junk.map(lambda found: json.dumps(found).encode("utf-8", "surrogatepass")))
def test_json(raw: bytes) -> None:
    with folder() as place:
        (place / "c.json").write_bytes(raw)
        found = ours(lambda: read_json(place / "c.json"))
        if not isinstance(found, PorterError):
            json.dumps(found, allow_nan=False).encode()  # what was taken can be given on
            assert found == json.loads(raw)


POINTER = b"version https://git-lfs.github.com/spec/v1\n"


@stable(200)
@given(st.binary(max_size=80), st.sampled_from([b"", POINTER, POINTER + b"oid sha256:" + b"ab" * 32 + b"\nsize "]))
def test_pointers(rest: bytes, start: bytes) -> None:
    with folder() as place:
        (place / "w.safetensors").write_bytes(start + rest)
        found = ours(lambda: file_info(place / "w.safetensors"))
        if isinstance(found, FileInfo):
            assert 0 <= found.size < 2**63 and found.lfs_pointer == (start + rest).startswith(POINTER[:-1])
        assert isinstance(ours(lambda: list_files(place)), BadInputError | dict)


class Entry:
    """One file of a hub's listing, as huggingface_hub hands it over, unchecked."""

    lfs = None

    def __init__(self, name: Any, size: Any) -> None:
        self.rfilename, self.size = name, size


@stable(200)
@given(st.lists(st.builds(Entry, names | junk, numbers | junk), max_size=4) | junk)
def test_listings_of_a_hub(siblings: Any) -> None:
    if isinstance(siblings, list) and not all(isinstance(entry, Entry) for entry in siblings):
        return  # huggingface_hub makes entries of them, or fails
    found = ours(lambda: listed(siblings, Trouble("acme/tiny")))
    if isinstance(found, dict):
        for name in found:
            path = Path("/model") / name
            assert path.is_relative_to("/model") and ".." not in path.parts


PIECES = [
    "license: ", "mit", "\n", "base_model:", "- a/b", "[", "{", "&a ", "*a", "!!python/object:os.system ", "  x", "'",
    '"', "extra_gated_x: ", "license_link: >\n", ": ", "---", "\t", "<<: ",
]  # fmt: skip
KNOWN = {"license", "license_name", "license_link", "library_name", "pipeline_tag", "base_model", "gated"}


@stable(300)
@given(st.text(max_size=200) | st.lists(st.sampled_from(PIECES), max_size=30).map("".join))
def test_cards(text: str) -> None:
    for found in (read_card(text), read_card(f"---\n{text}\n---\n# A model\n")):
        assert set(found) <= KNOWN
        assert all(isinstance(value, str) or key == "base_model" for key, value in found.items())
        assert all(isinstance(word, str) for word in found.get("base_model", []))
