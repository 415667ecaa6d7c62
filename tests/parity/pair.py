"""Two implementations of one small transformer that were written apart: other names, fused or split, other layouts.

B: batch, C: channels, H and W: places, L = H * W: tokens, D: width, N: heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from parity.case import Case, Draw, Side

CONFIG = {"width": 16, "heads": 2, "depth": 3, "channels": 3, "context": 10}


class FusedAttention(nn.Module):
    """One matrix for q, k and v; heads (B, N, L, E)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm = nn.RMSNorm(width // heads, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(self.q_norm(q), k, v).transpose(1, 2).flatten(2)
        out: Tensor = self.proj(y)
        return out


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = FusedAttention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(approximate="tanh"), nn.Linear(2 * width, width))
        self.modulation = nn.Linear(width, 2 * width)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.modulation(F.silu(c))[:, None].chunk(2, -1)
        x = x + self.attn(self.norm1(x) * (1 + scale) + shift)
        return x + self.mlp(self.norm2(x))


class Original(nn.Module):
    """x (B, C, H, W), t (B), mask (B, T) of text (B, T, context) -> (B, C, H, W)."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        d = config["width"]
        self.embed = nn.Conv2d(config["channels"], d, 1)
        self.time, self.text = nn.Linear(1, d), nn.Linear(config["context"], d)
        self.blocks = nn.ModuleList(Block(d, config["heads"]) for _ in range(config["depth"]))
        self.norm, self.out = nn.GroupNorm(4, d), nn.Conv2d(d, config["channels"], 1)

    def forward(self, x: Tensor, t: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        _, _, h, w = x.shape
        shown = mask.to(text.dtype)[..., None]
        c = self.time(t[:, None]) + (self.text(text) * shown).sum(1) / shown.sum(1)  # (B, D)
        y = self.embed(x).flatten(2).transpose(1, 2)  # (B, L, D)
        for block in self.blocks:
            y = block(y, c)
        out: Tensor = self.out(self.norm(y.transpose(1, 2).unflatten(2, (h, w))))
        return out


class SplitAttention(nn.Module):
    """Three matrices; heads (B, L, N, E) up to the norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.norm_q, self.to_out = nn.RMSNorm(width // heads, eps=1e-6), nn.Linear(width, width)
        self.scale = (width // heads) ** -0.5

    def forward(self, hidden: Tensor) -> Tensor:
        q = self.norm_q(self.to_q(hidden).unflatten(-1, (self.heads, -1))).transpose(1, 2)
        k, v = (p(hidden).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.to_k, self.to_v))
        y = (q @ k.transpose(-2, -1) * self.scale).softmax(-1) @ v
        out: Tensor = self.to_out(y.transpose(1, 2).flatten(2))
        return out


class Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm_a, self.norm_b = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attention = SplitAttention(width, heads)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.act: nn.Module = nn.GELU(approximate="tanh")
        self.scale_shift = nn.Linear(width, 2 * width)

    def forward(self, temb: Tensor, hidden: Tensor) -> Tensor:
        scale, shift = self.scale_shift(F.silu(temb)).unsqueeze(1).chunk(2, -1)
        hidden = hidden + self.attention(self.norm_a(hidden) * (1 + scale) + shift)
        out: Tensor = hidden + self.down(self.act(self.up(self.norm_b(hidden))))
        return out


class Port(nn.Module):
    """The same with tokens last to first: linear layers where the original has 1 x 1 convolutions."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        d = config["width"]
        self.patch = nn.Linear(config["channels"], d)
        self.time_embed, self.context_embed = nn.Linear(1, d), nn.Linear(config["context"], d)
        self.layers = nn.ModuleList(Layer(d, config["heads"]) for _ in range(config["depth"]))
        self.final_norm, self.final = nn.GroupNorm(4, d), nn.Linear(d, config["channels"])

    def forward(self, sample: Tensor, timestep: Tensor, context: Tensor, keep: Tensor) -> dict[str, Tensor]:
        b, _, h, w = sample.shape
        shown = keep[..., None].to(context.dtype)
        temb = self.time_embed(timestep.reshape(b, 1)) + (self.context_embed(context) * shown).sum(1) / shown.sum(1)
        hidden = self.patch(sample.permute(0, 2, 3, 1).reshape(b, h * w, -1))
        for layer in self.layers:
            hidden = layer(temb, hidden)
        image = self.final(self.final_norm(hidden.transpose(1, 2)).transpose(1, 2))
        return {"sample": image.transpose(1, 2).reshape(b, -1, h, w)}


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The original's state under the port's names."""
    names = {
        "embed": "patch", "time": "time_embed", "text": "context_embed", "norm": "final_norm", "out": "final",
        "norm1": "norm_a", "norm2": "norm_b", "mlp.0": "up", "mlp.2": "down", "attn.proj": "attention.to_out",
        "attn.q_norm": "attention.norm_q",
    }  # fmt: skip
    made = {}
    for name, tensor in state.items():
        stem, _, kind = name.rpartition(".")
        head, _, rest = stem.removeprefix("blocks.").partition(".")
        block = f"layers.{head}." if stem.startswith("blocks.") else ""
        inner = rest if block else stem
        if inner == "attn.qkv":
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                made[f"{block}attention.to_{letter}.{kind}"] = part
        elif inner == "modulation":  # shift, scale -> scale, shift
            made[f"{block}scale_shift.{kind}"] = torch.cat(tensor.chunk(2)[::-1])
        else:
            made[f"{block}{names[inner]}.{kind}"] = tensor.flatten(1) if tensor.ndim == 4 else tensor
    return made


def inputs(config: Mapping[str, Any], draw: Draw) -> dict[str, Tensor]:
    """Two pictures of 4 x 3 places, texts of five tokens."""
    return {
        "x": draw("x", 2, config["channels"], 4, 3), "t": draw.uniform("t", 2),
        "text": draw("text", 2, 5, config["context"]), "mask": torch.ones(2, 5, dtype=torch.bool),
    }  # fmt: skip


def answer(model: Any, given: Mapping[str, Tensor]) -> Any:
    """The port under the original's names of inputs."""
    return model(given["x"], given["t"], given["text"], given["mask"])


case = Case(
    Side(Original), Side(Port, lambda m, given: {"0": answer(m, given)["sample"]}), inputs, convert, config=CONFIG,
    name="pair",
)  # fmt: skip
