"""The base of all ops, and what they check alike.

An op maps a list of values to a list of values. It does so twice: on `View`s, which only say which elements of the
source tensors stand where (so a plan can be compiled, checked and executed as byte copies without torch), and on torch
tensors in memory (`compute`). A recipe writes ops with sizes such as `"h"`; `bind` turns those into numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from porter.core.errors import RecipeError
from porter.core.patterns import Size, evaluate
from porter.core.views import Shape, View

Exactness = Literal["exact", "lossy", "needs-base"]


@dataclass(frozen=True)
class Op:
    """Base of all ops. `bind` first; then `move`, `compute`, `agreements` and `inverse` may be called."""

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

    def agreements(self, views: Sequence[View]) -> list[tuple[View, View]]:
        """Pairs of values that must be equal in every bit for this op to be true; an execution checks them."""
        return []

    def inverse(self) -> Op:
        """The op that undoes this bound op."""
        raise NotImplementedError

    def describe(self) -> str:
        """A few words for people."""
        raise NotImplementedError

    def canonical(self) -> dict[str, Any]:
        """This op as JSON data; equal ops give equal data."""
        return {"op": type(self).__name__, **{field.name: getattr(self, field.name) for field in fields(self)}}


def expect(op: Op, views: Sequence[View], count: int) -> Sequence[View]:
    """The op's values; a RecipeError unless there are `count` of them, and at least one."""
    if len(views) != count or not views:
        raise RecipeError(f"cannot {op.describe()}", expected=f"{count} tensors", found=f"{len(views)}")
    return views


def size_of(op: Op, view: View, dim: int) -> int:
    """The size of a dim; a RecipeError if there is no such dim."""
    if not 0 <= dim < len(view.shape):
        raise RecipeError(f"cannot {op.describe()}", expected=f"a dim {dim}", found=f"shape {list(view.shape)}")
    return view.shape[dim]


def check_sum(op: Op, sizes: Sequence[int], view: View, dim: int) -> None:
    """Raise a RecipeError unless the sizes fill the dim."""
    whole = size_of(op, view, dim)
    if sum(sizes) != whole or min(sizes, default=0) <= 0:
        raise RecipeError(
            f"cannot {op.describe()}", expected=f"{' + '.join(map(str, sizes))} = {sum(sizes)} along dim {dim}",
            found=f"{whole} in shape {list(view.shape)}",
        )  # fmt: skip


def without(shape: Shape, dim: int) -> Shape:
    """A shape without one dim."""
    return shape[:dim] + shape[dim + 1 :]


def numbers(sizes: tuple[Size, ...]) -> Shape:
    """The sizes of a bound op."""
    return tuple(evaluate(size, {}) for size in sizes)


def along(dim: int) -> str:
    """` along dim 1`, or nothing for the first."""
    return f" along dim {dim}" if dim else ""
