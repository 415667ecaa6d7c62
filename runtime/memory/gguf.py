"""A denoiser's weights from a GGUF file. Linear layers keep the file's blocks in memory, and dequantise as they run.

The file's names are diffusers' or an original layout's: the same recipes lead to the native module. They may move whole
rows of a quantised matrix, which changes no number; whatever else is made of one is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from porter.core.chain import chain
from porter.core.checkpoint import ANY, Header, TensorInfo, specs
from porter.core.described import full_config
from porter.core.errors import BadInputError, RecipeError, UsageError
from porter.core.family import Component, families, resolve
from porter.core.gguf import QUANTISED, TYPES, read_gguf
from porter.core.onload import compile_on_load
from porter.core.recipe import compile_recipe
from porter.core.tensorplan import Output, Step, TensorPlan
from runtime.memory.files import Precision, Reader
from runtime.memory.fp8 import linears

_PREFIXES = ("model.diffusion_model.", "diffusion_model.")  # of programs that hold several models in one file
_SIZES = {name: (block, width) for name, block, width in TYPES.values()}  # of a type: numbers and bytes of a block
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


@dataclass(frozen=True)
class Rows:
    """Neighbouring rows of a stored matrix."""

    info: TensorInfo
    first: int
    count: int

    @property
    def nbytes(self) -> int:
        """Bytes of one row."""
        return (self.info.end - self.info.begin) // self.info.shape[0]


class _Blocks(nn.Module):
    weight: Tensor  # the bytes of all rows, one after the other
    bias: Tensor | None
    in_features: int
    block_parts: tuple[tuple[str, int], ...]  # type and number of rows, in their order

    def forward(self, input: Tensor) -> Tensor:
        """(…, D) -> (…, O)."""
        pieces, start = [], 0
        for kind, rows in self.block_parts:
            block, width = _SIZES[kind]
            end = start + rows * self.in_features // block * width
            pieces.append(dequantise(self.weight[start:end], kind).view(rows, -1).to(input.dtype))
            start = end
        return F.linear(input, pieces[0] if len(pieces) == 1 else torch.cat(pieces), self.bias)


@cache
def _with_blocks(kind: Any) -> Any:
    return type(f"Gguf{kind.__name__}", (_Blocks, kind), {"__module__": kind.__module__})


def dequantise(data: Tensor, kind: str) -> Tensor:
    """Bytes of whole blocks of a GGUF type -> their numbers, in one row, float32.

    Raises:
        BadInputError: a type that nothing here dequantises.
    """
    if kind in _FLOATS:
        return data.clone().view(_FLOATS[kind]).float()
    block, width = _SIZES[kind]
    found: Tensor = _function(kind)(data.view(-1, width), block, width, torch.float32)
    return found.reshape(-1)


@cache
def _function(kind: str) -> Callable[..., Tensor]:
    try:
        import gguf
        from diffusers.quantizers.gguf.utils import dequantize_functions
    except ImportError as error:
        raise UsageError(
            "quantised weights are read with the package gguf, which is not installed", found=str(error),
            hint="pip install 'diffusion-porter[gguf]'",
        ) from error  # fmt: skip
    known = {key.name: function for key, function in dequantize_functions.items()}
    if kind not in known or kind not in gguf.GGMLQuantizationType.__members__:
        raise BadInputError(
            f"no one dequantises the GGUF type {kind}", expected=", ".join(sorted(known)), found=kind,
            hint="take a file of another type, as Q8_0 or Q4_K",
        )  # fmt: skip
    found: Callable[..., Tensor] = known[kind]
    return found


class GgufHome:
    """The tensors of a native module, made of a GGUF file."""

    def __init__(self, module: nn.Module, plan: TensorPlan, header: Header, precision: Precision) -> None:
        """`module`: on the meta device; its layers are changed to take blocks.

        Raises:
            BadInputError: a quantised matrix is needed in another way than row by row, or its type is unknown.
        """
        self._header, self._precision, self._reader = header, precision, Reader()
        self._steps = {output.name: (step, output) for step, output in plan.outputs()}
        self._rows: dict[str, list[Rows]] = {}
        takers = {f"{name}.weight" for name in linears(module, tuple(self._steps))}
        for name, (step, output) in self._steps.items():
            kinds = {header[source].dtype for source in step.sources} & QUANTISED
            for kind in kinds:
                _function(kind)
            if kinds and name in takers:
                self._rows[name] = rows = _rows(header, step, output)
                layer: Any = module.get_submodule(name.removesuffix(".weight"))
                kind_of: Any = type(layer)
                layer.__class__ = _with_blocks(kind_of)
                size = sum(each.count * each.nbytes for each in rows)
                layer.weight = nn.Parameter(torch.empty(size, dtype=torch.uint8, device="meta"), False)
                layer.block_parts = tuple((each.info.dtype, each.count) for each in rows)

    @property
    def names(self) -> Sequence[str]:
        return tuple(self._steps)

    def dtype(self, name: str) -> torch.dtype:
        return torch.uint8 if name in self._rows else self._precision(name, torch.float32)

    def fetch(self, names: Sequence[str]) -> dict[str, Tensor]:
        return {name: self._blocks(name) if name in self._rows else self._dense(name) for name in names}

    def _blocks(self, name: str) -> Tensor:
        rows = self._rows[name]
        made, place = torch.empty(sum(each.count * each.nbytes for each in rows), dtype=torch.uint8), 0
        for each in rows:
            size = each.count * each.nbytes
            self._reader.into(made[place : place + size], each.info, each.first * each.nbytes)
            place += size
        return made

    def _dense(self, name: str) -> Tensor:
        step, output = self._steps[name]
        values = []
        for source in step.sources:
            info = self._header[source]
            data = self._reader.into(torch.empty(info.end - info.begin, dtype=torch.uint8), info)
            values.append(dequantise(data, info.dtype).view(info.shape))
        for op in step.ops:
            values = op.compute(values, torch)
        made = values[[each.name for each in step.outputs].index(output.name)]
        return made.to(self._precision(name, torch.float32)).contiguous()


def _rows(header: Header, step: Step, output: Output) -> list[Rows]:
    """The rows of stored matrices that a matrix is made of.

    Raises:
        BadInputError: it is made of less than whole rows, or of computed numbers.
    """
    found: list[Rows] = []
    for run in output.runs if not step.computed else ():
        info = header[step.sources[run.source]] if run.source >= 0 else None
        width = output.shape[-1]
        if info is None or len(info.shape) != 2 or info.shape[1] != width or not run.plain or run.begin % width:
            break
        if run.length % width:
            break
        found.append(Rows(info, run.begin // width, run.length // width))
    if sum(each.count for each in found) != output.shape[0]:
        raise BadInputError(
            f"{output.name} takes more than rows of the quantised {', '.join(step.sources)}",
            expected="whole rows, in any order", found=", ".join(op.describe() for op in step.ops),
            hint="take a file in diffusers' names, or --weights fp8",
        )  # fmt: skip
    return found


def gguf_home(
    path: Path, cls: Any, config: Mapping[str, Any], module: nn.Module, disk: Mapping[str, tuple[int, ...]],
    precision: Precision,
) -> GgufHome:  # fmt: skip
    """The weights of a native class from a GGUF file in diffusers' names or in an original layout's.

    Args:
        disk: shapes of the class's tensors under diffusers' names.

    Raises:
        CheckpointError: the file breaks the format.
        BadInputError: its tensors are not those of the class in any known layout.
    """
    with path.open("rb") as file:

        def read(begin: int, end: int) -> bytes:
            file.seek(begin)
            return file.read(end - begin)

        stored = read_gguf(read, path, path.stat().st_size)[0]
    prefix = next((p for p in _PREFIXES if all(name.startswith(p) for name in stored)), "")
    header = {name.removeprefix(prefix): replace(info, name=name.removeprefix(prefix)) for name, info in stored.items()}
    open_header = {name: replace(info, dtype=ANY) for name, info in header.items()}
    own = specs({name: tuple(tensor.shape) for name, tensor in module.state_dict().items()})
    recipe = getattr(cls, "on_load", None)
    if header.keys() == disk.keys():
        plan = compile_on_load(recipe, config, open_header, own)
        return GgufHome(module, plan, header, precision)
    part = _record(cls)
    faults = [] if part is None else [part.class_names[0]]
    for reference in part.layouts.values() if part is not None else ():
        full = full_config("diffusers", part.class_names[0] if part else None, config)
        try:
            first = compile_recipe(resolve(reference), full, open_header, specs(disk))
        except RecipeError as error:
            faults.append(error.what)
            continue
        return GgufHome(module, chain(first, compile_on_load(recipe, config, first.targets, own)), header, precision)
    missing, extra = sorted(disk.keys() - header.keys()), sorted(header.keys() - disk.keys())
    raise BadInputError(
        f"{path} is no {cls.__name__} in any layout that is known", expected=f"{len(disk)} tensors, as {missing[:1]}",
        found=f"{len(header)} tensors, as {extra[:1]}; {'; '.join(faults[1:])[:300]}",
        hint="take the GGUF file of the very model that the port is of",
    )  # fmt: skip


def _record(cls: Any) -> Component | None:
    """The component of the catalogue that `cls` is the native module of."""
    name = f"{cls.__module__}:{cls.__name__}"
    return next((p for f in families().values() for p in f.components if p.native == name and p.layouts), None)
