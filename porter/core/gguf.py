"""GGUF files, versions 2 and 3: which tensors are in them, without reading one.

The layout is that of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md: magic, version, two counts, key-value
pairs, tensor descriptions, then the data from the next multiple of the alignment on. Only ranges of the file's start
are asked for, so that a remote file is read by a few ranges too. Shapes come out in torch's order (the file has the
fastest dim first).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from porter.core.checkpoint import TensorInfo
from porter.core.errors import CheckpointError

MAGIC = b"GGUF"
MAX_TENSORS = 100_000
MAX_PAIRS = 10_000  # released files have below 100
MAX_WORDS = 2_000_000  # in all arrays; the largest known vocabularies have 260,000 words and as many merges
MAX_START = 64 << 20  # key-value pairs and descriptions; the largest known vocabularies take 10 MB
_STEP = 1 << 17  # first; then as much again as is here, so that at most half of what was read is not needed
_ALIGNMENT = 32
# type number -> (name, elements of a block, bytes of a block)
TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292), 16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136), 24: ("I8", 1, 1), 25: ("I16", 1, 2),
    26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8), 29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
}  # fmt: skip
QUANTISED = frozenset(name for name, block, _ in TYPES.values() if block > 1)
_NUMBERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9

Read = Callable[[int, int], bytes]


def read_gguf(read: Read, path: Path, size: int) -> tuple[dict[str, TensorInfo], dict[str, Any]]:
    """Tensors of a GGUF file of `size` bytes, in the file's order, and its key-value pairs (arrays as their length).

    Args:
        read: gives bytes [begin, end) of the file.
        path: stands in the result and in the messages.

    Raises:
        CheckpointError: the file breaks the format; the message says where.
    """
    start = _Start(read, path, size)
    if start.take(4) != MAGIC:
        raise start.bad("it is no GGUF file", "the letters GGUF", "others")
    version = start.number("<I")
    if version not in (2, 3):
        raise start.bad("its version is unknown", "GGUF 2 or 3", f"{version}")
    tensor_count, pair_count = start.number("<Q"), start.number("<Q")
    for what, count, most in (("tensors", tensor_count, MAX_TENSORS), ("key-value pairs", pair_count, MAX_PAIRS)):
        if count > most:
            raise start.bad(f"it holds too many {what}", f"at most {most}", f"{count}")
    pairs: dict[str, Any] = {}
    for _ in range(pair_count):
        key = start.text()
        if key in pairs:
            raise start.bad(f"the key {key!r} appears twice", "each key once", "two entries")
        pairs[key] = start.value(start.number("<I"))
    described: dict[str, tuple[str, tuple[int, ...], int, int]] = {}
    for _ in range(tensor_count):
        name = start.text()
        dims = start.number("<I")
        if dims > 8:
            raise start.bad(f"tensor {name!r} has too many dims", "at most 8", f"{dims}")
        shape = tuple(start.number("<Q") for _ in range(dims))[::-1]
        kind, offset = start.number("<I"), start.number("<Q")
        if kind not in TYPES:
            raise start.bad(f"tensor {name!r} has an unknown type", "a type of GGUF 3", f"{kind}")
        if name in described:
            raise start.bad(f"tensor {name!r} appears twice", "each name once", "two entries")
        code, block, width = TYPES[kind]
        count = math.prod(shape)
        if count % block or (shape and shape[-1] % block):
            raise start.bad(f"tensor {name!r} does not fill its blocks", f"rows of {block}", str(list(shape)))
        described[name] = (code, shape, offset, count // block * width)
    alignment = pairs.get("general.alignment", _ALIGNMENT)
    if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20:
        raise start.bad("its alignment is impossible", "a number of bytes", repr(alignment)[:40])
    data = -(-start.position // alignment) * alignment
    found: dict[str, TensorInfo] = {}
    previous = data
    for name, (code, shape, offset, length) in sorted(described.items(), key=lambda item: item[1][2]):
        begin = data + offset
        if offset % alignment or begin < previous or begin + length > size:
            kind_of = "truncated" if begin + length > size else "overlapping or misaligned"
            raise start.bad(
                f"tensor {name!r} is {kind_of}", f"bytes in {previous}..{size}", f"{begin}..{begin + length}"
            )
        previous = begin + length
        found[name] = TensorInfo(name, code, shape, path, begin, begin + length)
    shapes = {
        key.removeprefix("comfy.gguf.orig_shape."): key for key in pairs if key.startswith("comfy.gguf.orig_shape.")
    }
    return {name: found[name] for name in described if name in found}, {
        k: v for k, v in pairs.items() if k not in shapes
    }


class _Start:
    """The file's start, fetched in steps and taken apart from front to back."""

    def __init__(self, read: Read, path: Path, size: int) -> None:
        self._read, self.path, self.size = read, path, size
        self._bytes, self.position, self.words = bytearray(), 0, 0

    def bad(self, what: str, expected: str, found: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: {what}", expected=expected, found=found, hint="download or export the file again"
        )

    def take(self, count: int) -> bytes:
        end = self.position + count
        if end > min(self.size, MAX_START):
            limit = "the file's end" if end > self.size else f"the {MAX_START >> 20} MB that descriptions may take"
            raise self.bad("its descriptions do not end", f"everything before {limit}", f"a field up to byte {end}")
        while end > len(self._bytes):
            here = len(self._bytes)
            more = min(max(_STEP, here, end - here), self.size - here, MAX_START)
            piece = self._read(here, here + more)
            if len(piece) != more:
                raise self.bad("it became shorter while it was read", f"{here + more} bytes", f"{here + len(piece)}")
            self._bytes += piece
        piece = bytes(self._bytes[self.position : end])
        self.position = end
        return piece

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self) -> str:
        try:
            return self.take(self.number("<Q")).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.bad("a name in it is not UTF-8", "UTF-8", str(error)) from None

    def value(self, kind: int) -> Any:
        """One value; an array is passed over and gives its length."""
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            inner, count = self.number("<I"), self.number("<Q")
            if inner in _NUMBERS:
                self.take(struct.calcsize(_NUMBERS[inner]) * count)
            elif inner == _STRING:
                self.words += count
                if self.words > MAX_WORDS:
                    raise self.bad("its arrays hold too many words", f"at most {MAX_WORDS}", f"{self.words}")
                for _ in range(count):
                    self.take(self.number("<Q"))
            else:
                raise self.bad("an array in it has an unknown type", "numbers or strings", f"type {inner}")
            return count
        raise self.bad("a value in it has an unknown type", "a type of GGUF 3", f"type {kind}")
