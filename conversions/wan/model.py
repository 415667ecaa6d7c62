"""Wan 2.1's and 2.2's transformer, native to porter's runtime. Weights are packed while they are read (`ON_LOAD`); on
disk names and shapes are diffusers'.

B: videos, C: latent channels (with those of the image condition), K: latent channels of the answer,
F, H, W: frames, rows and columns of the latents, S: patches of a video, frame after frame, row after row,
T: text tokens, X: width of a text token, I: pictures given, M: tokens of a picture, V: width of such a token,
N: heads, E: head width, D = N * E: model width, Q: 1, or S where every patch has a time of its own.

Ported from https://github.com/Wan-Video/Wan2.1/blob/9737cba9c1c3c4d04b33fcad41c111989865d315/wan/modules/model.py
and https://github.com/Wan-Video/Wan2.2/blob/42bf4cfaa384bc21833865abc2f9e6c0e67233dc/wan/modules/model.py.
Deviations, everywhere: where diffusers rounds and the original does not (activations between blocks, rotary tables),
the roundings are diffusers'; sinusoids are of float32 as diffusers' are, the original's of float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from conversions.wan.params import WanParams
from conversions.wan.recipe import ON_LOAD
from porter.core.errors import UsageError
from runtime.attention import ALL_BACKENDS, attention, cross_attention
from runtime.layers import (
    FeedForward,
    FP32LayerNorm,
    MLPEmbedder,
    PackedLinear,
    RMSNorm,
    modulate,
    rotary_table,
    sinusoid,
)
from runtime.parallel import sequence

THETA = 10000.0  # fixed in every Wan; diffusers has no field for it
Table = tuple[Tensor, Tensor]  # cosines and sines, (S, E / 2) each
Context = tuple[Tensor, Tensor | None]  # embedded text (B, T, D), and the pictures' tokens (B, M, D) if there are any


@dataclass
class TextCache:
    """What of one prompt no step changes: filled at the first step, read at the others.

    It belongs to one prompt, and to the model that filled it: a second model fills it anew.
    """

    model: nn.Module | None = None
    context: Context | None = None
    blocks: list[dict[str, Tensor]] = field(default_factory=list)  # what each block's `CrossAttention` keeps


# https://github.com/Wan-Video/Wan2.1/blob/9737cba9c1c3c4d04b33fcad41c111989865d315/wan/modules/model.py#L372
# Deviations: videos come as one tensor, all of a size; text and pictures stay apart, so that text may have any length.
class WanTransformer(nn.Module):
    """Velocity of the flow at (latents, time), given text and, for some, pictures."""

    supported_attention_backends = ALL_BACKENDS
    on_load = ON_LOAD
    _keep_in_fp32_modules = ("time_embedder", "scale_shift_table", "norm1", "norm2", "norm3")  # as in diffusers

    def __init__(self, params: WanParams) -> None:
        super().__init__()
        self.params = p = params
        width = p.num_attention_heads * p.attention_head_dim
        self.patch_embedding = nn.Conv3d(p.in_channels, width, p.patch_size, stride=p.patch_size)
        self.condition_embedder = Conditions(width, p)
        self.blocks = nn.ModuleList(Block(width, p) for _ in range(p.num_layers))
        self.norm_out = FP32LayerNorm(width, p.eps, elementwise_affine=False)
        self.proj_out = nn.Linear(width, p.out_channels * math.prod(p.patch_size))
        self.scale_shift_table = nn.Parameter(torch.empty(1, 2, width))

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> WanTransformer:
        """Build from diffusers' config.json. Raises BadInputError as `WanParams.from_config`."""
        return cls(WanParams.from_config(config))

    @property
    def dtype(self) -> torch.dtype:
        """Of the activations; some parameters stay float32 whatever it is."""
        return self.patch_embedding.weight.dtype

    # https://github.com/Wan-Video/Wan2.1/blob/9737cba9c1c3c4d04b33fcad41c111989865d315/wan/modules/model.py#L43
    def rotary(self, shape: Sequence[int], device: torch.device) -> Table:
        """Position table of latents of `shape` (…, F, H, W), the same at every step -> (S, E / 2) twice.

        Raises:
            UsageError: an axis is longer than the model's positions.
        """
        grid = self._grid(shape)
        if max(grid) > (longest := self.params.rope_max_seq_len):
            raise UsageError(
                "the video is larger than the model's positions reach",
                expected=f"up to {longest} patches along time, height and width",
                found=" x ".join(map(str, grid)),
                hint="smaller --height and --width, or fewer --num-frames",
            )
        ids = torch.cartesian_prod(*(torch.arange(n, device=device) for n in grid))  # (S, 3)
        side = 2 * (self.params.attention_head_dim // 6)
        return rotary_table(ids, (self.params.attention_head_dim - 2 * side, side, side), THETA)

    def forward(
        self,
        hidden_states: Tensor,  # (B, C, F, H, W) latents, with the image condition if there is one
        timestep: Tensor,  # (B,) from 1000 (noise) to 0, or (B, S), a time for each patch
        encoder_hidden_states: Tensor,  # (B, T, X) text tokens
        encoder_hidden_states_image: Tensor | None = None,  # (I, M, V) pictures' tokens, for models with image_dim
        rotary: Table | None = None,  # the table of these latents, where the caller has it already
        cache: TextCache | None = None,  # of this model and prompt
    ) -> Tensor:
        """Predict the velocity -> (B, K, F, H, W)."""
        grid = self._grid(hidden_states.shape)
        rope = self.rotary(hidden_states.shape, hidden_states.device) if rotary is None else rotary
        # Of a sequence-parallel group each rank has the text, and its part of the patches (S of it from here on).
        rope = (sequence.scatter(rope[0], dim=0), sequence.scatter(rope[1], dim=0))
        x = sequence.scatter(self.patch_embedding(hidden_states).flatten(2).mT.contiguous())  # (B, S, D)
        times = sequence.scatter(timestep) if timestep.ndim == 2 else timestep
        vec, modulation = self.condition_embedder(times, encoder_hidden_states.dtype)  # (B, Q, D), (B, Q, 6, D)
        cache = cache or TextCache()
        if cache.model is not self:
            cache.context = self.condition_embedder.embed(encoder_hidden_states, encoder_hidden_states_image)
            cache.model, cache.blocks = self, [{} for _ in self.blocks]

        for block, kept in zip(self.blocks, cache.blocks, strict=True):
            x = block(x, cache.context, modulation, rope, kept)  # (B, S, D)

        shift, scale = (self.scale_shift_table + vec.unsqueeze(2)).unbind(2)  # (B, Q, D)
        x = modulate(self.norm_out(x.float()), shift, scale).to(x.dtype)
        patches = sequence.gather(self.proj_out(x))  # (B, S, patch * K), of the whole video
        patches = patches.unflatten(1, grid).unflatten(-1, (*self.params.patch_size, -1))  # (B, f, h, w, t, y, x, K)
        return patches.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)

    def _grid(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Patches along each axis of latents (…, F, H, W)."""
        return tuple(size // patch for size, patch in zip(shape[-3:], self.params.patch_size, strict=True))


# https://github.com/Wan-Video/Wan2.1/blob/9737cba9c1c3c4d04b33fcad41c111989865d315/wan/modules/model.py#L460
class Conditions(nn.Module):
    """Time, text and pictures, each through its embedder."""

    def __init__(self, width: int, p: WanParams) -> None:
        super().__init__()
        self.frequencies = p.freq_dim
        self.time_embedder = MLPEmbedder(p.freq_dim, width)
        self.act = nn.SiLU()
        self.time_proj = nn.Linear(width, 6 * width)
        self.text_embedder = MLPEmbedder(p.text_dim, width, nn.GELU(approximate="tanh"))
        self.image_embedder = None if p.image_dim is None else ImageEmbedder(p.image_dim, width, p.pos_embed_seq_len)

    def forward(self, times: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(B,) or (B, S) -> the time's vector (B, Q, D) and the blocks' modulations (B, Q, 6, D), in `dtype`."""
        waves = sinusoid(times.flatten(), self.frequencies).unflatten(0, times.shape)  # (B, S or none, frequencies)
        vec = self.time_embedder(waves.to(self.time_embedder.linear_1.weight.dtype)).to(dtype)
        modulation = self.time_proj(self.act(vec)).unflatten(-1, (6, -1))
        return (vec, modulation) if times.ndim == 2 else (vec.unsqueeze(1), modulation.unsqueeze(1))

    def embed(self, text: Tensor, image: Tensor | None) -> Context:
        """(B, T, X), (I, M, V) -> (B, T, D), (B, M, D). Pictures are needed exactly when the config has image_dim."""
        if (image is None) != (self.image_embedder is None):
            takes, given = self.image_embedder is not None, image is not None
            raise ValueError(f"the model takes image tokens: {takes}; encoder_hidden_states_image is given: {given}")
        return self.text_embedder(text), None if self.image_embedder is None else self.image_embedder(image)


# https://github.com/Wan-Video/Wan2.1/blob/9737cba9c1c3c4d04b33fcad41c111989865d315/wan/modules/model.py#L350
class ImageEmbedder(nn.Module):
    """Tokens of a picture to the model's width; of first and last frame, both pictures' in one row, with positions."""

    def __init__(self, image: int, width: int, positions: int | None) -> None:
        super().__init__()
        self.norm1 = FP32LayerNorm(image)
        self.ff = FeedForward(image, 1, out=width, gelu="none")
        self.norm2 = FP32LayerNorm(width)
        self.pos_embed = None if positions is None else nn.Parameter(torch.empty(1, positions, image))

    def forward(self, x: Tensor) -> Tensor:
        """(I, M, V) -> (B, M, D); with positions I = 2 B, and a video's tokens are those of its two pictures."""
        if self.pos_embed is not None:
            x = x.reshape(-1, 2 * x.shape[1], x.shape[2]) + self.pos_embed
        y: Tensor = self.norm2(self.ff(self.norm1(x)))
        return y


# https://github.com/Wan-Video/Wan2.1/blob/9737cba9c1c3c4d04b33fcad41c111989865d315/wan/modules/model.py#L238
# Deviation: the norms have diffusers' numbers; the original calls the second norm3 and the third norm2.
class Block(nn.Module):
    """Attention among patches, to text and pictures, and a feed-forward; shifts, scales and gates are of float32."""

    def __init__(self, width: int, p: WanParams) -> None:
        super().__init__()
        self.norm1 = FP32LayerNorm(width, p.eps, elementwise_affine=False)
        self.attn1 = SelfAttention(width, p)
        self.norm2 = FP32LayerNorm(width, p.eps) if p.cross_attn_norm else nn.Identity()
        self.attn2 = CrossAttention(width, p)
        self.norm3 = FP32LayerNorm(width, p.eps, elementwise_affine=False)
        self.ffn = FeedForward(width, inner=p.ffn_dim)
        self.scale_shift_table = nn.Parameter(torch.empty(1, 6, width))

    def forward(self, x: Tensor, context: Context, modulation: Tensor, rope: Table, kept: dict[str, Tensor]) -> Tensor:
        """x: (B, S, D), modulation: (B, Q, 6, D), kept: what `CrossAttention` keeps -> (B, S, D)."""
        modulation = self.scale_shift_table + modulation.float()
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation.unbind(2)  # (B, Q, D)
        y = self.attn1(modulate(self.norm1(x.float()), shift, scale).to(x.dtype), rope)
        x = (x.float() + y * gate).to(x.dtype)
        x = x + self.attn2(self.norm2(x.float()).to(x.dtype), context, kept)
        y = self.ffn(modulate(self.norm3(x.float()), mlp_shift, mlp_scale).to(x.dtype))
        return (x.float() + y.float() * mlp_gate).to(x.dtype)


# https://github.com/Wan-Video/Wan2.1/blob/9737cba9c1c3c4d04b33fcad41c111989865d315/wan/modules/model.py#L105
class SelfAttention(nn.Module):
    """Attention among the patches; q and k are normed across all heads."""

    def __init__(self, width: int, p: WanParams) -> None:
        super().__init__()
        self.head = p.attention_head_dim
        self.to_qkv = PackedLinear(width, (width, width, width))
        self.norm_q, self.norm_k = (RMSNorm(width, p.eps, fused=True) for _ in range(2))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor, rope: Table) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        q, k, v = self.to_qkv.parts(x)
        q, k, v = (y.unflatten(-1, (-1, self.head)) for y in (self.norm_q(q), self.norm_k(k), v))  # (B, S, N, E)
        y: Tensor = self.to_out[0](attention(_rotate(q, rope), _rotate(k, rope), v))
        return y


