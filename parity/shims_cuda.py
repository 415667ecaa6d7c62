"""A GPU that is the CPU: code that names `cuda` runs where there is none.

Stand-alone (torch and the standard library only). Tensors on the CPU say that they are on `cuda`, so that code which
asserts it, or chooses by it, does what it does on a GPU; what is put there stays where it is. CUDA's autocast does
nothing on the CPU, as torch itself warns.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.attention
from torch.overrides import TorchFunctionMode

from parity.shims_kernels import CALLED

NAME = "torch's device cuda"
_CUDA = re.compile(r"cuda(:\d+)?")
_PROPERTIES: dict[str, Any] = {
    "name": "the CPU (parity/shims.py)", "major": 8, "minor": 0, "total_memory": 80 << 30, "multi_processor_count": 108,
}  # fmt: skip
_OWN = ("torch", "parity", "safetensors", "numpy")  # these need to know where a tensor really is


def install() -> bool:
    """Pretend from here on to have a GPU -> whether that was needed: False where there is one."""
    if torch.cuda.is_available():
        return False
    for owner, name, stand_in in (
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "set_device", lambda device: None),
        (torch.cuda, "synchronize", lambda device=None: None),
        (torch.cuda, "get_device_properties", lambda device=None: SimpleNamespace(**_PROPERTIES)),
        (torch.cuda, "get_device_capability", lambda device=None: (_PROPERTIES["major"], _PROPERTIES["minor"])),
        (torch.cuda, "get_device_name", lambda device=None: _PROPERTIES["name"]),
        (torch.cuda.nvtx, "range_push", lambda message: 0),
        (torch.cuda.nvtx, "range_pop", lambda: 0),
        # A choice of kernels, which leaves none on the CPU.
        (torch.nn.attention, "sdpa_kernel", lambda *chosen, **how: nullcontext()),
        (torch.backends.cuda, "sdp_kernel", lambda *chosen, **how: nullcontext()),
    ):
        setattr(owner, name, _noted(stand_in, getattr(owner, name)))
    _Pretended().__enter__()  # type: ignore[no-untyped-call]
    return True


class _Pretended(TorchFunctionMode):
    """What is asked of `cuda` is done on the CPU."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") == "__get__" and getattr(func, "__self__", None) is torch.Tensor.device:
            found = func(*args)
            return torch.device("cuda", 0) if found.type == "cpu" and not _own_code() else found
        if func is torch.device:
            return func(*args, **(kwargs or {}))
        if func is torch.Tensor.cuda:
            CALLED.add(NAME)
            return args[0]
        args = tuple(_here(a) for a in args)
        kwargs = {k: _here(v) for k, v in (kwargs or {}).items()}
        places = [args[1]] if func is torch.Tensor.to and len(args) > 1 else []
        if type(kwargs.get("device")) is int:
            kwargs["device"] = _here("cuda")
        elif places and type(places[0]) is int:
            args = (args[0], _here("cuda"), *args[2:])
        return func(*args, **kwargs)


def _here(value: Any) -> Any:
    """The CPU for a CUDA device, by name or as a device; all else as it is."""
    cuda = value.type == "cuda" if isinstance(value, torch.device) else False
    if cuda or (isinstance(value, str) and _CUDA.fullmatch(value)):
        CALLED.add(NAME)
        return torch.device("cpu")
    return value


def _own_code() -> bool:
    """Whether a library, not the model's code, asks: by the frame behind this file's and the arbiter's."""
    frame: Any = sys._getframe(2)
    while frame is not None and frame.f_code.co_name == "__torch_function__":
        frame = frame.f_back
    return frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _OWN


def _noted(function: Callable[..., Any], real: Callable[..., Any]) -> Callable[..., Any]:
    """`function` in place of `real`, which torch's compiler still finds behind it."""

    def noted(*args: Any, **kwargs: Any) -> Any:
        CALLED.add(NAME)
        return function(*args, **kwargs)

    noted.__wrapped__ = real  # type: ignore[attr-defined]
    return noted
