"""What a rule may do to tensors: every op knows its shapes, its inverse, and what it costs in precision.

An op maps a list of values to a list of values. It does so twice: on `View`s, which only say which elements of the
source tensors stand where (so a plan can be compiled, checked and executed as byte copies without torch), and on torch
tensors in memory (`compute`). A recipe writes ops with sizes such as `"h"`; `bind` turns those into numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from porter.core.checkpoint import ANY, dtype_code
from porter.core.errors import RecipeError
from porter.core.patterns import Size, evaluate
from porter.core.views import Shape, View, cut, join

Exactness = Literal["exact", "lossy", "needs-base"]

# (significant bits, exponent bits) of the floating-point dtypes that can be cast.
_PRECISION = {"F64": (53, 11), "F32": (24, 8), "F16": (11, 5), "BF16": (8, 8)}
TORCH_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Op:
    """Base of all ops. `bind` first; then `move`, `compute` and `inverse` may be called."""

    @property
    def exactness(self) -> Exactness:
        return "exact"

    def bind(self, views: Sequence[View], parameters: Mapping[str, int]) -> Op:
        """This op with all sizes as numbers, checked against the values it will get.

        Raises:
            RecipeError: the values' number, shapes or dtypes don't fit.
        """
        raise NotImplementedError

    def move(self, views: Sequence[View]) -> list[View]:
        """The values after this op: shapes, and where each element comes from."""
        raise NotImplementedError

    def compute(self, tensors: list[Any], torch: Any) -> list[Any]:
        """The same on torch tensors."""
        raise NotImplementedError

    def inverse(self) -> Op:
        """The op that undoes this bound op."""
        raise NotImplementedError

    def describe(self) -> str:
        """A few words for people."""
        raise NotImplementedError

    def canonical(self) -> dict[str, Any]:
        """This op as JSON data; equal ops give equal data."""
        return {"op": type(self).__name__, **{field.name: getattr(self, field.name) for field in fields(self)}}


@dataclass(frozen=True)
class Split(Op):
    """One tensor → one per size, cut along `dim`: `Split(("h", "h", "h"))` unpacks a fused q, k, v."""

    sizes: tuple[Size, ...]
    dim: int = 0

    def bind(self, views: Sequence[View], parameters: Mapping[str, int]) -> Split:
        (view,) = _expect(self, views, 1)
        sizes = tuple(evaluate(size, parameters) for size in self.sizes)
        whole = _size(self, view, self.dim)
        if sum(sizes) != whole or min(sizes, default=0) <= 0:
            raise RecipeError(
                f"cannot {self.describe()}", expected=f"{_sum(sizes)} = {sum(sizes)} along dim {self.dim}",
                found=f"{whole} in shape {list(view.shape)}",
            )  # fmt: skip
        return Split(sizes, self.dim)

    def move(self, views: Sequence[View]) -> list[View]:
        return cut(views[0], _numbers(self.sizes), self.dim)

    def compute(self, tensors: list[Any], torch: Any) -> list[Any]:
        return list(tensors[0].split(list(_numbers(self.sizes)), dim=self.dim))

    def inverse(self) -> Concat:
        return Concat(self.dim, _numbers(self.sizes))

    def describe(self) -> str:
        return f"split [{', '.join(map(str, self.sizes))}]" + (f" along dim {self.dim}" if self.dim else "")


@dataclass(frozen=True)
class Concat(Op):
    """Several tensors → one, joined along `dim`. `sizes` are filled in by `bind`, so that the inverse cuts the same."""

    dim: int = 0
    sizes: tuple[Size, ...] = ()

    def bind(self, views: Sequence[View], parameters: Mapping[str, int]) -> Concat:
        first = _expect(self, views, len(self.sizes) or len(views))[0]
        sizes = tuple(_size(self, view, self.dim) for view in views)
        wanted = tuple(evaluate(size, parameters) for size in self.sizes)
        if wanted and wanted != sizes:
            raise RecipeError(f"cannot {self.describe()}", expected=f"sizes {wanted}", found=f"{sizes}")
        for view in views[1:]:
            if _without(view.shape, self.dim) != _without(first.shape, self.dim) or view.dtype != first.dtype:
                raise RecipeError(
                    f"cannot {self.describe()}", expected=f"{first.dtype} {list(first.shape)}, but for dim {self.dim}",
                    found=f"{view.dtype} {list(view.shape)}",
                )  # fmt: skip
        return Concat(self.dim, sizes)

    def move(self, views: Sequence[View]) -> list[View]:
        return [join(views, self.dim)]

    def compute(self, tensors: list[Any], torch: Any) -> list[Any]:
        return [torch.cat(tensors, dim=self.dim)]

    def inverse(self) -> Split:
        return Split(self.sizes, self.dim)

    def describe(self) -> str:
        return "concat" + (f" along dim {self.dim}" if self.dim else "")


@dataclass(frozen=True)
class PermuteBlocks(Op):
    """Cut each tensor along `dim` into `len(order)` blocks and put block `order[k]` at place k; (1, 0) swaps halves.

    Blocks are equal unless `sizes` (in source order) says otherwise.
    """

    order: tuple[int, ...]
    dim: int = 0
    sizes: tuple[Size, ...] = ()

    def bind(self, views: Sequence[View], parameters: Mapping[str, int]) -> PermuteBlocks:
        (view,) = _expect(self, views, 1)
        whole, count = _size(self, view, self.dim), len(self.order)
        if sorted(self.order) != list(range(count)) or (self.sizes and len(self.sizes) != count):
            raise RecipeError(f"cannot {self.describe()}", expected="each block once", found=str(self.order))
        sizes = tuple(evaluate(size, parameters) for size in self.sizes) or (whole // count,) * count
        if sum(sizes) != whole or min(sizes) <= 0:
            raise RecipeError(
                f"cannot {self.describe()}", expected=f"{_sum(sizes)} = {sum(sizes)} along dim {self.dim}",
                found=f"{whole} in shape {list(view.shape)}",
            )  # fmt: skip
        return PermuteBlocks(self.order, self.dim, sizes)

    def move(self, views: Sequence[View]) -> list[View]:
        blocks = cut(views[0], _numbers(self.sizes), self.dim)
        return [join([blocks[index] for index in self.order], self.dim)]

    def compute(self, tensors: list[Any], torch: Any) -> list[Any]:
        blocks = tensors[0].split(list(_numbers(self.sizes)), dim=self.dim)
        return [torch.cat([blocks[index] for index in self.order], dim=self.dim)]

    def inverse(self) -> PermuteBlocks:
        order = tuple(self.order.index(index) for index in range(len(self.order)))
        return PermuteBlocks(order, self.dim, tuple(self.sizes[index] for index in self.order))

    def describe(self) -> str:
        if self.order == (1, 0) and len(set(self.sizes)) <= 1:
            return "swap halves" + (f" along dim {self.dim}" if self.dim else "")
        return f"permute blocks {list(self.order)}" + (f" along dim {self.dim}" if self.dim else "")


@dataclass(frozen=True)
class Squeeze(Op):
    """Remove the dimensions `dims`, each of size 1: a 1x1 convolution's weight becomes a linear layer's."""

    dims: tuple[int, ...]

    def bind(self, views: Sequence[View], parameters: Mapping[str, int]) -> Reshape:
        (view,) = _expect(self, views, 1)
        if any(dim >= len(view.shape) or view.shape[dim] != 1 for dim in self.dims):
            raise RecipeError(f"cannot {self.describe()}", expected="size 1 there", found=f"shape {list(view.shape)}")
        shape = tuple(size for dim, size in enumerate(view.shape) if dim not in self.dims)
        return Reshape(shape, view.shape)

    def describe(self) -> str:
        return f"squeeze dims {', '.join(map(str, self.dims))}"


@dataclass(frozen=True)
class Reshape(Op):
    """The same elements in another shape. `before` is filled in by `bind`."""

    shape: tuple[Size, ...]
    before: Shape = ()

    def bind(self, views: Sequence[View], parameters: Mapping[str, int]) -> Reshape:
        (view,) = _expect(self, views, 1)
        shape = tuple(evaluate(size, parameters) for size in self.shape)
        if math.prod(shape) != math.prod(view.shape) or (self.before and self.before != view.shape):
            raise RecipeError(
                f"cannot {self.describe()}", expected=f"{math.prod(shape)} elements", found=f"shape {list(view.shape)}"
            )
        return Reshape(shape, view.shape)

    def move(self, views: Sequence[View]) -> list[View]:
        return [View(views[0].dtype, _numbers(self.shape), views[0].runs)]

    def compute(self, tensors: list[Any], torch: Any) -> list[Any]:
        return [tensors[0].reshape(_numbers(self.shape))]

    def inverse(self) -> Reshape:
        return Reshape(self.before, _numbers(self.shape))

    def describe(self) -> str:
        return f"reshape to [{', '.join(map(str, self.shape))}]"


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
class Drop(Op):
    """Leave a source tensor out, for a reason that the report repeats."""

    reason: str

    @property
    def exactness(self) -> Exactness:
        return "needs-base"

    def bind(self, views: Sequence[View], parameters: Mapping[str, int]) -> Drop:
        return self

    def move(self, views: Sequence[View]) -> list[View]:
        return []

    def compute(self, tensors: list[Any], torch: Any) -> list[Any]:
        return []

    def inverse(self) -> Op:
        raise RecipeError(
            "a dropped tensor cannot be restored from the port", expected="the original file", found=self.reason
        )

    def describe(self) -> str:
        return f"drop: {self.reason}"


def widens(old: str, new: str) -> bool:
    """Whether every value of dtype `old` is also a value of dtype `new`."""
    if old == new:
        return True
    (old_bits, old_range), (new_bits, new_range) = _PRECISION[old], _PRECISION[new]
    return old_bits <= new_bits and old_range <= new_range


def castable(dtype: str) -> bool:
    """Whether a dtype policy applies to tensors of this dtype: integers and packed weights keep theirs."""
    return dtype in _PRECISION or dtype == ANY


def _expect(op: Op, views: Sequence[View], count: int) -> Sequence[View]:
    if len(views) != count or not views:
        raise RecipeError(f"cannot {op.describe()}", expected=f"{count} tensors", found=f"{len(views)}")
    return views


def _size(op: Op, view: View, dim: int) -> int:
    if not 0 <= dim < len(view.shape):
        raise RecipeError(f"cannot {op.describe()}", expected=f"a dim {dim}", found=f"shape {list(view.shape)}")
    return view.shape[dim]


def _without(shape: Shape, dim: int) -> Shape:
    return shape[:dim] + shape[dim + 1 :]


def _numbers(sizes: tuple[Size, ...]) -> Shape:
    """The sizes of a bound op."""
    return tuple(evaluate(size, {}) for size in sizes)


def _sum(sizes: Sequence[int]) -> str:
    return " + ".join(map(str, sizes))
