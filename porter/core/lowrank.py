"""Low-rank changes of weights, carried through a recipe: W ↦ W + scale · B A becomes the same change of what W becomes.

What moves a weight's outputs moves B's rows, what moves its inputs moves A's columns; so both stay as small as they
are. Nothing is read here: a `Matrix` says how it follows from stored tensors, and `make` computes it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from porter.core.errors import BadInputError
from porter.core.ops import Cast, Concat, Copy, Op, PermuteBlocks, Regroup, Reshape, Split, Transpose
from porter.core.ops.base import numbers
from porter.core.tensorplan import TensorPlan
from porter.core.views import Shape

WEIGHT = ".weight"  # how the tensor of a module is called that a LoRA changes


class Compute(Protocol):
    def compute(self, tensors: list[Any], torch: Any) -> list[Any]:
        """Results of some tensors."""


@dataclass(frozen=True)
class Narrow:
    """Of a tensor the part from `begin`, `length` long, along `dim`."""

    dim: int
    begin: int
    length: int

    def compute(self, tensors: list[Any], torch: Any) -> list[Any]:
        return [tensors[0].narrow(self.dim, self.begin, self.length)]


@dataclass(frozen=True)
class Lay:
    """Tensors laid into zeros of `shape`, each with its first element at (row, column) of the first two dims."""

    shape: Shape
    corners: tuple[tuple[int, int], ...]

    def compute(self, tensors: list[Any], torch: Any) -> list[Any]:
        dtype = tensors[0].dtype
        for tensor in tensors[1:]:
            dtype = torch.promote_types(dtype, tensor.dtype)
        whole = torch.zeros(self.shape, dtype=dtype, device=tensors[0].device)
        for (row, column), tensor in zip(self.corners, tensors, strict=True):
            whole[row : row + tensor.shape[0], column : column + tensor.shape[1]] += tensor
        return [whole]


@dataclass(frozen=True)
class Matrix:
    """A tensor of two dims or more: one that is stored under `name`, or a result of `how` on others."""

    shape: Shape
    name: str = ""
    how: Compute | None = None
    inputs: tuple[Matrix, ...] = ()

    def through(self, how: Compute, shape: Shape | None = None) -> Matrix:
        """The result of `how` on this one."""
        return Matrix(self.shape if shape is None else shape, how=how, inputs=(self,))


def make(matrix: Matrix, read: Callable[[str], Any], torch: Any) -> Any:
    """The torch tensor that a matrix is; `read` gives the stored ones."""
    if matrix.how is None:
        return read(matrix.name)
    (made,) = matrix.how.compute([make(each, read, torch) for each in matrix.inputs], torch)
    return made


@dataclass(frozen=True)
class Term:
    """A part of a weight's change: scale · B A, its first element at (row, column) of the weight.

    a: (rank, inputs, …) with the weight's further dims, b: (outputs, rank).
    """

    a: Matrix
    b: Matrix
    scale: float
    row: int = 0
    column: int = 0
    stem: str = field(default="", compare=False)  # what the file calls it

    @property
    def rank(self) -> int:
        return self.b.shape[1]

    def begin(self, dim: int) -> int:
        """Where it begins along a dim of the weight, 0 or 1."""
        return self.column if dim else self.row

    def size(self, dim: int) -> int:
        """How much of that dim it covers."""
        return self.a.shape[1] if dim else self.b.shape[0]

    def moved(self, dim: int, begin: int) -> Term:
        """The same, beginning elsewhere."""
        return replace(self, column=begin) if dim else replace(self, row=begin)

    def through(self, dim: int, how: Compute, size: int) -> Term:
        """The factor that has `dim` after `how`."""
        if dim:
            return replace(self, a=self.a.through(how, (self.rank, size, *self.a.shape[2:])))
        return replace(self, b=self.b.through(how, (size, self.rank)))


@dataclass(frozen=True)
class Delta:
    """The change of one weight of `shape`: a sum of terms, none of them no change."""

    shape: Shape
    terms: tuple[Term, ...] = ()


@dataclass(frozen=True)
class Span:
    """One term in a joined pair: its rows of B, its ranks (rows of A), its scale."""

    rows: tuple[int, int]
    ranks: tuple[int, int]
    scale: float


@dataclass(frozen=True)
class Joined:
    """All terms of a weight as one pair: a (R, inputs, …), b (outputs, R); rank r is scaled by its span's scale."""

    a: Matrix
    b: Matrix
    spans: tuple[Span, ...]


def carry(changes: Mapping[str, Delta], plan: TensorPlan) -> dict[str, Delta]:
    """The changes of a plan's sources (module → change) as changes of its targets.

    Raises:
        BadInputError: the plan drops a changed weight, or makes of it what no low rank says exactly.
    """
    found: dict[str, Delta] = {}
    left = dict(changes)
    for step in plan.steps:
        modules = [name.removesuffix(WEIGHT) if name.endswith(WEIGHT) else "" for name in step.sources]
        if not any(module in left for module in modules):
            continue
        values = [left.pop(module, Delta(plan.sources[name].shape))
                  for module, name in zip(modules, step.sources, strict=True)]  # fmt: skip
        stem = next(term.stem for value in values for term in value.terms)
        if not step.outputs:
            raise _uncarried(plan, stem, f"{step.sources[0]} is left out: {plan.rules[step.rule].why}")
        for op in step.ops:
            values = _through(op, values, plan, stem)
        for output, value in zip(step.outputs, values, strict=True):
            if value.terms and not output.name.endswith(WEIGHT):
                raise _uncarried(plan, stem, f"it would change {output.name}, which is no layer's weight")
            if value.terms:
                found[output.name.removesuffix(WEIGHT)] = value
    if left:
        raise _uncarried(plan, next(iter(left)), "no rule takes it")
    return found


