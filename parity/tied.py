"""Tensors that a module holds under several names: tied embeddings, a part that two others share.

Stand-alone. All names of one tensor get the same numbers; `parity.twins` says which of its modules are compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn

Value = TypeVar("Value")


def tied(module: nn.Module) -> dict[str, str]:
    """Names of a module's state that are the same tensor as an earlier name -> that name."""
    state: Mapping[str, Any] = module.state_dict(keep_vars=True)  # kept until the end, so that no id comes again
    first: dict[int, str] = {}
    found = {name: first.setdefault(id(tensor), name) for name, tensor in state.items()}
    return {name: earlier for name, earlier in found.items() if name != earlier}


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