# https://github.com/Wan-Video/Wan2.1/blob/9737cba9c1c3c4d04b33fcad41c111989865d315/wan/modules/model.py#L162
# With pictures: #L187.
class CrossAttention(nn.Module):
    """Attention to the text and, with keys and values of their own, to the pictures; both answers are added up."""

    def __init__(self, width: int, p: WanParams) -> None:
        super().__init__()
        self.head = p.attention_head_dim
        self.to_q = nn.Linear(width, width)
        self.to_kv = PackedLinear(width, (width, width))
        self.norm_q, self.norm_k = (RMSNorm(width, p.eps, fused=True) for _ in range(2))
        self.add_kv_proj = self.norm_added_k = None
        if p.added_kv_proj_dim is not None:
            self.add_kv_proj = PackedLinear(p.added_kv_proj_dim, (width, width))
            self.norm_added_k = RMSNorm(width, p.eps, fused=True)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor, context: Context, kept: dict[str, Tensor]) -> Tensor:
        """x: (B, S, D) -> (B, S, D). Keys and values are computed into `kept` unless it has them already."""
        if not kept:
            kept.update(self._keys(context))
        q = self.norm_q(self.to_q(x)).unflatten(-1, (-1, self.head))  # (B, S, N, E)
        y = cross_attention(q, kept["k"], kept["v"])  # (B, S, D)
        if "image_k" in kept:
            y = y + cross_attention(q, kept["image_k"], kept["image_v"])
        out: Tensor = self.to_out[0](y)
        return out

    def _keys(self, context: Context) -> dict[str, Tensor]:
        """Keys and values (B, T, N, E) of the text, and (B, M, N, E) of the pictures if there are any."""
        text, image = context
        k, v = self.to_kv.parts(text)
        found = {"k": self.norm_k(k), "v": v}
        if self.add_kv_proj is not None and self.norm_added_k is not None:
            assert image is not None  # `Conditions.embed` saw to it
            k, v = self.add_kv_proj.parts(image)
            found |= {"image_k": self.norm_added_k(k), "image_v": v}
        return {name: y.unflatten(-1, (-1, self.head)) for name, y in found.items()}


# https://github.com/Wan-Video/Wan2.1/blob/9737cba9c1c3c4d04b33fcad41c111989865d315/wan/modules/model.py#L43
def _rotate(x: Tensor, table: Table) -> Tensor:
    """Turn each pair (x[2i], x[2i+1]) by its angle, in the wider type of both. x: (B, S, N, E), table: (S, E / 2)."""
    cos, sin = (part[:, None] for part in table)  # (S, 1, E / 2)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)  # (B, S, N, E / 2)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)
