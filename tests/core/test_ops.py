"""Ops: where each element goes (views), what torch computes, and that inverses undo both. Every element is distinct."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from porter.core.errors import RecipeError
from porter.core.ops import Cast, Concat, Drop, Op, PermuteBlocks, Reshape, Split, Squeeze, widens
from porter.core.views import Run, View, merge


def distinct(*shapes: tuple[int, ...]) -> list[np.ndarray]:
    """Arrays in which no two elements are equal, across all of them."""
    start, arrays = 0, []
    for shape in shapes:
        arrays.append(np.arange(start, start + math.prod(shape), dtype=np.float32).reshape(shape))
        start += math.prod(shape)
    return arrays


def views(arrays: list[np.ndarray]) -> list[View]:
    return [View.whole(index, "F32", array.shape) for index, array in enumerate(arrays)]


def read(view: View, sources: list[np.ndarray]) -> np.ndarray:
    parts = [sources[run.source].reshape(-1)[run.begin : run.end] for run in view.runs]
    return (np.concatenate(parts) if parts else np.zeros(0, np.float32)).reshape(view.shape)


def both(op: Op, arrays: list[np.ndarray], parameters: dict[str, int] | None = None) -> tuple[Op, list[np.ndarray]]:
    """The bound op and its results, by views and by torch, which must agree."""
    bound = op.bind(views(arrays), parameters or {})
    moved = [read(view, arrays) for view in bound.move(views(arrays))]
    computed = [t.numpy() for t in bound.compute([torch.from_numpy(a) for a in arrays], torch)]
    for one, other in zip(moved, computed, strict=True):
        np.testing.assert_array_equal(one, other)
    return bound, moved


def undone(bound: Op, results: list[np.ndarray]) -> list[np.ndarray]:
    _, back = both(bound.inverse(), results)
    return back


def test_split_takes_rows_in_order() -> None:
    bound, parts = both(Split(("h", "h", "2*h")), distinct((8, 2)), {"h": 2})
    assert [part.tolist() for part in parts] == [
        [[0, 1], [2, 3]], [[4, 5], [6, 7]], [[8, 9], [10, 11], [12, 13], [14, 15]],
    ]  # fmt: skip
    np.testing.assert_array_equal(undone(bound, parts)[0].reshape(-1), np.arange(16))


def test_swap_halves_is_not_identity() -> None:
    bound, (swapped,) = both(PermuteBlocks((1, 0)), distinct((4, 2)))
    assert swapped.tolist() == [[4, 5], [6, 7], [0, 1], [2, 3]]
    assert undone(bound, [swapped])[0].tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_unequal_blocks_come_back() -> None:
    """The inverse of an unequal permutation must cut at the permuted places."""
    (source,) = distinct((6,))
    bound, (mixed,) = both(PermuteBlocks((2, 0, 1), sizes=(1, 2, "k")), [source], {"k": 3})
    assert mixed.tolist() == [3, 4, 5, 0, 1, 2]
    assert undone(bound, [mixed])[0].tolist() == source.tolist()


def test_concat_remembers_its_sizes() -> None:
    arrays = distinct((1, 2), (3, 2))
    bound, (joined,) = both(Concat(), arrays)
    assert joined.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    for back, array in zip(undone(bound, [joined]), arrays, strict=True):
        np.testing.assert_array_equal(back, array)


def test_squeeze_and_reshape() -> None:
    (source,) = distinct((2, 3, 1, 1))
    bound, (squeezed,) = both(Squeeze((2, 3)), [source])
    assert squeezed.shape == (2, 3) and undone(bound, [squeezed])[0].shape == (2, 3, 1, 1)
    bound, (flat,) = both(Reshape(("a*b",)), distinct((2, 3)), {"a": 2, "b": 3})
    assert flat.tolist() == [0, 1, 2, 3, 4, 5] and undone(bound, [flat])[0].shape == (2, 3)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.data())
def test_chains_along_any_dim_come_back(sizes: list[int], data: st.DataObject) -> None:
    dim = data.draw(st.integers(0, 2))
    shape = [2, 3, 2]
    shape[dim] = sum(sizes)
    order = tuple(data.draw(st.permutations(range(len(sizes)))))
    (source,) = distinct(tuple(shape))
    permute, (mixed,) = both(PermuteBlocks(order, dim, tuple(sizes)), [source])
    split, parts = both(Split(tuple(sizes[i] for i in order), dim), [mixed])
    cuts = np.cumsum(sizes)[:-1]
    blocks = np.split(source, cuts, axis=dim)
    for part, index in zip(parts, order, strict=True):
        np.testing.assert_array_equal(part, blocks[index])
    (joined,) = undone(split, parts)
    np.testing.assert_array_equal(undone(permute, [joined])[0], source)


def test_cast_says_what_it_costs() -> None:
    for old, new, exact in (("BF16", "F32", True), ("F16", "F32", True), ("F32", "BF16", False), ("BF16", "F16", False),
                            ("F16", "BF16", False), ("F32", "F64", True), ("F32", "F32", True)):  # fmt: skip
        assert widens(old, new) is exact
        bound = Cast(new).bind([View.whole(0, old, (2,))], {})
        assert bound.exactness == ("exact" if exact else "lossy")
        (view,) = bound.move([View.whole(0, old, (2,))])
        assert view.dtype == new
        assert bound.inverse().move([view])[0].dtype == old
    with pytest.raises(RecipeError, match="cannot cast I64 to F32"):
        Cast("F32").bind([View.whole(0, "I64", (2,))], {})


@pytest.mark.parametrize(
    ("op", "shapes"),
    [
        (Split((2, 2)), [(5, 1)]),
        (Split((5, 0)), [(5,)]),
        (Split((1, 1), dim=1), [(2,)]),
        (Split((1, 1)), [(2,), (2,)]),
        (PermuteBlocks((1, 0)), [(3,)]),
        (PermuteBlocks((0, 0)), [(2,)]),
        (PermuteBlocks((1, 0), sizes=(1, 3)), [(3,)]),
        (Concat(), [(2, 1), (2, 2)]),
        (Concat(sizes=(1, 2)), [(2,), (1,)]),
        (Squeeze((0,)), [(2, 1)]),
        (Squeeze((4,)), [(1,)]),
        (Reshape((3,)), [(2,)]),
    ],
)
def test_ops_refuse_what_does_not_fit(op: Op, shapes: list[tuple[int, ...]]) -> None:
    with pytest.raises(RecipeError) as caught:
        op.bind(views(distinct(*shapes)), {})
    assert caught.value.expected and caught.value.found


def test_dropped_is_gone() -> None:
    op = Drop("not used at inference").bind(views(distinct((2,))), {})
    assert op.move(views(distinct((2,)))) == [] and op.exactness == "needs-base"
    with pytest.raises(RecipeError, match="cannot be restored"):
        op.inverse()


def test_neighbouring_runs_are_joined() -> None:
    assert merge([Run(0, 0, 2), Run(0, 2, 5), Run(1, 5, 6), Run(0, 6, 6), Run(1, 6, 7)]) == (Run(0, 0, 5), Run(1, 5, 7))
