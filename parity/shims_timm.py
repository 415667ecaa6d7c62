"""timm's layers that transformers are built from: the same parameters, and what they compute in inference.

Stand-alone with `shims_kernels.py`. Options that would compute something else are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import repeat
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from parity.shims_kernels import refuse, stands_for


def to_2tuple(value: Any) -> Any:
    """A number twice; what has parts already stays."""
    if isinstance(value, str) or not hasattr(value, "__iter__"):
        return tuple(repeat(value, 2))
    return tuple(value)


trunc_normal_ = nn.init.trunc_normal_


class PatchEmbed(nn.Module):
    """Patches of a picture (B, C, H, W) as tokens (B, N, E), row by row; (B, E, h, w) without `flatten`."""

    @stands_for("timm.layers.PatchEmbed")
    def __init__(
        self, img_size: Any = 224, patch_size: Any = 16, in_chans: int = 3, embed_dim: int = 768,
        norm_layer: Callable[[int], nn.Module] | None = None, flatten: bool = True, output_fmt: Any = None,
        bias: bool = True, strict_img_size: bool = True, **other: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        refuse("timm.layers.PatchEmbed", output_fmt=output_fmt, **other)
        self.patch_size = to_2tuple(patch_size)
        self.img_size = None if img_size is None else to_2tuple(img_size)
        self.grid_size = self.num_patches = None
        if self.img_size is not None:
            self.grid_size = tuple(s // p for s, p in zip(self.img_size, self.patch_size))  # noqa: B905 (3.9)
            self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.flatten, self.strict_img_size = flatten, strict_img_size
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=self.patch_size, stride=self.patch_size, bias=bias)
        self.norm = norm_layer(embed_dim) if norm_layer else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.img_size is not None and self.strict_img_size and tuple(x.shape[-2:]) != self.img_size:
            raise AssertionError(f"input of {tuple(x.shape[-2:])} does not match the model's {self.img_size}")
        x = self.proj(x)
        out: Tensor = self.norm(x.flatten(2).transpose(1, 2) if self.flatten else x)
        return out


class Attention(nn.Module):
    """Attention over tokens (B, N, E) with q, k and v from one matrix, in this order, each head after head."""

    @stands_for("timm.layers.Attention")
    def __init__(
        self, dim: int, num_heads: int = 8, qkv_bias: bool = False, qk_norm: bool = False, proj_bias: bool = True,
        attn_drop: float = 0.0, proj_drop: float = 0.0, norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
        **other: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        refuse("timm.layers.Attention", **other)
        if dim % num_heads:
            raise AssertionError("dim should be divisible by num_heads")
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.scale = self.head_dim**-0.5
        self.fused_attn = True
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.q_norm = norm_layer(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = norm_layer(self.head_dim) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, bias=proj_bias)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v, attn_mask=attn_mask)
        out: Tensor = self.proj_drop(self.proj(y.transpose(1, 2).flatten(2)))
        return out


class Mlp(nn.Module):
    """Two linear layers, or 1 x 1 convolutions, with an activation and perhaps a norm between them."""

    @stands_for("timm.layers.Mlp")
    def __init__(
        self, in_features: int, hidden_features: int | None = None, out_features: int | None = None,
        act_layer: Callable[[], nn.Module] = nn.GELU, norm_layer: Callable[[int], nn.Module] | None = None,
        bias: Any = True, drop: Any = 0.0, use_conv: bool = False, **other: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        refuse("timm.layers.Mlp", **other)
        hidden, (first, second), drops = hidden_features or in_features, to_2tuple(bias), to_2tuple(drop)

        def layer(rows: int, columns: int, biased: bool) -> nn.Module:
            return nn.Conv2d(rows, columns, 1, bias=biased) if use_conv else nn.Linear(rows, columns, bias=biased)

        self.fc1 = layer(in_features, hidden, first)
        self.act = act_layer()
        self.drop1 = nn.Dropout(drops[0])
        self.norm = norm_layer(hidden) if norm_layer is not None else nn.Identity()
        self.fc2 = layer(hidden, out_features or in_features, second)
        self.drop2 = nn.Dropout(drops[1])

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))
        return out


class DropPath(nn.Module):
    """Nothing, in inference."""

    def __init__(self, drop_prob: float = 0.0, scale_by_keep: bool = True) -> None:
        super().__init__()
        self.drop_prob, self.scale_by_keep = drop_prob, scale_by_keep

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.drop_prob:
            refuse("timm.layers.DropPath", training=True)
        return x
