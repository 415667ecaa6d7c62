"""What a conversion's computed tensors were computed from: sources change in turns, and who follows has said it.

Every module and every row has a number. Once for each of its binary digits all sources change whose number has a one
there, once all whose number has a zero: a row that follows only one of the two has told a digit of where it is from.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from parity.drawn import draw
from parity.recorder import float64, owner

State = dict[str, Tensor]
Chosen = Callable[[str, Tensor], "Tensor | bool"]  # (tensor, numbers of its rows) -> which rows


@dataclass(frozen=True)
class Moved:
    """Rows `target` of a target tensor are rows `source` of a source tensor; None: all, in their order."""

    source: str
    target: str
    source_rows: tuple[int, int] | None
    target_rows: tuple[int, int] | None


def influences(
    state: Mapping[str, Tensor], convert: Callable[[State], Mapping[str, Tensor]], targets: Sequence[str]
) -> Iterator[Moved]:
    """Where the rows of computed target tensors come from, of those that come from one module alone.

    Args:
        state: the reference's; only names, shapes and dtypes matter.
        convert: takes such a state and may change it.
    """
    floats = {name: t for name, t in state.items() if t.is_floating_point()}
    modules = {name: owner(name.rpartition(".")[0]) for name in floats}
    paths = list(dict.fromkeys(modules.values()))
    numbers = {name: paths.index(path) for name, path in modules.items()}
    kinds = {name: name[len(path) :].removeprefix(".") for name, path in modules.items()}
    one, other = ({n: torch.from_numpy(draw(n, tuple(t.shape), seed)) for n, t in floats.items()} for seed in (0, 1))

    def run(chosen: Chosen) -> dict[str, Tensor]:
        """The targets, where the rows that `chosen` names of every tensor are other ones."""
        made = {name: t.clone() for name, t in state.items()}
        for name, tensor in floats.items():
            rows = torch.arange(tensor.shape[0] if tensor.ndim else 1)
            which = torch.as_tensor(chosen(name, rows)).expand(len(rows))
            which = which.reshape(-1, *[1] * (tensor.ndim - 1)) if tensor.ndim else which[0]
            made[name] = torch.where(which, other[name], one[name]).double()
        with float64():
            answer = convert(made)
        return {target: _by_row(answer[target]) for target in targets}

    before = run(lambda name, rows: False)

    def followed(chosen: Chosen) -> dict[str, Tensor]:
        return {target: (after != before[target]).any(1) for target, after in run(chosen).items()}

    of = _numbers(followed, len(paths), lambda name, rows: torch.full_like(rows, numbers[name]))
    most = max(t.shape[0] if t.ndim else 1 for t in floats.values())
    row = _numbers(followed, most, lambda name, rows: rows)
    by_kind = {kind: followed(partial(_is, kinds, kind)) for kind in dict.fromkeys(kinds.values())}
    for target in targets:
        for begin, stop in _runs(of[target], row[target]):
            module, first = int(of[target][begin]), int(row[target][begin])
            for kind, answers in by_kind.items():
                name = next((n for n, k in kinds.items() if k == kind and numbers[n] == module), None)
                if name is None or module < 0 or not bool(answers[target][begin:stop].any()):
                    continue
                here = None if first < 0 else (first, first + stop - begin)
                here = None if here == (0, floats[name].shape[0] if floats[name].ndim else 1) else here
                whole = (begin, stop) == (0, len(of[target]))
                yield Moved(name, target, here, None if whole else (begin, stop))


def _is(kinds: Mapping[str, str], kind: str, name: str, rows: Tensor) -> bool:
    return kinds[name] == kind


def _by_row(tensor: Tensor) -> Tensor:
    return tensor.detach().double().reshape(tensor.shape[0] if tensor.ndim else 1, -1)


def _numbers(
    followed: Callable[[Chosen], dict[str, Tensor]],
    count: int,
    number: Callable[[str, Tensor], Tensor],
) -> dict[str, Tensor]:
    """For each row of each target the one number below `count` that it follows; -1 where there are several, or none."""
    found: dict[str, Tensor] = {}
    for bit in range(max(1, (count - 1).bit_length())):
        ones = followed(lambda name, rows, b=bit: (number(name, rows) >> b & 1).bool())  # type: ignore[misc]
        zeros = followed(lambda name, rows, b=bit: ~(number(name, rows) >> b & 1).bool())  # type: ignore[misc]
        for target, one in ones.items():
            known = found.setdefault(target, torch.zeros(len(one), dtype=torch.int64))
            found[target] = torch.where((one != zeros[target]) & (known >= 0), known | (one.long() << bit), -1)
    return found


def _runs(modules: Tensor, rows: Tensor) -> list[tuple[int, int]]:
    """Stretches of one module's rows in their order."""
    same = (torch.diff(modules) == 0) & ((torch.diff(rows) == 1) | ((rows[1:] < 0) & (rows[:-1] < 0)))
    breaks = [0, *(~same).nonzero().flatten().add(1).tolist(), len(modules)]
    return list(itertools.pairwise(breaks))
