"""Which module of a candidate made the tensor that another takes."""

from __future__ import annotations

import torch
from torch import Tensor

from parity.align import Alignment, Place, common_path
from parity.capture import Capture
from parity.case import Candidate
from parity.trace import Trace, split_key


def maker_of(
    trace: Trace, key: str, alignment: Alignment, candidate: Candidate, captured: Capture, taker: str = ""
) -> tuple[str, str]:
    """(candidate module that computes a differing input, the module that receives it).

    Args:
        taker: of several that answer to the reference's module, the one whose input differs; empty for the first.
    """
    where, _, name = split_key(key)
    module = where.partition("/")[2].rpartition("#")[0]
    leaf = module in alignment.parts
    call = int(where.rpartition("#")[2])
    parts = (part.candidate for part in alignment.parts.get(module, ()))
    taker = taker or (captured.first(parts, call) if leaf else alignment.counterpart(module) or "")
    prefix = f"{taker}#{where.rpartition('#')[2]}.in."
    own = {k.removeprefix(prefix): t for k, t in captured.tensors.items() if k.startswith(prefix)}
    block = next((b for b in candidate.blocks if b.matches(module)), None)
    if block and not leaf:
        value = block.inputs(own, Place.of(trace, key).inputs).get(name)
        own = {k: t for k, t in own.items() if t is value}
    makers = [captured.producers[prefix + k] for k in own if prefix + k in captured.producers]
    if makers and makers[0] not in (taker, *_leaves(alignment, captured)):
        return makers[0], taker
    value = next(iter(own.values()), None)
    if value is not None and (maker := _source(value, taker, alignment, captured)):
        return maker, taker
    handed = {captured.handed.get(prefix + k) for k in own}
    parent = _around(taker, captured)
    while parent:  # who only hands on what it got did not make it
        got = [k for k in captured.handed if k.startswith(f"{parent}#") and captured.handed[k] in handed]
        if made := [captured.producers[k] for k in got if k in captured.producers]:
            return made[0], taker
        if not got and not _received(value, parent, captured):
            break
        parent = _around(parent, captured)
    return parent, taker


def _around(path: str, captured: Capture) -> str:
    """The next module around a path that runs itself; empty for the outermost."""
    parent = path.rpartition(".")[0]
    while parent and parent not in captured.ran:
        parent = parent.rpartition(".")[0]
    return parent


def _received(value: Tensor | None, module: str, captured: Capture) -> bool:
    """Whether a module was handed these very numbers, so that it did not make them."""
    if value is None:
        return False
    given = (t for k, t in captured.tensors.items() if k.startswith(f"{module}#") and ".in." in k)
    return any(t.shape == value.shape and torch.equal(t, value) for t in given)


def _source(value: Tensor, taker: str, alignment: Alignment, captured: Capture) -> str:
    """The last module that answered these numbers, in whatever order; empty for one whose own answer is compared."""
    sums = _sums(value)
    found = ""
    for key, tensor in captured.tensors.items():
        path, mark, rest = key.partition("#")
        if path == taker and ".in." in rest:
            break
        same = mark and ".out." in rest and tensor.numel() == value.numel() and tensor.is_floating_point()
        if same and torch.allclose(_sums(tensor), sums, rtol=1e-12, atol=0):
            found = path
    return "" if found in _leaves(alignment, captured) else found


def _leaves(alignment: Alignment, captured: Capture) -> set[str]:
    """Modules whose own answers are compared: they have weights, and no other that ran in them."""
    holders = {part.candidate for parts in alignment.parts.values() for part in parts}
    around = {path[:i] for path in captured.ran for i, letter in enumerate(path) if letter == "."}
    return holders - around


def _sums(tensor: Tensor) -> Tensor:
    """Numbers that no rearrangement changes, up to rounding: the ends, and the sums of two powers."""
    flat = tensor.double().reshape(-1)
    return torch.stack([flat.min(), flat.max(), flat.square().sum(), flat.pow(4).sum()])


def behind(maker: str, alignment: Alignment) -> tuple[str, str]:
    """What of the reference answers to a candidate's module, and the one rule that fills it; empty where none does."""
    at = maker
    while at and not alignment.behind(at):
        at = at.rpartition(".")[0]
    behind = alignment.behind(at) if at else []
    reference = common_path(behind) or ", ".join(dict.fromkeys(b.partition(".")[0] for b in behind))
    return reference, alignment.rule(behind[0]) if len(behind) == 1 else ""
