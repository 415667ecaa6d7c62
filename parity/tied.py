"""Tensors that a module holds under several names: tied embeddings, a part that two others share.

Runs beside the reference. All names of one tensor get the same numbers; `parity.twins` says which of its modules are
compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from torch import nn

from parity.recorder import further_names

Value = TypeVar("Value")


def tied(module: nn.Module) -> dict[str, str]:
    """Names of a module's state that are the same tensor as an earlier name -> that name."""
    return further_names(module.state_dict(keep_vars=True))


def with_all_names(given: Mapping[str, Value], ties: Mapping[str, str]) -> dict[str, Value]:
    """What is given under one name of a tensor, under each."""
    every = dict(given)
    for name, earlier in ties.items():
        if earlier not in every and name in every:
            every[earlier] = every[name]
    for name, earlier in ties.items():
        if earlier in every:
            every.setdefault(name, every[earlier])
    return every
