"""Scaled dot-product attention behind one selector.

Models call `attention`; which kernel answers is chosen around the call with `attention_backend`. A mask is None when it
carries nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from porter.core.errors import UsageError

# "sdpa" leaves the choice to torch; the others allow exactly one of its kernels.
BACKENDS: dict[str, SDPBackend | None] = {
    "sdpa": None,
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention at scale 1/sqrt(E).

    q, k, v: (B, L, N, E); mask: None, or bool broadcastable to (B, N, L, L) where True takes part -> (B, L, N * E).
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, N, L, E)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


@contextmanager
def attention_backend(name: str, supported: Collection[str]) -> Iterator[None]:
    """Run the body with one backend of `BACKENDS`.

    Raises:
        UsageError: the name is unknown, the model does not declare it as supported, or torch has no such kernel for
            this device, type and shape.
    """
    if name not in BACKENDS or name not in supported:
        raise UsageError(
            f"attention backend {name!r} cannot be used here",
            expected=" | ".join(sorted(set(supported) & set(BACKENDS))),
            found=name,
            hint="leave it at the default: sdpa",
        )
    kernel = BACKENDS[name]
    if kernel is None:
        yield
        return
    try:
        with sdpa_kernel(kernel):
            yield
    except RuntimeError as error:
        if not any(words in str(error) for words in ("No viable backend", "No available kernel")):
            raise
        raise UsageError(
            f"attention backend {name!r} does not run this model on this device",
            found=str(error).splitlines()[0],
            hint="leave it at the default: sdpa",
        ) from error