def joined(change: Delta) -> Joined:
    """One pair of factors for a change: B block by block where its terms have A's of their own."""
    groups: dict[tuple[Matrix, int, float], list[Term]] = {}
    for term in change.terms:  # terms that share A share its ranks
        groups.setdefault((term.a, term.column, term.scale), []).append(term)
    total = sum(a.shape[0] for a, _, _ in groups)
    spans: list[Span] = []
    tops: list[tuple[Matrix, tuple[int, int]]] = []
    blocks: list[tuple[Matrix, tuple[int, int]]] = []
    rank = 0
    for (a, column, scale), terms in groups.items():
        tops.append((a, (rank, column)))
        for term in terms:
            blocks.append((term.b, (term.row, rank)))
            spans.append(Span((term.row, term.row + term.b.shape[0]), (rank, rank + a.shape[0]), scale))
        rank += a.shape[0]
    return Joined(_laid((total, *change.shape[1:]), tops), _laid((change.shape[0], total), blocks), tuple(spans))


def _laid(shape: Shape, parts: Sequence[tuple[Matrix, tuple[int, int]]]) -> Matrix:
    if len(parts) == 1 and parts[0][0].shape == shape:
        return parts[0][0]
    return Matrix(shape, how=Lay(shape, tuple(corner for _, corner in parts)), inputs=tuple(part for part, _ in parts))


def _through(op: Op, values: Sequence[Delta], plan: TensorPlan, stem: str) -> list[Delta]:
    """What a bound op makes of changed weights.

    Raises:
        BadInputError: it is no op that moves whole outputs or whole inputs.
    """
    first = values[0]
    dim = getattr(op, "dim", 0)
    if isinstance(op, Cast):
        return list(values)
    if isinstance(op, Copy):
        return [first] * numbers((op.count,))[0]
    if isinstance(op, Split) and dim < 2:
        parts, begin = [], 0
        for size in numbers(op.sizes):
            terms = [part for term in first.terms if (part := _cut(term, dim, begin, begin + size))]
            parts.append(Delta((*first.shape[:dim], size, *first.shape[dim + 1 :]), tuple(terms)))
            begin += size
        return parts
    if isinstance(op, Concat) and dim < 2:
        terms, begin = [], 0
        for value in values:
            terms += [term.moved(dim, term.begin(dim) + begin) for term in value.terms]
            begin += value.shape[dim]
        return [Delta((*first.shape[:dim], begin, *first.shape[dim + 1 :]), tuple(terms))]
    if isinstance(op, PermuteBlocks | Regroup) and dim < 2:
        size = first.shape[dim]
        return [Delta(first.shape, tuple(_whole(term, dim, size).through(dim, op, size) for term in first.terms))]
    if isinstance(op, Transpose) and op.order == (1, 0):
        return [Delta(first.shape[::-1], tuple(_turned(term, op) for term in first.terms))]
    if isinstance(op, Reshape) and (shape := numbers(op.shape))[:1] == first.shape[:1]:
        return [Delta(shape, tuple(_reshaped(_whole(term, 1, first.shape[1]), shape) for term in first.terms))]
    raise _uncarried(plan, stem, f"its weight goes through “{op.describe()}”")


def _cut(term: Term, dim: int, begin: int, end: int) -> Term | None:
    """The part of a term that lies between two places of a dim, counted from the first."""
    at, size = term.begin(dim), term.size(dim)
    low, high = max(begin, at), min(end, at + size)
    if low >= high:
        return None
    if high - low < size:
        term = term.through(dim, Narrow(dim, low - at, high - low), high - low)
    return term.moved(dim, low - begin)


def _whole(term: Term, dim: int, size: int) -> Term:
    """A term that covers all of a dim, with zeros around."""
    if term.size(dim) == size:
        return term
    matrix = term.a if dim else term.b
    shape = (term.rank, size, *term.a.shape[2:]) if dim else (size, term.rank)
    corner = (0, term.column) if dim else (term.row, 0)
    laid = Matrix(shape, how=Lay(shape, (corner,)), inputs=(matrix,))
    return (replace(term, a=laid) if dim else replace(term, b=laid)).moved(dim, 0)


def _turned(term: Term, op: Transpose) -> Term:
    """The change of the transposed weight: Aᵀ is its B."""
    a, b = term.b.through(op, term.b.shape[::-1]), term.a.through(op, term.a.shape[::-1])
    return replace(term, a=a, b=b, row=term.column, column=term.row)


def _reshaped(term: Term, shape: Shape) -> Term:
    inner = (term.rank, *shape[1:])
    return replace(term, a=term.a.through(Reshape(inner, term.a.shape), inner))


def _uncarried(plan: TensorPlan, stem: str, why: str) -> BadInputError:
    return BadInputError(
        f"the factors of {stem} cannot be carried from the {plan.source_layout} to the {plan.target_layout} layout",
        expected="a recipe that moves whole outputs or inputs of the weight", found=why,
        hint="merge the LoRA into the original weights, and convert those",
    )  # fmt: skip
