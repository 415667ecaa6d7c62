"""Linear layers of a denoiser's blocks in 8-bit floating point, with a scale for each output row.

A row's weights are stored as float8_e4m3fn in units of the row's largest value / 448, and are multiplied by the scale
when they are used. Devices with 8-bit matrix products (CUDA, compute capability 8.9) take them as they are, and round
the layer's input in the same way, row by row.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runtime.compiled import blocks_of
from runtime.memory.parking import Home

KIND = torch.float8_e4m3fn
LARGEST = torch.finfo(KIND).max
SCALE = "_scale"  # after a weight's name
_MULTIPLE = 16  # of both widths, for 8-bit products


class _Fp8(nn.Module):
    weight: Tensor  # (O, D) float8_e4m3fn
    weight_scale: Tensor  # (O, 1) float32
    bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        """(…, D) -> (…, O)."""
        even = not any(size % _MULTIPLE for size in self.weight.shape)
        if input.is_cuda and input.dtype == torch.bfloat16 and even and products(input.device):
            return self._product(input)
        return F.linear(input, dequantise(self.weight, self.weight_scale, input.dtype), self.bias)

    def _product(self, input: Tensor) -> Tensor:
        """A product of two 8-bit matrices, with scales for rows of both."""
        rows = input.reshape(-1, input.shape[-1])
        x, scale = quantise(rows)
        y: Tensor = torch._scaled_mm(
            x, self.weight.t(), scale_a=scale, scale_b=self.weight_scale.t(), bias=self.bias, out_dtype=input.dtype
        )
        return y.view(*input.shape[:-1], -1)


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(O, D) -> float8_e4m3fn of the same shape, and float32 scales (O, 1)."""
    wide = weight.float()
    scale = wide.abs().amax(dim=-1, keepdim=True) / LARGEST
    scale = torch.where(scale > 0, scale, 1.0)  # a row of zeros
    return (wide / scale).clamp(-LARGEST, LARGEST).to(KIND), scale


def dequantise(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """What `quantise` made, as `dtype`; rounded once."""
    return (weight.float() * scale).to(dtype)


@cache
def products(device: torch.device) -> bool:
    """Whether a CUDA device multiplies 8-bit matrices with a scale for each row."""
    if torch.cuda.get_device_capability(device) < (8, 9):
        return False
    ones = torch.ones(_MULTIPLE, _MULTIPLE, device=device).to(KIND)
    scale = torch.ones(_MULTIPLE, 1, device=device)
    try:
        torch._scaled_mm(ones, ones.t(), scale_a=scale, scale_b=scale.t(), out_dtype=torch.bfloat16)
    except RuntimeError:  # a build or a card whose kernels know a scale for the whole matrix alone
        return False
    return True


@cache
def _with_fp8(kind: Any) -> Any:
    return type(f"Fp8{kind.__name__}", (_Fp8, kind), {"__module__": kind.__module__})


class Fp8Home:
    """A home whose large weights are made 8-bit on the way; the module's layers are changed to take them."""

    def __init__(self, module: nn.Module, home: Home) -> None:
        """`module`: on the meta device."""
        self._home = home
        self._weights = {f"{name}.weight" for name in linears(module, home.names)}
        for name in self._weights:
            layer: Any = module.get_submodule(name.removesuffix(".weight"))
            kind: Any = type(layer)
            layer.__class__ = _with_fp8(kind)
            layer.weight = nn.Parameter(torch.empty(layer.weight.shape, dtype=KIND, device="meta"), False)
            scale = torch.empty(layer.weight.shape[0], 1, device="meta")
            layer.register_buffer("weight" + SCALE, scale, persistent=False)

    @property
    def names(self) -> Sequence[str]:
        return (*self._home.names, *(name + SCALE for name in self._weights))

    def fetch(self, names: Sequence[str]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name in names:  # one by one: the whole numbers of one layer at a time
            plain = name.removesuffix(SCALE) if name.removesuffix(SCALE) in self._weights else name
            if name in found:
                continue
            value = self._home.fetch([plain])[plain]
            made = dict(zip((plain, plain + SCALE), quantise(value), strict=True)) if plain in self._weights else {}
            found |= {key: tensor for key, tensor in (made or {plain: value}).items() if key in names}
        return found

    def dtype(self, name: str) -> torch.dtype:
        if name in self._weights:
            return KIND
        return torch.float32 if name.removesuffix(SCALE) in self._weights else self._home.dtype(name)


def linears(module: nn.Module, names: Sequence[str]) -> list[str]:
    """Linear layers of the module's repeated blocks, but for those that the class keeps in float32."""
    kept, held = set(getattr(module, "_keep_in_fp32_modules", None) or ()), set(names)
    inside = {id(part) for block in blocks_of(module) for part in block.modules()}
    return [
        name for name, part in module.named_modules()
        if id(part) in inside and isinstance(part, nn.Linear) and not kept & set(name.split("."))
        and f"{name}.weight" in held
    ]  # fmt: skip
