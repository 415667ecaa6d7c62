"""xformers.ops and apex.normalization on the CPU: the same signatures and layouts, in plain torch.

Stand-alone with `shims_kernels.py`. xformers aligns causal masks to the top left, unless a class says otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from parity.shims_kernels import attend, layer_normed, refuse, rms_normed, stands_for

HIDDEN = float("-inf")


class AttentionBias:
    """What may be given as `attn_bias` besides a tensor."""

    def materialize(self, shape: Sequence[int], dtype: Any = torch.float32, device: Any = "cpu") -> Tensor:
        """What is added to scores of `shape` (..., queries, keys): zeros and minus infinities."""
        raise NotImplementedError(f"there is no stand-in for {type(self).__name__} on the CPU (parity/shims.py)")


class LowerTriangularMask(AttentionBias):
    """Causal, aligned to the top left."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def _diagonal(self, queries: int, keys: int) -> int:
        return 1

    def materialize(self, shape: Sequence[int], dtype: Any = torch.float32, device: Any = "cpu") -> Tensor:
        full = torch.full(tuple(shape), HIDDEN, dtype=dtype, device=device)
        return torch.triu(full, diagonal=self._diagonal(*shape[-2:]))

    def add_bias(self, bias: Tensor) -> AttentionBias:
        """The same with a tensor of (B, H, queries, keys) added."""
        return _WithBias(self, bias)


class LowerTriangularFromBottomRightMask(LowerTriangularMask):
    """Causal, aligned to the bottom right."""

    def _diagonal(self, queries: int, keys: int) -> int:
        return keys - queries + 1


class _WithBias(AttentionBias):
    def __init__(self, mask: AttentionBias, bias: Tensor) -> None:
        self._mask, self._bias = mask, bias

    def materialize(self, shape: Sequence[int], dtype: Any = torch.float32, device: Any = "cpu") -> Tensor:
        return self._mask.materialize(shape, dtype, device) + self._bias.to(dtype)


class BlockDiagonalMask(AttentionBias):
    """Sequences one after the other, each seeing itself; made by `from_seqlens` or `from_tensor_list`."""

    def __init__(self, queries: Sequence[int], keys: Sequence[int], batches: Sequence[int] | None = None) -> None:
        self.queries, self.keys, self.batches = list(queries), list(keys), batches

    @classmethod
    def from_seqlens(cls, q_seqlen: Iterable[int], kv_seqlen: Iterable[int] | None = None) -> Any:
        """Lengths of the queries' sequences, and of the keys' where they differ."""
        queries = [int(n) for n in q_seqlen]
        keys = queries if kv_seqlen is None else [int(n) for n in kv_seqlen]
        if len(queries) != len(keys):
            raise ValueError(f"{len(queries)} sequences of queries, {len(keys)} of keys")
        return cls(queries, keys)

    @classmethod
    def from_tensor_list(cls, tensors: Sequence[Tensor]) -> tuple[Any, Tensor]:
        """(B_i, M_i, ...) each -> the mask, and all of them as (1, sum of B_i * M_i, ...)."""
        mask = cls.from_seqlens([t.shape[1] for t in tensors for _ in range(t.shape[0])])
        mask.batches = [t.shape[0] for t in tensors]
        return mask, torch.cat([t.reshape(1, -1, *t.shape[2:]) for t in tensors], 1)

    def split(self, tensor: Tensor) -> list[Tensor]:
        """The other way: (1, M, ...) -> (B_i, M_i, ...) each."""
        batches, at, sizes = self.batches or [1] * len(self.queries), 0, []
        for count in batches:
            sizes.append(sum(self.queries[at : at + count]))
            at += count
        parts = zip(torch.split(tensor, sizes, 1), batches)  # noqa: B905 (3.9 has no strict)
        return [part.reshape(count, -1, *tensor.shape[2:]) for part, count in parts]

    def make_causal(self) -> BlockDiagonalCausalMask:
        """Each sequence causal, aligned to its top left."""
        return BlockDiagonalCausalMask(self.queries, self.keys, self.batches)

    def make_causal_from_bottomright(self) -> BlockDiagonalCausalFromBottomRightMask:
        """Each sequence causal, aligned to its bottom right."""
        return BlockDiagonalCausalFromBottomRightMask(self.queries, self.keys, self.batches)

    def _block(self, shape: tuple[int, int], dtype: Any, device: Any) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    def materialize(self, shape: Sequence[int], dtype: Any = torch.float32, device: Any = "cpu") -> Tensor:
        if tuple(shape[-2:]) != (sum(self.queries), sum(self.keys)):
            raise ValueError(f"a mask of {self.queries} and {self.keys} tokens for scores of {tuple(shape)}")
        mask = torch.full(tuple(shape[-2:]), HIDDEN, dtype=dtype, device=device)
        row = column = 0
        for queries, keys in zip(self.queries, self.keys):  # noqa: B905
            mask[row : row + queries, column : column + keys] = self._block((queries, keys), dtype, device)
            row, column = row + queries, column + keys
        return mask.expand(tuple(shape))


class BlockDiagonalCausalMask(BlockDiagonalMask):
    """Each sequence causal, aligned to its top left."""

    def _block(self, shape: tuple[int, int], dtype: Any, device: Any) -> Tensor:
        return LowerTriangularMask().materialize(shape, dtype, device)


