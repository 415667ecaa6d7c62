"""transformer_engine.pytorch on the CPU: its norms, attention and rotary positions, in plain torch.

Stand-alone with `shims_kernels.py`. What is trained with it (fp8, tensor parallelism, dropout) is refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from parity.shims_kernels import attend, layer_normed, refuse, rms_normed, stands_for, visible, working

_FORMATS = ("sbhd", "bshd")
_WITHOUT_EFFECT = (  # training, and which device and dtype the weights start in
    "sequence_parallel", "params_dtype", "device", "fwd_rmsnorm_sm_margin", "bwd_rmsnorm_sm_margin",
    "inf_rmsnorm_sm_margin", "fwd_layernorm_sm_margin", "bwd_layernorm_sm_margin", "inf_layernorm_sm_margin",
)  # fmt: skip


class _Norm(nn.Module):
    centred = False
    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self, normalized_shape: Any, eps: float = 1e-5, *, zero_centered_gamma: bool = False, **given: Any
    ) -> None:
        super().__init__()
        refuse(type(self).__name__, **{k: v for k, v in given.items() if k not in _WITHOUT_EFFECT})
        self.normalized_shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
        self.eps, self.zero_centered_gamma = eps, zero_centered_gamma
        self.weight = nn.Parameter(torch.empty(self.normalized_shape))
        self.register_parameter("bias", nn.Parameter(torch.empty(self.normalized_shape)) if self.centred else None)
        self.reset_parameters()

    def reset_parameters(self, *args: Any, **kwargs: Any) -> None:
        """Weights that change nothing."""
        nn.init.constant_(self.weight, 0.0 if self.zero_centered_gamma else 1.0)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, inp: Tensor) -> Tensor:
        return stands_for(f"transformer_engine.pytorch.{type(self).__name__}")(self._normed)(inp)  # type: ignore[no-any-return]

    def _normed(self, x: Tensor) -> Tensor:
        weight = self.weight + 1 if self.zero_centered_gamma else self.weight
        axes = len(self.normalized_shape)
        made = (
            layer_normed(x, weight, self.bias, self.eps, axes)
            if self.centred
            else rms_normed(x, weight, self.eps, axes)
        )
        return made.to(x.dtype)


class RMSNorm(_Norm):
    """x (..., D) -> (..., D); the weight counts from one where `zero_centered_gamma` is set."""


class LayerNorm(_Norm):
    """x (..., D) -> (..., D); the weight counts from one where `zero_centered_gamma` is set."""

    centred = True


class DotProductAttention(nn.Module):
    """Attention without weights of its own: q, k, v (S, B, H, D) or (B, S, H, D) -> (S, B, H * D) or (B, S, H * D)."""

    def __init__(
        self, num_attention_heads: int, kv_channels: Any, num_gqa_groups: int | None = None,
        attention_dropout: float = 0.1, qkv_format: str = "sbhd", attn_mask_type: str = "causal",
        sequence_parallel: bool = False, tp_size: int = 1, get_rng_state_tracker: Any = None, tp_group: Any = None,
        layer_number: int | None = None, attention_type: str = "self", cp_group: Any = None,
        cp_global_ranks: Any = None, cp_stream: Any = None, softmax_scale: float | None = None, **given: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        refuse("DotProductAttention", tp_size=tp_size - 1, cp_group=cp_group, **given)
        self.num_attention_heads, self.softmax_scale = num_attention_heads, softmax_scale
        self.qkv_format, self.attn_mask_type, self.attention_dropout = qkv_format, attn_mask_type, attention_dropout

    def set_context_parallel_group(self, cp_group: Any, *args: Any, **kwargs: Any) -> None:
        """No group: everything is here."""
        refuse("DotProductAttention", cp_group=cp_group)

    @stands_for("transformer_engine.pytorch.DotProductAttention")
    def forward(
        self, query_layer: Tensor, key_layer: Tensor, value_layer: Tensor, attention_mask: Tensor | None = None,
        qkv_format: str | None = None, *, attn_mask_type: str | None = None, core_attention_bias_type: str = "no_bias",
        core_attention_bias: Tensor | None = None, **given: Any,
    ) -> Tensor:  # fmt: skip
        refuse("DotProductAttention", attention_mask=attention_mask, core_attention_bias=core_attention_bias, **given)
        kind, mask = qkv_format or self.qkv_format, attn_mask_type or self.attn_mask_type
        refuse("DotProductAttention", dropout=self.training and self.attention_dropout)
        if kind not in _FORMATS or mask not in ("no_mask", "causal") or core_attention_bias_type != "no_bias":
            raise NotImplementedError(
                f"DotProductAttention on the CPU (parity/shims.py) has no {kind}, {mask}, {core_attention_bias_type}"
            )
        q, k, v = (t.transpose(0, 1) if kind == "sbhd" else t for t in (query_layer, key_layer, value_layer))
        seen = None
        if mask == "causal":
            refuse("DotProductAttention", causal_with_other_lengths=q.shape[1] - k.shape[1])
            seen = visible(q.shape[1], k.shape[1], (-1, -1), True, q)
        out = attend(q, k, v, self.softmax_scale, seen=seen).flatten(2)
        return out.transpose(0, 1) if kind == "sbhd" else out


@stands_for("transformer_engine.pytorch.attention.apply_rotary_pos_emb")
def apply_rotary_pos_emb(
    t: Tensor, freqs: Tensor, tensor_format: str = "sbhd", fused: bool = False, cu_seqlens: Tensor | None = None,
    cp_size: int = 1, cp_rank: int = 0, **given: Any,
) -> Tensor:  # fmt: skip
    """Rotary positions on the first R channels of t (S, B, H, D) or (B, S, H, D): halves turn against each other.

    Args:
        freqs: angles (at least S, 1, 1, R), the same in both halves of R.
    """
    refuse("apply_rotary_pos_emb", cu_seqlens=cu_seqlens, cp_size=cp_size - 1, **given)
    if tensor_format not in _FORMATS:
        raise NotImplementedError(f"apply_rotary_pos_emb on the CPU (parity/shims.py) has no {tensor_format}")
    length = t.shape[_FORMATS.index(tensor_format)]
    if freqs.ndim != 4 or freqs.shape[0] < length or freqs.shape[-1] > t.shape[-1]:
        raise ValueError(f"angles {tuple(freqs.shape)} do not fit {tuple(t.shape)} ({tensor_format})")
    angles = freqs[:length].to(working(t.dtype))
    angles = angles.transpose(0, 1) if tensor_format == "bshd" else angles
    turned, rest = t[..., : freqs.shape[-1]].to(angles.dtype), t[..., freqs.shape[-1] :]
    a, b = turned.chunk(2, -1)
    made = turned * angles.cos() + torch.cat((-b, a), -1) * angles.sin()
    return torch.cat((made.to(t.dtype), rest), -1)
