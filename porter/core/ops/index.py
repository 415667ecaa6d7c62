"""Ops that only say where elements go."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from porter.core.errors import RecipeError
from porter.core.ops.base import Exactness, Op, along, check_sum, expect, numbers, size_of, without
from porter.core.patterns import Size, evaluate
from porter.core.views import Shape, View, cut, join, permute


@dataclass(frozen=True)
class Split(Op):
    """One tensor → one per size, cut along `dim`: `Split(("h", "h", "h"))` unpacks a fused q, k, v."""

    sizes: tuple[Size, ...]
    dim: int = 0

    def bind(self, views: Sequence[View], parameters: Mapping[str, int]) -> Split:
        (view,) = expect(self, views, 1)
        sizes = tuple(evaluate(size, parameters) for size in self.sizes)
        check_sum(self, sizes, view, self.dim)
        return Split(sizes, self.dim)

    def move(self, views: Sequence[View]) -> list[View]:
        return cut(views[0], numbers(self.sizes), self.dim)

    def compute(self, tensors: list[Any], torch: Any) -> list[Any]:
        return list(tensors[0].split(list(numbers(self.sizes)), dim=self.dim))

    def inverse(self) -> Concat:
        return Concat(self.dim, numbers(self.sizes))

    def describe(self) -> str:
        return f"split [{', '.join(map(str, self.sizes))}]" + along(self.dim)


@dataclass(frozen=True)
class Concat(Op):
    """Several tensors → one, joined along `dim`. `sizes` are filled in by `bind`, so that the inverse cuts the same."""

    dim: int = 0
    sizes: tuple[Size, ...] = ()

    def bind(self, views: Sequence[View], parameters: Mapping[str, int]) -> Concat:
        expect(self, views, len(self.sizes) or len(views))
        sizes = tuple(size_of(self, view, self.dim) for view in views)
        wanted = tuple(evaluate(size, parameters) for size in self.sizes)
        if wanted and wanted != sizes:
            raise RecipeError(f"cannot {self.describe()}", expected=f"sizes {wanted}", found=f"{sizes}")
        if 0 in sizes:  # a split takes no empty part: this could not be undone
            raise RecipeError(f"cannot {self.describe()}", expected="no part of size 0", found=f"sizes {sizes}")
        _alike(self, views, self.dim)
        return Concat(self.dim, sizes)

    def move(self, views: Sequence[View]) -> list[View]:
        return [join(views, self.dim)]

    def compute(self, tensors: list[Any], torch: Any) -> list[Any]:
        return [torch.cat(tensors, dim=self.dim)]

    def inverse(self) -> Split:
        return Split(self.sizes, self.dim)

    def describe(self) -> str:
        return "concat" + along(self.dim)


@dataclass(frozen=True)
class PermuteBlocks(Op):
    """Cut each tensor along `dim` into `len(order)` blocks and put block `order[k]` at place k; (1, 0) swaps halves.

    Blocks are equal unless `sizes` (in source order) says otherwise.
    """

    order: tuple[int, ...]
    dim: int = 0
    sizes: tuple[Size, ...] = ()

    def bind(self, views: Sequence[View], parameters: Mapping[str, int]) -> PermuteBlocks:
        (view,) = expect(self, views, 1)
        whole, count = size_of(self, view, self.dim), len(self.order)
        if sorted(self.order) != list(range(count)) or (self.sizes and len(self.sizes) != count):
            raise RecipeError(f"cannot {self.describe()}", expected="each block once", found=str(self.order))
        sizes = tuple(evaluate(size, parameters) for size in self.sizes) or (whole // count,) * count
        check_sum(self, sizes, view, self.dim)
        return PermuteBlocks(self.order, self.dim, sizes)

    def move(self, views: Sequence[View]) -> list[View]:
        blocks = cut(views[0], numbers(self.sizes), self.dim)
        return [join([blocks[index] for index in self.order], self.dim)]

    def compute(self, tensors: list[Any], torch: Any) -> list[Any]:
        blocks = tensors[0].split(list(numbers(self.sizes)), dim=self.dim)
        return [torch.cat([blocks[index] for index in self.order], dim=self.dim)]

    def inverse(self) -> PermuteBlocks:
        order = tuple(self.order.index(index) for index in range(len(self.order)))
        return PermuteBlocks(order, self.dim, tuple(self.sizes[index] for index in self.order))

    def describe(self) -> str:
        if self.order == (1, 0) and len(set(self.sizes)) <= 1:
            return "swap halves" + along(self.dim)
        return f"permute blocks {list(self.order)}" + along(self.dim)


@dataclass(frozen=True)
class Regroup(Op):
    """Read `dim` as axes of `sizes`, put them in `order`, and make them one dim again.

    `Regroup(("heads", 3, "d"), (1, 0, 2))` turns rows that hold q, k and v head by head into all of q, all of k, all of
    v; one size may be 0, for whatever is left.
    """

    sizes: tuple[Size, ...]
    order: tuple[int, ...]
    dim: int = 0

    def bind(self, views: Sequence[View], parameters: Mapping[str, int]) -> Regroup:
        (view,) = expect(self, views, 1)
        whole = size_of(self, view, self.dim)
        sizes = [evaluate(size, parameters) for size in self.sizes]
        if sorted(self.order) != list(range(len(sizes))) or sizes.count(0) > 1 or min(sizes) < 0:
            raise RecipeError(f"cannot {self.describe()}", expected="each axis once", found=str(self.order))
        known = math.prod(size for size in sizes if size)
        if 0 in sizes:
            sizes[sizes.index(0)] = whole // known
        if math.prod(sizes) != whole or not whole:
            raise RecipeError(
                f"cannot {self.describe()}", expected=f"{' x '.join(map(str, sizes))} along dim {self.dim}",
                found=f"{whole} in shape {list(view.shape)}",
            )  # fmt: skip
        return Regroup(tuple(sizes), self.order, self.dim)

    def move(self, views: Sequence[View]) -> list[View]:
        (view,) = views
        inside = View(view.dtype, self._inside(view.shape), view.runs)
        return [View(view.dtype, view.shape, permute(inside, self._order(view.shape)).runs)]

    def compute(self, tensors: list[Any], torch: Any) -> list[Any]:
        shape = tuple(tensors[0].shape)
        return [tensors[0].reshape(self._inside(shape)).permute(self._order(shape)).reshape(shape)]

    def inverse(self) -> Regroup:
        sizes = tuple(numbers(self.sizes)[axis] for axis in self.order)
        return Regroup(sizes, tuple(self.order.index(axis) for axis in range(len(self.order))), self.dim)

    def describe(self) -> str:
        return f"regroup [{', '.join(map(str, self.sizes))}] as {list(self.order)}" + along(self.dim)

    def _inside(self, shape: Shape) -> Shape:
        return (*shape[: self.dim], *numbers(self.sizes), *shape[self.dim + 1 :])

    def _order(self, shape: Shape) -> tuple[int, ...]:
        count = len(self.order)
        inner = (self.dim + axis for axis in self.order)
        return (*range(self.dim), *inner, *range(self.dim + count, len(shape) + count - 1))


@dataclass(frozen=True)
class Transpose(Op):
    """The dims in another order: dim k of the result is dim `order[k]`; a matrix is transposed."""

    order: tuple[int, ...] = (1, 0)

    def bind(self, views: Sequence[View], parameters: Mapping[str, int]) -> Transpose:
        (view,) = expect(self, views, 1)
        if sorted(self.order) != list(range(len(view.shape))):
            raise RecipeError(
                f"cannot {self.describe()}", expected=f"{len(self.order)} dims", found=f"shape {list(view.shape)}"
            )
        return self

    def move(self, views: Sequence[View]) -> list[View]:
        return [permute(views[0], self.order)]

    def compute(self, tensors: list[Any], torch: Any) -> list[Any]:
        return [tensors[0].permute(self.order)]

    def inverse(self) -> Transpose:
        return Transpose(tuple(self.order.index(dim) for dim in range(len(self.order))))

    def describe(self) -> str:
        return "transpose" + ("" if self.order == (1, 0) else f" to dims {list(self.order)}")


@dataclass(frozen=True)
class Squeeze(Op):
    """Remove the dimensions `dims`, each of size 1: a 1x1 convolution's weight becomes a linear layer's."""

    dims: tuple[int, ...]

    def bind(self, views: Sequence[View], parameters: Mapping[str, int]) -> Reshape:
        (view,) = expect(self, views, 1)
        if any(dim >= len(view.shape) or view.shape[dim] != 1 for dim in self.dims):
            raise RecipeError(f"cannot {self.describe()}", expected="size 1 there", found=f"shape {list(view.shape)}")
        shape = tuple(size for dim, size in enumerate(view.shape) if dim not in self.dims)
        return Reshape(shape, view.shape)

    def describe(self) -> str:
        return f"squeeze dims {', '.join(map(str, self.dims))}"


@dataclass(frozen=True)
class Unsqueeze(Op):
    """Add dims of size 1, at these places of the result: a linear layer's weight becomes a 1x1 convolution's."""

    dims: tuple[int, ...]

    def bind(self, views: Sequence[View], parameters: Mapping[str, int]) -> Reshape:
        (view,) = expect(self, views, 1)
        shape = list(view.shape)
        for dim in sorted(self.dims):
            if dim > len(shape):
                raise RecipeError(f"cannot {self.describe()}", expected=f"{dim} dims", found=f"shape {shape}")
            shape.insert(dim, 1)
        return Reshape(tuple(shape), view.shape)

    def describe(self) -> str:
        return f"unsqueeze dims {', '.join(map(str, self.dims))}"


@dataclass(frozen=True)
class Reshape(Op):
    """The same elements in another shape. `before` is filled in by `bind`."""

    shape: tuple[Size, ...]
    before: Shape = ()

    def bind(self, views: Sequence[View], parameters: Mapping[str, int]) -> Reshape:
        (view,) = expect(self, views, 1)
        shape = tuple(evaluate(size, parameters) for size in self.shape)
        if math.prod(shape) != math.prod(view.shape) or (self.before and self.before != view.shape):
            raise RecipeError(
                f"cannot {self.describe()}", expected=f"{math.prod(shape)} elements", found=f"shape {list(view.shape)}"
            )
        return Reshape(shape, view.shape)

    def move(self, views: Sequence[View]) -> list[View]:
        return [View(views[0].dtype, numbers(self.shape), views[0].runs)]

    def compute(self, tensors: list[Any], torch: Any) -> list[Any]:
        return [tensors[0].reshape(numbers(self.shape))]

    def inverse(self) -> Reshape:
        return Reshape(self.before, numbers(self.shape))

    def describe(self) -> str:
        return f"reshape to [{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Stack(Op):
    """Several tensors of one shape → one with a new dim: the experts of a layer. `count` is filled in by `bind`."""

    dim: int = 0
    count: int = 0

    def bind(self, views: Sequence[View], parameters: Mapping[str, int]) -> Stack:
        first = expect(self, views, self.count or len(views))[0]
        if self.dim > len(first.shape):
            raise RecipeError(f"cannot {self.describe()}", expected=f"{self.dim} dims", found=f"{list(first.shape)}")
        _alike(self, views, None)
        return Stack(self.dim, len(views))

    def move(self, views: Sequence[View]) -> list[View]:
        shape = (*views[0].shape[: self.dim], 1, *views[0].shape[self.dim :])
        return [join([View(view.dtype, shape, view.runs) for view in views], self.dim)]

    def compute(self, tensors: list[Any], torch: Any) -> list[Any]:
        return [torch.stack(tensors, dim=self.dim)]

    def inverse(self) -> Unstack:
        return Unstack(self.dim, self.count)

    def describe(self) -> str:
        return "stack" + along(self.dim)


@dataclass(frozen=True)
class Unstack(Op):
    """One tensor → one for each index of `dim`, without that dim."""

    dim: int = 0
    count: Size = 0

    def bind(self, views: Sequence[View], parameters: Mapping[str, int]) -> Unstack:
        (view,) = expect(self, views, 1)
        size, wanted = size_of(self, view, self.dim), evaluate(self.count, parameters)
        if not size or (wanted and wanted != size):
            raise RecipeError(
                f"cannot {self.describe()}", expected=f"{wanted or 'some'} along dim {self.dim}",
                found=f"shape {list(view.shape)}",
            )  # fmt: skip
        return Unstack(self.dim, size)

    def move(self, views: Sequence[View]) -> list[View]:
        shape = without(views[0].shape, self.dim)
        parts = cut(views[0], (1,) * views[0].shape[self.dim], self.dim)
        return [View(part.dtype, shape, part.runs) for part in parts]

    def compute(self, tensors: list[Any], torch: Any) -> list[Any]:
        return list(tensors[0].unbind(self.dim))

    def inverse(self) -> Stack:
        return Stack(self.dim, evaluate(self.count, {}))

    def describe(self) -> str:
        return "unstack" + along(self.dim)


@dataclass(frozen=True)
class Copy(Op):
    """One tensor → `count` equal ones: an embedder that one layout shares and the other gives to every block."""

    count: Size

    def bind(self, views: Sequence[View], parameters: Mapping[str, int]) -> Copy:
        expect(self, views, 1)
        count = evaluate(self.count, parameters)
        if count < 1:
            raise RecipeError(f"cannot {self.describe()}", expected="1 or more", found=str(count))
        return Copy(count)

    def move(self, views: Sequence[View]) -> list[View]:
        return [views[0]] * evaluate(self.count, {})

    def compute(self, tensors: list[Any], torch: Any) -> list[Any]:
        return [tensors[0].clone() for _ in range(evaluate(self.count, {}))]

    def inverse(self) -> Same:
        return Same(evaluate(self.count, {}))

    def describe(self) -> str:
        return f"copy {self.count} times"


@dataclass(frozen=True)
class Same(Op):
    """`count` tensors that are equal in every bit → one: tied weights, or copies. Their equality is checked."""

    count: Size

    def bind(self, views: Sequence[View], parameters: Mapping[str, int]) -> Same:
        count = evaluate(self.count, parameters)
        expect(self, views, count)
        _alike(self, views, None)
        return Same(count)

    def move(self, views: Sequence[View]) -> list[View]:
        return [views[0]]

    def compute(self, tensors: list[Any], torch: Any) -> list[Any]:
        for index, other in enumerate(tensors[1:], start=1):
            if other.device.type != "meta" and _differ(tensors[0], other, torch):
                raise RecipeError(
                    f"cannot {self.describe()}", expected="equal tensors", found=f"number {index} differs"
                )
        return [tensors[0]]

    def agreements(self, views: Sequence[View]) -> list[tuple[View, View]]:
        return [(views[0], other) for other in views[1:]]

    def inverse(self) -> Copy:
        return Copy(evaluate(self.count, {}))

    def describe(self) -> str:
        return f"{self.count} equal tensors as one"


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


def _differ(one: Any, other: Any, torch: Any) -> bool:
    """Whether two tensors of one shape and dtype differ in a bit; -0 and 0 do, a NaN and itself do not."""
    left, right = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
    return not torch.equal(left, right)


def _alike(op: Op, views: Sequence[View], dim: int | None) -> None:
    """Raise a RecipeError unless all values have one dtype and one shape, but for `dim`."""

    def rest(view: View) -> Shape:
        return view.shape if dim is None else without(view.shape, dim)

    first = views[0]
    for view in views[1:]:
        if rest(view) != rest(first) or view.dtype != first.dtype:
            but = "" if dim is None else f", but for dim {dim}"
            raise RecipeError(
                f"cannot {op.describe()}", expected=f"{first.dtype} {list(first.shape)}{but}",
                found=f"{view.dtype} {list(view.shape)}",
            )  # fmt: skip
