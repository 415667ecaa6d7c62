"""Kernels that compute attention, by name: torch's own, FlexAttention, FlashAttention and the hub's packages.

B: batch, N: heads, L and M: tokens of queries and of keys, E: head width.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from porter.core.errors import UsageError

# (q, k, v, mask) -> out: q (B, N, L, E), k and v (B, N, M, E), mask None or bool broadcastable to (B, N, L, M).
Kernel = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """torch's attention: the kernel that it chooses, or the one that `sdpa_kernel` allows."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def flex(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """FlexAttention; a mask's empty blocks are not computed. Compiled on CUDA, written out elsewhere."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    block = None
    if mask is not None:
        whole = mask.expand(mask.shape[0], mask.shape[1], q.shape[2], k.shape[2])  # (B, 1 or N, L, M)
        batches, heads = whole.shape[:2]

        def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return whole[b if batches > 1 else 0, h if heads > 1 else 0, i, j]

        block = create_block_mask(
            sees, batches if batches > 1 else None, heads if heads > 1 else None, q.shape[2], k.shape[2],
            device=str(q.device),
        )  # fmt: skip
    if q.is_cuda:
        out: Tensor = _compiled_flex()(q, k, v, block_mask=block)
        return out
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # that it is not compiled
        return flex_attention(q, k, v, block_mask=block)


@cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _packaged(function: Callable[..., Any]) -> Kernel:
    """A FlashAttention function, whose tensors are (B, L, N, E), as a kernel."""

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        made = function(*(x.transpose(1, 2) for x in (q, k, v)))
        out: Tensor = made[0] if isinstance(made, tuple) else made
        return out.transpose(1, 2)

    return run


@dataclass(frozen=True)
class Backend:
    """One way to compute attention.

    Attributes:
        kernel: made when the backend is first chosen; raises ImportError where a package is missing.
        around: what must hold while it runs.
        masks: whether it takes a mask.
        needs: what to install, and on what it runs.
    """

    kernel: Callable[[], Kernel]
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    masks: bool = True
    needs: str = ""


def _only(kind: SDPBackend) -> Callable[[], AbstractContextManager[Any]]:
    return lambda: sdpa_kernel(kind)


def _flash_impl(name: str) -> Callable[[], AbstractContextManager[Any]]:
    """torch's own switch to a newer FlashAttention for its flash kernel."""

    @contextmanager
    def switched() -> Iterator[None]:
        from torch.nn.attention import activate_flash_attention_impl, restore_flash_attention_impl

        activate_flash_attention_impl(name)  # imports the package
        try:
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                yield
        finally:
            restore_flash_attention_impl()

    return switched


def _flash_attn() -> Kernel:
    return _packaged(importlib.import_module("flash_attn").flash_attn_func)


_PACKAGE = "on CUDA, in half precision, without masks"
BACKENDS: dict[str, Backend] = {
    "sdpa": Backend(lambda: sdpa),  # leaves the choice to torch
    "math": Backend(lambda: sdpa, _only(SDPBackend.MATH)),
    "flash": Backend(lambda: sdpa, _only(SDPBackend.FLASH_ATTENTION), masks=False),
    "efficient": Backend(lambda: sdpa, _only(SDPBackend.EFFICIENT_ATTENTION)),
    "cudnn": Backend(lambda: sdpa, _only(SDPBackend.CUDNN_ATTENTION)),
    "flex": Backend(lambda: flex),
    "flash_attn": Backend(_flash_attn, masks=False, needs=f"pip install flash-attn; {_PACKAGE}"),
    "flash_attn_3": Backend(lambda: sdpa, _flash_impl("FA3"), masks=False, needs=f"FlashAttention 3; {_PACKAGE}"),
    "flash_attn_4": Backend(lambda: sdpa, _flash_impl("FA4"), masks=False, needs=f"FlashAttention 4; {_PACKAGE}"),
}
TORCH_BACKENDS = (
    "sdpa",
    "math",
    "flash",
    "efficient",
    "cudnn",
)  # what works around anyone's calls of torch's attention
HUB = "hub:"  # hub:OWNER/NAME, a package of the hub's kernels
_HUB_NAME = re.compile(r"hub:[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def backend(name: str) -> Backend:
    """The backend called `name`; `hub:OWNER/NAME` is one of the hub's kernel packages, which brings code that runs.

    Raises:
        UsageError: there is none.
    """
    if name.startswith(HUB) and _HUB_NAME.fullmatch(name):
        repository = name.removeprefix(HUB)

        def fetched() -> Kernel:
            package = importlib.import_module("kernels").get_kernel(repository)
            return _packaged(package.flash_attn_func)

        return Backend(
            fetched, masks=False, needs=f"pip install kernels, and a connection for the first time; {_PACKAGE}"
        )
    if name not in BACKENDS:
        raise UsageError(
            f"attention backend {name!r} is unknown", expected=f"{' | '.join(BACKENDS)} | {HUB}OWNER/NAME", found=name,
            hint="leave it at the default: sdpa",
        )  # fmt: skip
    return BACKENDS[name]
