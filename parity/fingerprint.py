"""Where a conversion puts each weight, without reading its code: every element gets a number that names its place.

A state of such numbers goes through the conversion, whatever it is (a project's own converter, a recipe), and what
comes out says of every row where it was. So modules are aligned by what was done, never by order. A second numbering
tells what was moved from what was computed; of the latter, `parity.influence` says what it was computed from.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping

import torch
from torch import Tensor

from parity.align import Alignment, Part, common_path
from parity.influence import Moved, influences
from parity.recorder import float64, owner, told
from porter.core.errors import BadInputError

State = dict[str, Tensor]
_MOST_PARTS = 256  # of one module; beyond, rows are strewn and the whole is compared


def fingerprints(state: Mapping[str, Tensor]) -> tuple[State, dict[str, tuple[int, Tensor]]]:
    """The state with every floating-point element numbered (float64, exact) -> it, and each tensor's first number.

    Tensors of other dtypes (token positions, counters) stay as they are.
    """
    numbered: State = {}
    places: dict[str, tuple[int, Tensor]] = {}
    at = 1
    for name, tensor in state.items():
        if tensor.is_floating_point():
            count = tensor.numel()
            numbered[name] = torch.arange(at, at + count, dtype=torch.float64).reshape(tensor.shape)
            places[name] = (at, tensor)
            at += count
        else:
            numbered[name] = tensor.clone()
    return numbered, places


def moved(state: Mapping[str, Tensor], convert: Callable[[State], Mapping[str, Tensor]]) -> list[Moved]:
    """What a conversion did to each row.

    Args:
        state: the reference's state; only names, shapes and dtypes matter.
        convert: takes such a state and may change it.

    Raises:
        BadInputError: the conversion does not take this state.
    """
    numbered, places = fingerprints(state)
    other = {name: t * 3 + 0.25 if name in places else t.clone() for name, t in numbered.items()}
    try:
        with float64():  # a cast to float32 would lose large numbers
            made, again = convert(dict(numbered)), convert(other)
    except Exception as error:
        raise BadInputError(
            "the case's conversion does not take the reference's state", found=f"{told(error)}",
            expected="a function that takes a state dict and returns one", hint="see docs/parity.md",
        ) from error  # fmt: skip
    names = list(places)
    starts = torch.tensor([at for at, _ in places.values()] or [0], dtype=torch.float64)
    end = float(sum(t.numel() for _, t in places.values()) + 1)
    found: list[Moved] = []
    computed = []
    for target, tensor in made.items():
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.numel():
            exact, second = tensor.detach().double(), again[target].detach().double()
            if second.shape == exact.shape and torch.equal(exact * 3 + 0.25, second):
                found += _rows(target, exact, names, places, starts, end)
            elif second.shape != exact.shape or not torch.equal(exact, second):  # equal: it depends on nothing
                computed.append(target)
    return [*found, *(influences(state, convert, computed) if computed else ())]


def _rows(
    target: str, tensor: Tensor, names: list[str], places: Mapping[str, tuple[int, Tensor]], starts: Tensor, end: float
) -> Iterator[Moved]:
    """Where one target tensor's rows were; nothing where its numbers are new ones."""
    flat = tensor.reshape(tensor.shape[0] if tensor.ndim else 1, -1)  # (rows, elements of a row)
    known = (flat >= 1) & (flat < end) & (flat == flat.floor())
    if not bool(known.all()):
        return
    owner = torch.searchsorted(starts, flat, right=True) - 1  # (rows, elements of a row)
    first = owner[:, 0]
    if not bool((owner == first[:, None]).all()):  # a row from several tensors: each is somewhere in it
        for index in _distinct(owner):
            yield Moved(names[index], target, None, None)
        return
    rows = torch.zeros_like(first)
    whole = True
    for index in _distinct(first):
        at, source = places[names[index]]
        width = max(source.numel() // max(source.shape[0], 1), 1) if source.ndim else 1
        mine = first == index
        sources = ((flat[mine] - at) / width).floor().long()
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
        source = places[name][1]
        here = (int(rows[begin]), int(rows[stop - 1]) + 1)
        all_of_source = here == (0, source.shape[0] if source.ndim else 1)
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
