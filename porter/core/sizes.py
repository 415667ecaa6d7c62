"""Parameters of weights that were not fetched: what a Git-LFS pointer's size says, where a released model fits it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from math import prod
from typing import Any

from porter.core.architectures import Architecture, architectures

# Bytes of a file beside its tensors, for each tensor: a safetensors header has 80 to 130; torch's zip files up to 350.
LEAST, MOST = 60, 400


def parameters_by_size(class_name: str, size: int, config: Mapping[str, Any]) -> tuple[int, str] | None:
    """(parameters, released model) of a class whose weight files take `size` bytes together.

    Only where the recorded tensors of one released model, at two or four bytes each, leave as many bytes over as file
    headers take; None where none or several models do. `config` rules out those that take other channels.
    """
    channels = config.get("in_channels")
    found = {
        count: model
        for count, tensors, model, taken in _released(class_name)
        for width in (2, 4)
        if LEAST * tensors <= size - width * count <= MOST * tensors + 8192
        and (taken is None or channels is None or taken == channels)
    }
    return next(iter(found.items())) if len(found) == 1 else None


@cache
def _released(class_name: str) -> list[tuple[int, int, str, int | None]]:
    """(parameters, tensors, name, channels of its first convolution) of every released model of a class."""
    kinds = ("diffusers", "transformers")
    return [
        each for known in architectures() if known.class_name == class_name and known.layout.startswith(kinds)
        for each in _models(known)
    ]  # fmt: skip


def _models(known: Architecture) -> Iterator[tuple[int, int, str, int | None]]:
    whole = sum(count * prod(shape) for kinds in known.templates.values() for count, shape in kinds)
    tensors = sum(count for kinds in known.templates.values() for count, _ in kinds)
    for variant in known.variants:
        counts = {name: sum(count for count, _ in kinds) for name, kinds in known.templates.items()}
        if any(counts.get(name, 0) != count for name, count in variant.counts.items()):
            continue  # another depth than the recorded one
        if any(name in known.templates for name in variant.lacks):
            continue
        changed = 0
        for name, shape in variant.shapes.items():
            kinds = known.templates.get(name, ())
            if len(kinds) == 1 and kinds[0][0] == 1 and None not in shape:
                changed += prod(size for size in shape if size is not None) - prod(kinds[0][1])
        first = variant.shapes.get("conv_in.weight", (None, None))
        yield whole + changed, tensors, variant.name, first[1]
