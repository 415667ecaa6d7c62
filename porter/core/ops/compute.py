"""Ops that make new numbers. But for a cast, their steps are computed with torch, tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from porter.core.checkpoint import ANY, dtype_code
from porter.core.errors import RecipeError
from porter.core.ops.base import Exactness, Op, expect, numbers, size_of
from porter.core.patterns import Size, evaluate
from porter.core.views import Run, Shape, View

# (significant bits, exponent bits) of the floating-point dtypes that can be cast.
_PRECISION = {"F64": (53, 11), "F32": (24, 8), "F16": (11, 5), "BF16": (8, 8)}
TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8",
    "BOOL": "bool",
}  # fmt: skip


@dataclass(frozen=True)
class Cast(Op):
    """Convert every value to the dtype `to` (a code, or one per value); `before` is filled in by `bind`."""

    to: str | tuple[str, ...]
    before: tuple[str, ...] = ()

    @property
    def exactness(self) -> Exactness:
        pairs = zip(self.before, self._each(len(self.before)), strict=True)
        return "exact" if all(widens(old, new) for old, new in pairs) else "lossy"

    def bind(self, views: Sequence[View], parameters: Mapping[str, int]) -> Cast:
        before = tuple(view.dtype for view in views)
        after = tuple(dtype_code(dtype) for dtype in self._each(len(views)))
        for old, new in zip(before, after, strict=True):
            if old != new and not {old, new} <= _PRECISION.keys():
                raise RecipeError(
                    f"cannot cast {old} to {new}", expected=f"two of {', '.join(_PRECISION)}", found=f"{old} and {new}"
                )
        return Cast(after, before)

    def move(self, views: Sequence[View]) -> list[View]:
        after = self._each(len(views))
        return [View(dtype, view.shape, view.runs) for dtype, view in zip(after, views, strict=True)]

    def compute(self, tensors: list[Any], torch: Any) -> list[Any]:
        after = self._each(len(tensors))
        return [
            tensor if old == new else tensor.to(getattr(torch, TORCH_NAMES[new]))
            for tensor, old, new in zip(tensors, self.before, after, strict=True)
        ]

    def inverse(self) -> Cast:
        return Cast(self.before, self._each(len(self.before)))

    def pairs(self) -> list[tuple[str, str]]:
        """(dtype before, dtype after) of each value; after `bind`."""
        return list(zip(self.before, self._each(len(self.before)), strict=True))

    def describe(self) -> str:
        return f"cast to {self.to if isinstance(self.to, str) else ', '.join(dict.fromkeys(self.to))}"

    def _each(self, count: int) -> tuple[str, ...]:
        return (self.to,) * count if isinstance(self.to, str) else self.to


@dataclass(frozen=True)
class Compute(Op):
    """Base of the ops whose results are no elements of a source."""

    def made(self, views: Sequence[View], dtype: str, shape: Shape) -> View:
        """A view of a new value; among the values alive it has a number of its own."""
        lowest = min((run.source for view in views for run in view.runs), default=0)
        return View(dtype, shape, (Run(min(lowest, 0) - 1, 0, math.prod(shape)),))


@dataclass(frozen=True)
class Offset(Compute):
    """Add a number to every element: norms that store their weight less 1. Computed in float32, rounded once."""

    value: float

    @property
    def exactness(self) -> Exactness:
        return "lossy"

    def bind(self, views: Sequence[View], parameters: Mapping[str, int]) -> Offset:
        _floating(self, expect(self, views, 1))
        return self

    def move(self, views: Sequence[View]) -> list[View]:
        return [self.made(views, views[0].dtype, views[0].shape)]

    def compute(self, tensors: list[Any], torch: Any) -> list[Any]:
        (tensor,) = tensors
        wide = tensor if tensor.dtype == torch.float64 else tensor.float()
        return [(wide + self.value).to(tensor.dtype)]

    def inverse(self) -> Offset:
        return Offset(-self.value)

    def describe(self) -> str:
        return f"add {self.value:g}"


@dataclass(frozen=True)
class Multiply(Compute):
    """(weight, gate) → the weight with each index of `dim` multiplied by the gate's value: a gate folded away.

    The gate has one value, or one for each index of `dim`. Computed in float32, rounded once to the weight's dtype.
    """

    dim: int = 0

    @property
    def exactness(self) -> Exactness:
        return "needs-base"

    def bind(self, views: Sequence[View], parameters: Mapping[str, int]) -> Multiply:
        weight, gate = expect(self, views, 2)
        _floating(self, views)
        size = size_of(self, weight, self.dim)
        if math.prod(gate.shape) not in (1, size):
            raise RecipeError(f"cannot {self.describe()}", expected=f"1 or {size} values", found=f"{list(gate.shape)}")
        return self

    def move(self, views: Sequence[View]) -> list[View]:
        return [self.made(views, views[0].dtype, views[0].shape)]

    def compute(self, tensors: list[Any], torch: Any) -> list[Any]:
        weight, gate = tensors
        shape = [1] * weight.dim()
        shape[self.dim] = gate.numel()
        wide = torch.promote_types(torch.promote_types(weight.dtype, gate.dtype), torch.float32)
        return [(weight.to(wide) * gate.to(wide).reshape(shape)).to(weight.dtype)]

    def inverse(self) -> Op:
        raise RecipeError(
            "a folded gate cannot be taken out again", expected="the original file", found=self.describe()
        )

    def describe(self) -> str:
        return f"multiply by the gate along dim {self.dim}"


@dataclass(frozen=True)
class Dequantise(Compute):
    """(data, scale) → data * scale in the dtype `to`. The scale has one value, one a row, or one a block.

    Blocks are those whose sizes divide the data's: a scale of shape (R / a, C / b) holds blocks of a x b.
    """

    to: str = "BF16"

    @property
    def exactness(self) -> Exactness:
        return "needs-base"

    def bind(self, views: Sequence[View], parameters: Mapping[str, int]) -> Dequantise:
        data, scale = expect(self, views, 2)
        if data.dtype not in TORCH_NAMES or not castable(scale.dtype):
            raise RecipeError(
                f"cannot {self.describe()}", expected="fp8 or integers, and a floating-point scale",
                found=f"{data.dtype} and {scale.dtype}",
            )  # fmt: skip
        shape = scale.shape if math.prod(scale.shape) > 1 else ()
        if len(shape) > len(data.shape) or any(
            not part or size % part for size, part in zip(data.shape, shape, strict=False)
        ):
            raise RecipeError(
                f"cannot {self.describe()}", expected=f"a scale that divides {list(data.shape)}",
                found=str(list(scale.shape)),
            )  # fmt: skip
        return Dequantise(dtype_code(self.to))

    def move(self, views: Sequence[View]) -> list[View]:
        return [self.made(views, self.to, views[0].shape)]

    def compute(self, tensors: list[Any], torch: Any) -> list[Any]:
        data, scale = tensors
        wide = scale.float()
        if scale.numel() > 1:
            for dim in range(data.dim()):
                parts = scale.shape[dim] if dim < scale.dim() else 1
                wide = wide if dim < scale.dim() else wide.unsqueeze(-1)
                wide = wide.repeat_interleave(data.shape[dim] // parts, dim)
        else:
            wide = wide.reshape(())
        return [(data.float() * wide).to(getattr(torch, TORCH_NAMES[self.to]))]

    def inverse(self) -> Op:
        raise RecipeError(
            "dequantised weights do not give the quantised ones back", expected="the original file",
            found=self.describe(),
        )  # fmt: skip

    def describe(self) -> str:
        return f"dequantise to {self.to}"


@dataclass(frozen=True)
class Constant(Compute):
    """A tensor that the source does not have: every element is `value`. Its inverse checks that, and drops it."""

    value: float
    shape: tuple[Size, ...] = ()
    dtype: str = "F32"

    def bind(self, views: Sequence[View], parameters: Mapping[str, int]) -> Constant:
        if views:
            raise RecipeError(f"cannot {self.describe()}", expected="no source tensor", found=f"{len(views)}")
        shape = tuple(evaluate(size, parameters) for size in self.shape)
        return Constant(self.value, shape, dtype_code(self.dtype))

    def move(self, views: Sequence[View]) -> list[View]:
        return [self.made(views, self.dtype, numbers(self.shape))]

    def compute(self, tensors: list[Any], torch: Any) -> list[Any]:
        return [torch.full(numbers(self.shape), self.value, dtype=getattr(torch, TORCH_NAMES[self.dtype]))]

    def inverse(self) -> Op:
        return Absent(self.value, numbers(self.shape), self.dtype)

    def describe(self) -> str:
        return f"constant {self.value:g}"


@dataclass(frozen=True)
class Absent(Compute):
    """The inverse of a constant: takes the tensor, checks that it is one, and makes nothing of it."""

    value: float
    shape: Shape
    dtype: str

    def bind(self, views: Sequence[View], parameters: Mapping[str, int]) -> Absent:
        (view,) = expect(self, views, 1)
        if (view.shape, view.dtype) != (self.shape, self.dtype):
            raise RecipeError(
                f"cannot {self.describe()}", expected=f"{self.dtype} {list(self.shape)}",
                found=f"{view.dtype} {list(view.shape)}",
            )  # fmt: skip
        return self

    def move(self, views: Sequence[View]) -> list[View]:
        return []

    def compute(self, tensors: list[Any], torch: Any) -> list[Any]:
        (tensor,) = tensors
        if tensor.device.type != "meta" and not bool((tensor == self.value).all()):
            raise RecipeError(
                f"cannot {self.describe()}", expected=f"{self.value:g} in every element", found="other values",
                hint="the other layout has no tensor for them",
            )  # fmt: skip
        return []

    def inverse(self) -> Constant:
        return Constant(self.value, self.shape, self.dtype)

    def describe(self) -> str:
        return f"leave out the constant {self.value:g}"


def widens(old: str, new: str) -> bool:
    """Whether every value of dtype `old` is also a value of dtype `new`."""
    if old == new:
        return True
    (old_bits, old_range), (new_bits, new_range) = _PRECISION[old], _PRECISION[new]
    return old_bits <= new_bits and old_range <= new_range


def castable(dtype: str) -> bool:
    """Whether a dtype policy applies to tensors of this dtype: integers and packed weights keep theirs."""
    return dtype in _PRECISION or dtype == ANY


def _floating(op: Op, views: Sequence[View]) -> None:
    if odd := [view.dtype for view in views if not castable(view.dtype)]:
        raise RecipeError(f"cannot {op.describe()}", expected=f"one of {', '.join(_PRECISION)}", found=odd[0])
