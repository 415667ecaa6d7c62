"""Ops: where each element goes (views), what torch computes, and that inverses undo both. Every element is distinct."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from porter.core.errors import RecipeError
from porter.core.ops import (
    Cast,
    Concat,
    Constant,
    Copy,
    Dequantise,
    Drop,
    Multiply,
    Offset,
    Op,
    PermuteBlocks,
    Regroup,
    Reshape,
    Same,
    Split,
    Squeeze,
    Stack,
    Transpose,
    Unsqueeze,
    Unstack,
    widens,
)  # fmt: skip
from porter.core.views import Piece, Run, View, merge, permute, take


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
    parts = [sources[run.source].reshape(-1)[run.begin : run.end : run.step] for run in view.runs]
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


def test_transpose_and_regroup() -> None:
    (source,) = distinct((3, 4))
    bound, (turned,) = both(Transpose(), [source])
    np.testing.assert_array_equal(turned, source.T)
    assert len(bound.move(views([source]))[0].runs) == 4, "a column is one run with a stride"
    np.testing.assert_array_equal(undone(bound, [turned])[0], source)
    (source,) = distinct((2 * 3 * 2, 5))  # rows: head, then q k v, then the head's width
    bound, (regrouped,) = both(Regroup(("heads", 3, 0), (1, 0, 2)), [source], {"heads": 2})
    by_hand = source.reshape(2, 3, 2, 5).transpose(1, 0, 2, 3).reshape(12, 5)
    np.testing.assert_array_equal(regrouped, by_hand)
    np.testing.assert_array_equal(undone(bound, [regrouped])[0], source)


def test_stack_copy_and_same() -> None:
    arrays = distinct((2, 3), (2, 3))
    for dim in (0, 1, 2):
        bound, (stacked,) = both(Stack(dim), arrays)
        np.testing.assert_array_equal(stacked, np.stack(arrays, dim))
        for back, array in zip(undone(bound, [stacked]), arrays, strict=True):
            np.testing.assert_array_equal(back, array)
    bound, parts = both(Unstack(1, "n"), [arrays[0]], {"n": 3})
    np.testing.assert_array_equal(parts[2], arrays[0][:, 2])
    np.testing.assert_array_equal(undone(bound, parts)[0], arrays[0])
    bound, copies = both(Copy("n"), [arrays[0]], {"n": 3})
    assert len(copies) == 3 and bound.inverse() == Same(3)
    assert undone(bound, copies)[0].tolist() == arrays[0].tolist()
    assert len(Same(3).agreements(views(copies))) == 2
    with pytest.raises(RecipeError, match="equal tensors as one"):
        Same(2).compute([torch.zeros(2), torch.ones(2)], torch)
    bound, (wide,) = both(Unsqueeze((1, 3)), [arrays[0]])
    assert wide.shape == (2, 1, 3, 1) and undone(bound, [wide])[0].shape == (2, 3)


@settings(max_examples=120, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.data())
def test_any_chain_of_moves_is_one_gather(shape: list[int], data: st.DataObject) -> None:
    """Whatever came before, a view says where each element is; the hand-made result is numpy's."""
    (source,) = distinct(tuple(shape))
    view, array = views([source])[0], source
    for _ in range(3):
        order = tuple(data.draw(st.permutations(range(array.ndim))))
        view, array = permute(view, order), array.transpose(order)
        np.testing.assert_array_equal(read(view, [source]), array)
        dim = data.draw(st.integers(0, array.ndim - 1))
        blocks = tuple(data.draw(st.permutations(range(array.shape[dim]))))
        op = PermuteBlocks(blocks, dim).bind([view], {})
        (view,) = op.move([view])
        array = array.take(blocks, axis=dim)
        np.testing.assert_array_equal(read(view, [source]), array)
    assert sum(run.length for run in view.runs) == array.size


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 5), st.integers(1, 3)), min_size=1, max_size=5), st.data())
def test_pieces_of_runs_are_the_elements_that_they_name(parts: list[tuple[int, int, int]], data: st.DataObject) -> None:
    runs = [Run(0, begin, count, step) for begin, count, step in parts]
    elements = [run.begin + k * run.step for run in runs for k in range(run.length)]
    step = data.draw(st.integers(1, 4))
    begin = data.draw(st.integers(0, len(elements) - 1))
    count = data.draw(st.integers(1, 1 + (len(elements) - 1 - begin) // step))
    wanted = elements[begin : begin + count * step : step]
    for given_runs in (runs, merge(runs)):
        (found,) = take(given_runs, [Piece(begin, count, step)])
        assert [r.begin + k * r.step for r in found for k in range(r.length)] == wanted


def test_what_is_computed_has_a_source_of_its_own() -> None:
    (weight, gate) = distinct((3, 2), (3,))
    bound = Multiply().bind(views([weight, gate]), {})
    (folded,) = bound.compute([torch.from_numpy(weight), torch.from_numpy(gate)], torch)
    np.testing.assert_array_equal(folded.numpy(), weight * gate[:, None])
    (view,) = Multiply().move(views([weight, gate]))
    assert view.runs == (Run(-1, 0, 6),) and Multiply().exactness == "needs-base"
    assert Offset(1.0).move([view])[0].runs == (Run(-2, 0, 6),)
    (moved,) = Offset(-1.0).compute([torch.ones(3, dtype=torch.bfloat16)], torch)
    assert moved.dtype == torch.bfloat16 and not moved.any() and Offset(1.0).inverse() == Offset(-1.0)
    constant = Constant(7, ("n",), "I64").bind([], {"n": 2})
    assert constant.compute([], torch)[0].tolist() == [7, 7]
    absent = constant.inverse()
    assert absent.compute([torch.tensor([7, 7])], torch) == []
    with pytest.raises(RecipeError, match="leave out the constant 7"):
        absent.compute([torch.tensor([7, 8])], torch)


@pytest.mark.parametrize(("scale", "by_hand"), [
    ((), [[2, 4, 6, 8], [10, 12, 14, 16]]), ((2, 1), [[2, 4, 6, 8], [15, 18, 21, 24]]),
    ((1, 2), [[2, 4, 9, 12], [10, 12, 21, 24]]), ((2, 2), [[2, 4, 9, 12], [20, 24, 35, 40]]),
])  # fmt: skip
def test_a_scale_has_one_value_or_one_a_block(scale: tuple[int, ...], by_hand: list[list[float]]) -> None:
    data = torch.arange(1.0, 9.0).reshape(2, 4).to(torch.float8_e4m3fn)
    values = torch.arange(2.0, 2.0 + max(int(np.prod(scale)), 1)).reshape(scale)
    given_views = [View.whole(0, "F8_E4M3", (2, 4)), View.whole(1, "F32", scale)]
    bound = Dequantise("float32").bind(given_views, {})
    assert bound.compute([data, values], torch)[0].tolist() == by_hand
    with pytest.raises(RecipeError, match="cannot dequantise"):
        Dequantise().bind([given_views[0], View.whole(1, "F32", (3, 1))], {})


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
        (Concat(), [(0, 3), (1, 3)]),
        (Squeeze((0,)), [(2, 1)]),
        (Squeeze((4,)), [(1,)]),
        (Reshape((3,)), [(2,)]),
        (Regroup((2, 2), (1, 0)), [(6,)]),
        (Regroup((2, 3), (0, 0)), [(6,)]),
        (Regroup((4, 0), (1, 0)), [(6,)]),
        (Transpose(), [(2, 3, 4)]),
        (Stack(), [(2,), (3,)]),
        (Stack(3), [(2,)]),
        (Unstack(1, 3), [(2, 2)]),
        (Copy(0), [(2,)]),
        (Same(2), [(2,), (3,)]),
        (Unsqueeze((5,)), [(2,)]),
        (Constant(1), [(2,)]),
        (Multiply(), [(2, 2), (3,)]),
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
    assert merge([Run(0, 0, 2), Run(0, 2, 3), Run(1, 5, 1), Run(0, 6, 0), Run(1, 6, 1)]) == (Run(0, 0, 5), Run(1, 5, 2))
