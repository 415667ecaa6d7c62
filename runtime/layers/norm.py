"""Norms that diffusion transformers use beside torch's own.  D: width."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runtime.quality import quality


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) * weight over the last axis: (…, D) -> (…, D).

    torch's fused norm rounds once. At quality `exact` the roundings are those of diffusers: the mean in float32, the
    normalised values rounded to the weight's type, then multiplied by the weight; unless diffusers' model has torch's
    norm itself (`fused`).
    """

    def __init__(self, width: int, eps: float = 1e-6, *, fused: bool = False) -> None:
        super().__init__()
        self.eps, self.fused = eps, fused
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        if self.fused or quality() != "exact":
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        mean = x.float().square().mean(-1, keepdim=True)
        normed = x * torch.rsqrt(mean + self.eps)
        return normed.to(self.weight.dtype) * self.weight


class FP32LayerNorm(nn.LayerNorm):
    """LayerNorm computed in float32 and rounded once to the input's type: (…, D) -> (…, D)."""

    def forward(self, input: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.float()
        bias = None if self.bias is None else self.bias.float()
        return F.layer_norm(input.float(), self.normalized_shape, weight, bias, self.eps).to(input.dtype)
