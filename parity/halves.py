"""Casts to half precision left out: what a model computes where a kernel that takes nothing else forces them.

Stand-alone (torch only).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

HALVES = (torch.float16, torch.bfloat16)
_METHODS = (torch.Tensor.half, torch.Tensor.bfloat16)


class NoHalves(TorchFunctionMode):
    """A request for float16 or bfloat16 gives float32; inside `Float64`, as any such request, float64."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _METHODS:
            func = torch.Tensor.float
        args = tuple(_whole(a) for a in args)
        return func(*args, **{k: _whole(v) for k, v in (kwargs or {}).items()})


def without_halves(call: Callable[[Any, Mapping[str, Tensor]], Any]) -> Callable[[Any, Mapping[str, Tensor]], Any]:
    """The same call without such casts; a run in half precision, which its inputs tell, stays as it is."""

    @functools.wraps(call)
    def wrapped(module: Any, inputs: Mapping[str, Tensor]) -> Any:
        if any(tensor.dtype in HALVES for tensor in inputs.values()):
            return call(module, inputs)
        with NoHalves():
            return call(module, inputs)

    return wrapped


def _whole(value: Any) -> Any:
    return torch.float32 if isinstance(value, torch.dtype) and value in HALVES else value
