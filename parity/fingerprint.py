"""Where a conversion puts each weight, without reading its code: every element gets a number that names its place.

A state of such numbers goes through the conversion, whatever it is (a project's own converter, a recipe), and what
comes out says of every row where it was. So modules are aligned by what was done, never by order. A second numbering
tells what was moved from what was computed; of the latter, `parity.influence` says what it was computed from.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from parity.align import Alignment, Part, common_path
from parity.influence import Moved, influences
from parity.recorder import owner, told
from porter.core.errors import BadInputError

State = dict[str, Tensor]
_MOST_PARTS = 256  # of one module; beyond, rows are strewn and the whole is compared


class _Uncast(TorchFunctionMode):
    """Floating-point casts give float64: a conversion that ends in half precision keeps its places all the same."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _CASTS:
            return torch.Tensor.double(args[0])

        def wide(value: Any) -> Any:
            return torch.float64 if isinstance(value, torch.dtype) and value.is_floating_point else value

        return func(*(wide(a) for a in args), **{k: wide(v) for k, v in (kwargs or {}).items()})


_CASTS = (torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16)


def moved(state: Mapping[str, Tensor], convert: Callable[[State], Mapping[str, Tensor]]) -> list[Moved]:
    """What a conversion did to each row, also where it changes values on the way (adds a number, scales, rounds).

    Args:
        state: the reference's state; only names, shapes and dtypes matter.
        convert: takes such a state and may change it.

    Raises:
        BadInputError: the conversion does not take this state.
    """
    sizes = {name: t.numel() for name, t in state.items() if t.is_floating_point() or t.is_complex()}
    starts, at = {}, 0
    for name, count in sizes.items():
        starts[name], at = at, at + count
    firsts = torch.tensor(list(starts.values()) or [0], dtype=torch.float64)

    def made(value: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """What comes out where the element at place p, counted over all tensors, is value(p)."""
        given = {}
        for name, tensor in state.items():
            places = torch.arange(tensor.numel(), dtype=torch.float64).reshape(tensor.shape) + starts.get(name, 0)
            numbers = value(places) if name in starts else tensor.clone()
            given[name] = torch.complex(numbers, torch.zeros_like(numbers)) if tensor.is_complex() else numbers
        with _Uncast():
            out = convert(given)
        real = {k: t.real if t.is_complex() else t for k, t in out.items() if isinstance(t, Tensor)}
        return {k: t.detach().double() for k, t in real.items() if t.is_floating_point()}

    try:
        exact = made(lambda p: _FIRST + _STEP * p)
    except Exception as error:
        hint = "see docs/parity.md"
        if isinstance(error, ModuleNotFoundError) and error.name:
            hint = f"if nothing is computed with it: stubs=({error.name.partition('.')[0]!r},) of the candidate's Side"
        raise BadInputError(
            "the case's conversion does not take the reference's state", found=told(error),
            expected="a function that takes a state dict and returns one", hint=hint,
        ) from error  # fmt: skip
    places = {target: _known((tensor - _FIRST) / _STEP, at) for target, tensor in exact.items()}
    if open_ones := [target for target, found in places.items() if bool(found.isnan().any())]:
        with suppress(Exception):  # a conversion that computes with the values may refuse these
            # Of a * value + b, the differences to the values 1 divide to p + 1, whatever a and b are.
            squares = lambda p: 1 + (p + 1) ** 2  # noqa: E731
            base, once, twice = (made(v) for v in (torch.ones_like, lambda p: 2 + p, squares))
            for target in open_ones:
                ratio = (twice[target] - base[target]) / (once[target] - base[target]) - 1
                near = torch.where((ratio - ratio.round()).abs() < _NEAR, ratio.round(), torch.nan)
                places[target] = torch.where(places[target].isnan(), _known(near, at), places[target])
    shapes = {name: state[name].shape for name in sizes}
    rows = {target: list(_rows(target, found, shapes, firsts)) for target, found in places.items() if found.numel()}
    computed = [target for target, found in rows.items() if not found]
    return [
        *itertools.chain.from_iterable(rows.values()),
        *(influences(state, convert, computed) if computed and sizes else ()),
    ]


# Places are spaced and shifted so that no constant, and no value with something added, looks like another place.
_FIRST, _STEP = 2.0**20 + 0.5, 4.0
_NEAR = 1e-3  # of a whole number: float64 holds a ratio of values up to 1e9 to this


def _known(places: Tensor, end: int) -> Tensor:
    """The places that are some; NaN elsewhere."""
    return torch.where((places >= 0) & (places < end) & (places == places.floor()), places, torch.nan)


def _filled(places: Tensor, firsts: Tensor) -> Tensor | None:
    """Elements that the conversion made otherwise (a row left as it was) get the place that follows from those around.

    -> flat places, or None where most of them are not known.
    """
    flat = places.reshape(-1)
    known = (~flat.isnan()).nonzero().flatten()
    if len(known) == flat.numel():
        return flat
    if 2 * len(known) < flat.numel():
        return None
    every = torch.arange(flat.numel())
    after = torch.searchsorted(known, every).clamp(max=len(known) - 1)
    for near in (known[(after - 1).clamp(min=0)], known[after]):
        guess = flat[near] + (every - near)
        owners = torch.searchsorted(firsts, torch.stack((guess, flat[near])), right=True)
        flat = torch.where(flat.isnan() & (owners[0] == owners[1]), guess, flat)
    return torch.where(flat.isnan(), flat[known[after]], flat)


def _rows(target: str, places: Tensor, shapes: Mapping[str, torch.Size], firsts: Tensor) -> Iterator[Moved]:
    """Where one target tensor's rows were; nothing where its numbers are new ones."""
    filled, names = _filled(places, firsts), list(shapes)
    if filled is None:
        return
    flat = filled.reshape(places.shape[0] if places.ndim else 1, -1)  # (rows, elements of a row)
    owner = torch.searchsorted(firsts, flat, right=True) - 1  # (rows, elements of a row)
    first = owner[:, 0]
    if not bool((owner == first[:, None]).all()):  # a row from several tensors: each is somewhere in it
        for index in _distinct(owner):
            yield Moved(names[index], target, None, None)
        return
    rows = torch.zeros_like(first)
    whole = True
    for index in _distinct(first):
        shape = shapes[names[index]]
        width = max(shape.numel() // max(shape[0], 1), 1) if shape else 1
        mine = first == index
        sources = ((flat[mine] - firsts[index]) / width).floor().long()
        whole &= bool((sources == sources[:, :1]).all())
        rows[mine] = sources[:, 0]
    if not whole:  # transposed: rows are columns of the source
        for index in _distinct(first):
            yield Moved(names[index], target, None, None)
        return
    breaks = [0, *((torch.diff(rows) != 1) | (torch.diff(first) != 0)).nonzero().flatten().add(1).tolist(), len(rows)]
    runs = list(itertools.pairwise(breaks))
    if len(runs) > _MOST_PARTS:
        for index in _distinct(first):
            yield Moved(names[index], target, None, None)
        return
    for begin, stop in runs:
        name = names[int(first[begin])]
        shape = shapes[name]
        here = (int(rows[begin]), int(rows[stop - 1]) + 1)
        all_of_source = here == (0, shape[0] if shape else 1)
        yield Moved(name, target, None if all_of_source else here, None if len(runs) == 1 else (begin, stop))


def _distinct(indices: Tensor) -> list[int]:
    return sorted({int(index) for index in indices.reshape(-1).tolist()})


def alignment(found: list[Moved], modules: Mapping[str, str] | None = None, leaves: Collection[str] = ()) -> Alignment:
    """Modules by their weights' rows; a module's parts come from its weight, else from what else it has.

    Args:
        modules: what weights do not say.
        leaves: the reference's; one that holds the weights of modules below it answers to what holds all of these.
    """
    parts: dict[str, dict[str, list[Part]]] = {}
    rules: dict[str, str] = {}
    whole: set[str] = set()
    for move in found:
        reference, _, kind = move.source.rpartition(".")
        reference, candidate = owner(reference), owner(move.target.rpartition(".")[0])
        above = next((leaf for leaf in _above(reference) if leaf in leaves), None)
        if above is not None and reference not in leaves:
            whole.add(above)
            reference, kind = above, move.source.removeprefix(above + ".")
        part = Part(candidate, move.source_rows, move.target_rows)
        mine = parts.setdefault(reference, {}).setdefault(kind, [])
        if part not in mine:
            mine.append(part)
        rules.setdefault(reference, f"{move.source} -> {move.target}")
    chosen = {path: tuple(kinds.get("weight") or next(iter(kinds.values()))) for path, kinds in parts.items()}
    for path in whole:
        chosen[path] = (Part(common_path([part.candidate for kind in parts[path].values() for part in kind])),)
    chosen |= {path: (Part(candidate),) for path, candidate in (modules or {}).items()}
    return Alignment(chosen, rules)


def _above(path: str) -> Iterator[str]:
    while "." in path:
        path = path.rpartition(".")[0]
        yield path
