"""Runs with one input changed: an input that no side looks at proves nothing. Runs beside the reference."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from parity.case import Case, Named

ALL = "*"  # a pass `forward~*` is `forward` with all of its inputs changed
PERTURBED = "~"  # a pass `forward~mask` is `forward` with its input `mask` changed


def perturbed(name: str, value: Tensor, seed: int) -> Tensor | None:
    """An input with some of its elements changed, as its kind allows; None where nothing can be.

    Masks (boolean, or only zeros and ones) lose the last of what they show, whole numbers (also as floating-point
    ones: positions) change places, others get noise of a tenth of their size. What is the same for all of a batch
    stays so: an implementation may take it once.
    """
    if not value.numel():
        return None
    if value.ndim > 1 and len(value) > 1 and torch.equal(value, value[:1].expand_as(value)):
        one = perturbed(name, value[:1], seed)
        return None if one is None else one.expand_as(value).clone()
    flat = value.reshape(-1)
    if value.dtype == torch.bool or bool(((flat == 0) | (flat == 1)).all()):
        return _hidden(value)
    if torch.equal(flat, flat.round()):
        turned = (_turned(value, axis) for axis in (*range(1, value.ndim), 0) if value.ndim)
        other = next((t for t in turned if not torch.equal(t, value)), None)
        return torch.where(value > 0, value - 1, value + 1) if other is None else other
    size = float(flat.abs().float().mean()) or 1.0
    noise = torch.randn(flat.shape, generator=torch.Generator().manual_seed(seed)).to(value.dtype)
    return (flat + 0.1 * size * noise).reshape(value.shape)


def _turned(value: Tensor, axis: int) -> Tensor:
    """The numbers of an axis in the other order; within a sample the first is gone, so that a mean changes too."""
    other = value.flip(axis)
    if axis and other.shape[axis] > 1:
        other.narrow(axis, 0, 1).copy_(other.narrow(axis, 1, 1))
    return other


def _hidden(mask: Tensor) -> Tensor:
    """A mask whose last row that shows several things shows a quarter less; no row loses all, which would be NaN.

    Where every row shows one thing or none, the last of what is hidden is shown, or else the last of all is hidden.
    """
    rows = mask.reshape(-1, mask.shape[-1] if mask.ndim else 1).clone()
    several = (rows != 0).sum(-1).gt(1).nonzero().flatten()
    if len(several):
        shown = rows[several[-1]].nonzero().flatten()
        rows[several[-1], shown[-max(1, len(shown) // 4) :]] = 0
    else:
        flat = rows.view(-1)
        hidden = (flat == 0).nonzero().flatten()
        flat[hidden[-1] if len(hidden) else -1] = 1 if len(hidden) else 0
    return rows.reshape(mask.shape)


def guard_passes(case: Case, given: Mapping[str, Named], seed: int) -> dict[str, dict[str, Tensor]]:
    """For every pass and every input that is not free: the pass with this input changed; else with all changed."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, inputs in given.items():
        if all(key in case.free for key in inputs):  # something must have an effect
            other = {key: value for key in inputs if (value := perturbed(key, inputs[key], seed)) is not None}
            found |= {f"{name}{PERTURBED}{ALL}": {**inputs, **other}} if other else {}
            continue
        for key, value in inputs.items():
            changed = perturbed(key, value, seed) if key not in case.free else None
            if changed is not None:
                found[f"{name}{PERTURBED}{key}"] = {**inputs, key: changed}
    return found
