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
from runtime.parallel import sequence

# "sdpa" leaves the choice to torch; the others allow exactly one of its kernels.
BACKENDS: dict[str, SDPBackend | None] = {
    "sdpa": None,
    "math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, shared: int = 0) -> Tensor:
    """Self-attention, softmax at scale 1/sqrt(E): (B, L, N, E) three times -> (B, L, N * E).

    Args:
        mask: None when it carries nothing; bool (B, L), True for tokens that are no padding; bool (B, 1 or N, L, L)
            where only a structure can say which token sees which.
        shared: how many of the first tokens (the text) every rank of a sequence-parallel group has whole. The others
            are this rank's part of the sequence, and see the other ranks' parts too.
    """
    if (ranks := sequence.ranks()) is not None:
        return sequence.attend(q, k, v, mask, shared, ranks, kernel)
    return kernel(q, k, v, mask)


def cross_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention to another sequence, which every rank has whole: (B, L, N, E), (B, M, N, E) twice -> (B, L, N * E).

    mask: None, bool (B, M), or bool (B, 1 or N, L, M).
    """
    return kernel(q, k, v, mask)


def kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention on this device alone, by the backend that is chosen: (B, L, N, E) … -> (B, L, N * E)."""
    if mask is not None and mask.ndim == 2:
        mask = mask[:, None, None, :]  # (B, 1, 1, M)
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
