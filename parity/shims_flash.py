"""flash_attn (2.8) and flash_attn_interface (3) on the CPU: the same signatures and layouts, in plain torch.

Stand-alone with `shims_kernels.py`. Causal masks are aligned to the bottom right, as they are since flash_attn 2.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from parity.shims_kernels import attend, layer_normed, refuse, rms_normed, rotated, stands_for, visible

Window = Sequence["int | None"]


def _alibi(slopes: Tensor, sequence: int | None, queries: int, keys: int) -> Any:
    """-slope * |i + keys - queries - j| of a head; slopes (H) or (B, H), of one sequence where it has its own run."""
    place = torch.arange(queries, device=slopes.device)[:, None] + (keys - queries)
    far = (place - torch.arange(keys, device=slopes.device)[None]).abs()
    rows = slopes[None] if slopes.ndim == 1 else slopes if sequence is None else slopes[sequence : sequence + 1]
    return lambda head: -rows[:, head, None, None] * far


def _attention(
    name: str, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, causal: bool, window: Window, softcap: float,
    slopes: Tensor | None = None, sequence: int | None = None, **refused: Any,
) -> Tensor:  # fmt: skip
    """(B, S, H, D) each -> (B, Sq, H, Dv)."""
    refuse(name, **refused)
    queries, keys = q.shape[1], k.shape[1]
    bias = None if slopes is None else _alibi(slopes, sequence, queries, keys)
    seen = visible(queries, keys, window, causal, q)
    return attend(q, k, v, scale, seen=seen, bias=bias, softcap=softcap)


def _ragged(
    name: str, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, **options: Any
) -> Tensor:
    """Sequences one after the other: (total, H, D) each; rows behind the last sequence stay zero."""
    starts, others = cu_q.tolist(), cu_k.tolist()
    if len(starts) != len(others) or starts[-1] > len(q) or others[-1] > len(k) or len(k) != len(v):
        raise ValueError(f"{name}: sequences {starts} and {others} are not those of {len(q)} and {len(k)} tokens")
    out = q.new_zeros(*q.shape[:2], v.shape[-1])
    for index in range(len(starts) - 1):
        a, b, c, d = starts[index], starts[index + 1], others[index], others[index + 1]
        if b - a > max_q or d - c > max_k or b < a or d < c:
            raise ValueError(
                f"{name}: sequence {index} has {b - a} and {d - c} tokens, at most {max_q} and {max_k} fit"
            )
        out[a:b] = _attention(name, q[None, a:b], k[None, c:d], v[None, c:d], sequence=index, **options)[0]
    return out


def _options(
    dropout_p: float, softmax_scale: float | None, causal: bool, window_size: Window, softcap: float,
    alibi_slopes: Tensor | None, return_attn_probs: bool, block_table: Any = None,
) -> dict[str, Any]:  # fmt: skip
    return {
        "scale": softmax_scale, "causal": causal, "window": window_size, "softcap": softcap, "slopes": alibi_slopes,
        "dropout_p": dropout_p, "return_attn_probs": return_attn_probs, "block_table": block_table,
    }  # fmt: skip


@stands_for("flash_attn.flash_attn_func")
def flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: Window = (-1, -1), softcap: float = 0.0, alibi_slopes: Tensor | None = None,
    deterministic: bool = False, return_attn_probs: bool = False,
) -> Tensor:  # fmt: skip
    """(B, Sq, H, D), (B, Sk, Hk, D), (B, Sk, Hk, D) -> (B, Sq, H, D)."""
    options = _options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, return_attn_probs)
    return _attention("flash_attn_func", q, k, v, **options)


@stands_for("flash_attn.flash_attn_qkvpacked_func")
def flash_attn_qkvpacked_func(
    qkv: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: Window = (-1, -1), softcap: float = 0.0, alibi_slopes: Tensor | None = None,
    deterministic: bool = False, return_attn_probs: bool = False,
) -> Tensor:  # fmt: skip
    """(B, S, 3, H, D) -> (B, S, H, D)."""
    options = _options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, return_attn_probs)
    return _attention("flash_attn_qkvpacked_func", *qkv.unbind(2), **options)


@stands_for("flash_attn.flash_attn_kvpacked_func")
def flash_attn_kvpacked_func(
    q: Tensor, kv: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: Window = (-1, -1), softcap: float = 0.0, alibi_slopes: Tensor | None = None,
    deterministic: bool = False, return_attn_probs: bool = False,
) -> Tensor:  # fmt: skip
    """(B, Sq, H, D), (B, Sk, 2, Hk, D) -> (B, Sq, H, D)."""
    options = _options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, return_attn_probs)
    return _attention("flash_attn_kvpacked_func", q, *kv.unbind(2), **options)


@stands_for("flash_attn.flash_attn_varlen_func")
def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False, window_size: Window = (-1, -1),
    softcap: float = 0.0, alibi_slopes: Tensor | None = None, deterministic: bool = False,
    return_attn_probs: bool = False, block_table: Any = None,
) -> Tensor:  # fmt: skip
    """(total q, H, D), (total k, Hk, D), (total k, Hk, D), offsets of B + 1 each -> (total q, H, D)."""
    options = _options(
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, return_attn_probs, block_table
    )
    sizes = cu_seqlens_q, cu_seqlens_k, int(max_seqlen_q), int(max_seqlen_k)
    return _ragged("flash_attn_varlen_func", q, k, v, *sizes, **options)


@stands_for("flash_attn.flash_attn_varlen_qkvpacked_func")
def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, dropout_p: float = 0.0, softmax_scale: float | None = None,
    causal: bool = False, window_size: Window = (-1, -1), softcap: float = 0.0, alibi_slopes: Tensor | None = None,
    deterministic: bool = False, return_attn_probs: bool = False,
) -> Tensor:  # fmt: skip
    """(total, 3, H, D), offsets of B + 1 -> (total, H, D)."""
    options = _options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, return_attn_probs)
    sizes = cu_seqlens, cu_seqlens, int(max_seqlen), int(max_seqlen)
    q, k, v = qkv.unbind(1)
    return _ragged("flash_attn_varlen_qkvpacked_func", q, k, v, *sizes, **options)


@stands_for("flash_attn.flash_attn_varlen_kvpacked_func")
def flash_attn_varlen_kvpacked_func(
    q: Tensor, kv: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False, window_size: Window = (-1, -1),
    softcap: float = 0.0, alibi_slopes: Tensor | None = None, deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor:  # fmt: skip
    """(total q, H, D), (total k, 2, Hk, D), offsets of B + 1 each -> (total q, H, D)."""
    options = _options(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, return_attn_probs)
    sizes = cu_seqlens_q, cu_seqlens_k, int(max_seqlen_q), int(max_seqlen_k)
    k, v = kv.unbind(1)
    return _ragged("flash_attn_varlen_kvpacked_func", q, k, v, *sizes, **options)


@stands_for("flash_attn_interface.flash_attn_func")
def flash_3(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None, causal: bool = False, qv: Any = None,
    q_descale: Any = None, k_descale: Any = None, v_descale: Any = None, window_size: Window = (-1, -1),
    attention_chunk: int = 0, softcap: float = 0.0, num_splits: int = 1, pack_gqa: Any = None,
    deterministic: bool = False, sm_margin: int = 0, return_attn_probs: bool = False,
) -> Tensor:  # fmt: skip
    """`flash_attn_func` of flash_attn_interface: the output alone, as since its return_attn_probs."""
    return _attention(
        "flash_attn_interface.flash_attn_func", q, k, v, scale=softmax_scale, causal=causal, window=window_size,
        softcap=softcap, qv=qv, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale,
        attention_chunk=attention_chunk, return_attn_probs=return_attn_probs,
    )  # fmt: skip


@stands_for("flash_attn_interface.flash_attn_varlen_func")
def flash_3_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    seqused_q: Any = None, seqused_k: Any = None, softmax_scale: float | None = None, causal: bool = False,
    qv: Any = None, q_descale: Any = None, k_descale: Any = None, v_descale: Any = None,
    window_size: Window = (-1, -1), attention_chunk: int = 0, softcap: float = 0.0, num_splits: int = 1,
    pack_gqa: Any = None, deterministic: bool = False, sm_margin: int = 0, return_attn_probs: bool = False,
) -> Tensor:  # fmt: skip
    """`flash_attn_varlen_func` of flash_attn_interface: the output alone, as since its return_attn_probs."""
    return _ragged(
        "flash_attn_interface.flash_attn_varlen_func", q, k, v, cu_seqlens_q, cu_seqlens_k, int(max_seqlen_q),
        int(max_seqlen_k), scale=softmax_scale, causal=causal, window=window_size, softcap=softcap, qv=qv,
        q_descale=q_descale, k_descale=k_descale, v_descale=v_descale, attention_chunk=attention_chunk,
        return_attn_probs=return_attn_probs, seqused_q=seqused_q, seqused_k=seqused_k,
    )  # fmt: skip


@stands_for("flash_attn.bert_padding.index_first_axis")
def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """(N, ...), (M) -> (M, ...)."""
    return input[indices]


@stands_for("flash_attn.bert_padding.unpad_input")
def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """(B, S, ...), (B, S) -> tokens (N, ...), their places (N), offsets (B + 1) int32, longest, lengths (B) int32."""
    whole = attention_mask if unused_mask is None else attention_mask + unused_mask
    used = attention_mask.sum(-1, dtype=torch.int32)
    lengths = whole.sum(-1, dtype=torch.int32)
    places = torch.nonzero(whole.flatten()).flatten()
    offsets = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return hidden_states.flatten(0, 1)[places], places, offsets, int(lengths.max()), used


@stands_for("flash_attn.bert_padding.pad_input")
def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """Tokens (N, ...) back at their places in (B, S, ...), zeros elsewhere."""
    out = hidden_states.new_zeros(batch * seqlen, *hidden_states.shape[1:])
    out[indices] = hidden_states
    return out.reshape(batch, seqlen, *hidden_states.shape[1:])


@stands_for("flash_attn.layers.rotary.apply_rotary_emb")
def apply_rotary_emb(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, inplace: bool = False, seqlen_offsets: Any = 0,
    cu_seqlens: Tensor | None = None, max_seqlen: int | None = None,
) -> Tensor:  # fmt: skip
    """x (B, S, H, D), or (total, H, D) with `cu_seqlens`; cos, sin (S or more, R) turn its first 2 * R channels."""
    count = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    offsets = seqlen_offsets.tolist() if isinstance(seqlen_offsets, Tensor) else [int(seqlen_offsets)] * count
    if cu_seqlens is None:
        made = torch.stack([rotated(row, cos, sin, interleaved, at) for row, at in zip(x, offsets)])  # noqa: B905
    else:
        rows = torch.split(x, cu_seqlens.diff().tolist())
        made = torch.cat([rotated(row, cos, sin, interleaved, at) for row, at in zip(rows, offsets)])  # noqa: B905
    return x.copy_(made) if inplace else made


@stands_for("flash_attn.ops.triton.layer_norm.layer_norm_fn")
def layer_norm_fn(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None, x1: Any = None, weight1: Any = None,
    bias1: Any = None, eps: float = 1e-6, dropout_p: float = 0.0, rowscale: Any = None, prenorm: bool = False,
    residual_in_fp32: bool = False, is_rms_norm: bool = False, return_dropout_mask: bool = False,
) -> Any:  # fmt: skip
    """Norm of x + residual over the last axis; with `prenorm` also that sum, in the residual's dtype."""
    refuse(
        "layer_norm_fn", x1=x1, weight1=weight1, bias1=bias1, dropout_p=dropout_p, rowscale=rowscale,
        return_dropout_mask=return_dropout_mask,
    )  # fmt: skip
    kept = residual.dtype if residual is not None else torch.float32 if residual_in_fp32 else x.dtype
    kept = torch.promote_types(kept, x.dtype) if x.dtype == torch.float64 else kept  # the arbiter's run stays one
    wide = torch.promote_types(torch.float32, torch.promote_types(x.dtype, kept))
    whole = x.to(wide) if residual is None else x.to(wide) + residual.to(wide)
    normed = rms_normed(whole, weight, eps, bias=bias) if is_rms_norm else layer_normed(whole, weight, bias, eps)
    return (normed.to(x.dtype), whole.to(kept)) if prenorm else normed.to(x.dtype)


