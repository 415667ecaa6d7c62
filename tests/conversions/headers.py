"""What several recipe tests share: committed tables of original classes, and files whose every element is distinct."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from porter.core.checkpoint import Header


def original_table(path: Path) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """A table that `record_headers.py` wrote -> what stands above it, and name → shape of every tensor."""
    document = json.loads(path.read_text())
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (shape, count) in document.pop("tensors").items():
        for index in range(count):
            shapes[name.replace("*", str(index))] = tuple(shape)
    assert len(shapes) == document["tensor_count"]
    return document, shapes


def shapes_of(header: Header) -> dict[str, tuple[int, ...]]:
    return {name: info.shape for name, info in header.items()}


def fingerprint(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Tensors in which no two elements are equal, within or across tensors: a swap cannot hide."""
    total = sum(math.prod(shape) for shape in shapes.values())
    assert total < 2**24, "float32 counts no further"
    arrays, start = {}, 1
    for name, shape in shapes.items():
        count = math.prod(shape)
        arrays[name] = np.arange(start, start + count, dtype=np.float32).reshape(shape)
        start += count
    return arrays


def write(path: Path, arrays: Mapping[str, np.ndarray]) -> Path:
    save_file(dict(arrays), path)
    return path


def differing(found: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray]) -> list[str]:
    """Names that one side lacks, or whose shapes or values differ."""
    return sorted(
        name
        for name in found.keys() | wanted.keys()
        if name not in found or name not in wanted
        or found[name].shape != wanted[name].shape or not np.array_equal(found[name], wanted[name])
    )  # fmt: skip
