"""Weights one tensor at a time: drawn from its name, read from a file, or converted from another layout's."""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from parity.drawn import Shape, spread
from parity.hollow import Job
from porter.core.checkpoint import Header, read_header, read_sharded
from porter.core.errors import BadInputError
from porter.core.execute import apply
from porter.core.tensorplan import Step, TensorPlan

Source = Callable[[str], Tensor]
_CHUNK = 1 << 16  # numbers at a time: they stay in a core's own cache until they are finished


def drawn(name: str, shape: Shape, seed: int) -> Tensor:
    """One float32 tensor from its name and a seed, sized as `parity.drawn.draw` sizes them, and made 15 times as fast.

    The numbers are the same each time within one version of numpy.
    """
    generator = np.random.Generator(np.random.SFC64([seed, zlib.crc32(name.encode())]))
    middle, size = spread(name, shape)
    flat = np.empty(math.prod(shape), np.float32)
    low, width = np.float32(middle - size), np.float32(2 * size)
    for start in range(0, len(flat), _CHUNK):
        chunk = flat[start : start + _CHUNK]
        generator.random(dtype=np.float32, out=chunk)
        chunk *= width
        chunk += low
    return torch.from_numpy(flat.reshape(shape))


def drawing(shapes: Mapping[str, Shape], seed: int) -> Source:
    """Tensors of these shapes, drawn when they are asked for."""
    return lambda name: drawn(name, shapes[name], seed)


def reading(header: Header) -> Source:
    """Tensors of files, as float32. A file is opened anew for each, so that its pages leave memory with the tensor."""

    def read(name: str) -> Tensor:
        with safe_open(str(header[name].file), framework="pt", device="cpu") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor.to(torch.float32) if tensor.is_floating_point() else tensor

    return read


def source_of(weights: str | Path | None, shapes: Mapping[str, Shape], seed: int, keep: str = "") -> Source:
    """Tensors of these shapes: drawn, or out of `weights`, a safetensors file or the index of several.

    Args:
        keep: regular expression of what the file may hold beside them.

    Raises:
        BadInputError: the file lacks a tensor, or has others.
        MissingError, CheckpointError: it cannot be read.
    """
    if weights is None:
        return drawing(shapes, seed)
    header: Header = read_sharded(weights) if str(weights).endswith(".json") else read_header(weights)[0]
    odd = [name for name, shape in shapes.items() if name not in header or header[name].shape != shape]
    odd += [name for name in header if name not in shapes and not re.fullmatch(keep or "(?!)", name)]
    if odd:
        raise BadInputError(
            f"{weights} does not fill the reference, beginning with {odd[0]}",
            expected=f"{len(shapes)} tensors of its shapes", found=f"{len(odd)} missing, left over or of other shapes",
        )  # fmt: skip
    return reading(header)


def straight(source: Source) -> Callable[[Sequence[str]], Iterable[Job]]:
    """Both sides have the same names."""

    def jobs(names: Sequence[str]) -> Iterator[Job]:
        return (partial(lambda name: {name: source(name)}, name) for name in names)

    return jobs


class Converted:
    """The tensors that a plan makes, each step by itself from its own sources."""

    def __init__(self, plan: TensorPlan, source: Source) -> None:
        self.plan, self.source = plan, source
        self._steps = {output.name: step for step, output in plan.outputs()}

    def __call__(self, names: Sequence[str]) -> Iterator[Job]:
        """What makes these targets; a step that makes others too makes them for nothing."""
        steps = {id(step): step for name in names for step in [self._steps[name]]}
        return (partial(self._made, step, frozenset(names)) for step in steps.values())

    def _made(self, step: Step, names: Collection[str]) -> dict[str, Tensor]:
        part = replace(
            self.plan, steps=(step,), sources={name: self.plan.sources[name] for name in step.sources},
            targets={output.name: self.plan.targets[output.name] for output in step.outputs},
        )  # fmt: skip
        made = apply(part, {name: self.source(name) for name in dict.fromkeys(step.sources)})
        return {name: tensor for name, tensor in made.items() if name in names}