def rms_norm_fn(x: Tensor, weight: Tensor, bias: Tensor | None, *args: Any, **kwargs: Any) -> Any:
    """`layer_norm_fn` without the mean; the same arguments but for `is_rms_norm`."""
    return layer_norm_fn(x, weight, bias, *args, **kwargs, is_rms_norm=True)


@stands_for("flash_attn.ops.rms_norm.rms_norm")
def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMS norm over the last axis, in the dtype of x."""
    return rms_normed(x, weight, epsilon).to(x.dtype)


class RMSNorm(nn.Module):
    """`flash_attn.ops.rms_norm.RMSNorm`, and that of `flash_attn.ops.triton.layer_norm` without dropout."""

    def __init__(
        self, hidden_size: int, eps: float = 1e-5, dropout_p: float = 0.0, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        refuse("RMSNorm", dropout_p=dropout_p)
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)

    def forward(self, x: Tensor, residual: Tensor | None = None, prenorm: bool = False) -> Any:
        return rms_norm_fn(x, self.weight, None, residual=residual, eps=self.eps, prenorm=prenorm)


@stands_for("flash_attn.ops.activations.swiglu")
def swiglu(x: Tensor, y: Tensor) -> Tensor:
    """silu(x) * y."""
    return torch.nn.functional.silu(x) * y