class BlockDiagonalCausalFromBottomRightMask(BlockDiagonalMask):
    """Each sequence causal, aligned to its bottom right; it needs as many keys as queries, or more."""

    def _block(self, shape: tuple[int, int], dtype: Any, device: Any) -> Tensor:
        if shape[1] < shape[0]:
            raise ValueError(f"a sequence of {shape[0]} queries has {shape[1]} keys only")
        return LowerTriangularFromBottomRightMask().materialize(shape, dtype, device)


@stands_for("xformers.ops.memory_efficient_attention")
def memory_efficient_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_bias: Any = None, p: float = 0.0, scale: float | None = None, *,
    op: Any = None, output_dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """(B, M, H, K), or (B, M, K) of one head; a bias of (B, H, Mq, Mk), or (B, Mq, Mk) of one head.

    `op` chooses among kernels, all of which compute the same.
    """
    refuse("memory_efficient_attention", p=p)
    if query.ndim not in (3, 4):
        raise NotImplementedError(
            f"memory_efficient_attention on the CPU (parity/shims.py) takes 3 or 4 axes, not {query.ndim}"
        )
    single = query.ndim == 3
    q, k, v = (t.unsqueeze(2) if single else t for t in (query, key, value))
    shape = q.shape[0], q.shape[2], q.shape[1], k.shape[1]
    bias = None
    if isinstance(attn_bias, AttentionBias):
        added = attn_bias.materialize(shape, q.dtype, q.device)
    elif attn_bias is not None:
        added = attn_bias.unsqueeze(1) if single and attn_bias.ndim == 3 else attn_bias
        if added.ndim != 4 or any(have not in (1, want) for have, want in zip(added.shape, shape)):  # noqa: B905
            raise ValueError(f"attn_bias has shape {tuple(attn_bias.shape)}, the scores {shape}")
    if attn_bias is not None:
        bias = lambda head: added[:, head if added.shape[1] > 1 else 0]  # noqa: E731
    out = attend(q, k, v, scale, bias=bias)
    out = out if output_dtype is None else out.to(output_dtype)
    return out.squeeze(2) if single else out


@stands_for("xformers.ops.unbind")
def unbind(x: Tensor, dim: int) -> tuple[Tensor, ...]:
    """`torch.unbind`; the original keeps its parts' memory together for the way back."""
    return x.unbind(dim)


@stands_for("xformers.ops.swiglu")
def swiglu(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, w3: Tensor, b3: Tensor | None, *,
    op: Any = None,
) -> Tensor:  # fmt: skip
    """linear(silu(linear(x, w1, b1)) * linear(x, w2, b2), w3, b3)."""
    return F.linear(F.silu(F.linear(x, w1, b1)) * F.linear(x, w2, b2), w3, b3)


class SwiGLU(nn.Module):
    """The module around `swiglu`: `w12` holds both first layers, unless they are not packed."""

    def __init__(
        self, in_features: int, hidden_features: int, out_features: int | None = None, bias: bool = True, *,
        _pack_weights: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        hidden = hidden_features or in_features
        self.w12 = nn.Linear(in_features, 2 * hidden, bias=bias) if _pack_weights else None
        if not _pack_weights:
            self.w1, self.w2 = (nn.Linear(in_features, hidden, bias=bias) for _ in range(2))
        self.w3 = nn.Linear(hidden, out_features or in_features, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        first: tuple[Any, ...]
        if self.w12 is None:
            first = self.w1.weight, self.w1.bias, self.w2.weight, self.w2.bias
        else:
            (w1, w2), bias = self.w12.weight.chunk(2), self.w12.bias
            b1, b2 = (None, None) if bias is None else bias.chunk(2)
            first = w1, b1, w2, b2
        return swiglu(x, *first, self.w3.weight, self.w3.bias)  # type: ignore[no-any-return]


class _Norm(nn.Module):
    """What apex's norms have in common: weights of one or more last axes, and how the output's dtype is chosen."""

    centred, mixed = True, False
    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self, normalized_shape: Any, eps: float = 1e-5, elementwise_affine: bool = True, memory_efficient: bool = False
    ) -> None:
        super().__init__()
        shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
        if self.mixed and not elementwise_affine:
            raise RuntimeError(f"{type(self).__name__} does not support `elementwise_affine = False`")
        self.normalized_shape, self.eps, self.elementwise_affine = torch.Size(shape), eps, elementwise_affine
        self.register_parameter("weight", nn.Parameter(torch.ones(shape)) if elementwise_affine else None)
        if self.centred:
            self.register_parameter("bias", nn.Parameter(torch.zeros(shape)) if elementwise_affine else None)

    def forward(self, input: Tensor) -> Tensor:
        return stands_for(f"apex.normalization.{type(self).__name__}")(self._normed)(input)  # type: ignore[no-any-return]

    def _normed(self, x: Tensor) -> Tensor:
        axes = len(self.normalized_shape)
        if x.shape[x.ndim - axes :] != self.normalized_shape:
            raise ValueError(f"{tuple(x.shape)} does not end in {tuple(self.normalized_shape)}")
        if self.centred:
            made = layer_normed(x, self.weight, self.bias, self.eps, axes)
        else:
            made = rms_normed(x, self.weight, self.eps, axes)
        return made.to(self.weight.dtype if self.mixed and self.weight is not None else x.dtype)


class FusedLayerNorm(_Norm):
    """Layer norm; the output has the input's dtype."""


class FusedRMSNorm(_Norm):
    """RMS norm; the output has the input's dtype."""

    centred = False


class MixedFusedLayerNorm(FusedLayerNorm):
    """Layer norm; the output has the weights' dtype."""

    mixed = True


class MixedFusedRMSNorm(FusedRMSNorm):
    """RMS norm; the output has the weights' dtype."""

    mixed = True
