"""The transformer of Stable Diffusion 3 and 3.5, native to porter's runtime. Weights are packed while they are read
(`ON_LOAD`); on disk names and shapes are diffusers'.

B: images, C: latent channels, H, W: latent positions, p: side of a patch, S = (H / p) * (W / p) image tokens,
T: text tokens, L = T + S (text first), X: width of a text token, P: width of the pooled text,
N: heads, E: head width, D = N * E: model width.

Ported from https://github.com/Stability-AI/sd3.5/blob/fbf8f483f992d8d6ad4eaaeb23b1dc5f523c3b3a/mmditx.py.
Deviations, everywhere: a joint block's two streams are one module (the original has `x_block` and `context_block`); two
of the modulations are stored scale first. What no released model has is not ported: register tokens, RMS instead of
LayerNorm, SwiGLU, modulation without shifts, LayerNorm of q and k.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conversions.sd3.params import SD3Params
from conversions.sd3.recipe import ON_LOAD
from porter.core.errors import UsageError
from runtime.attention import attention
from runtime.layers import AdaLayerNorm, FeedForward, MLPEmbedder, PackedLinear, RMSNorm, modulate, sinusoid
from runtime.parallel import sequence
from runtime.quality import quality

FREQUENCIES = 256  # width of the timestep's sinusoids
Heads = tuple[Tensor, Tensor, Tensor]  # q, k and v, (B, tokens, N, E) each


# https://github.com/Stability-AI/sd3.5/blob/fbf8f483f992d8d6ad4eaaeb23b1dc5f523c3b3a/mmditx.py#L695
class SD3Transformer(nn.Module):
    """Velocity of the flow at (latents, time), given text."""

    supported_attention_backends = ("sdpa", "math", "flash", "efficient", "cudnn")
    on_load = ON_LOAD

    def __init__(self, params: SD3Params) -> None:
        super().__init__()
        self.params = p = params
        width = p.width
        self.pos_embed = PatchEmbed(p.in_channels, width, p.patch_size, p.pos_embed_max_size)
        self.time_text_embed = Conditioning(width, p.pooled_projection_dim)
        self.context_embedder = nn.Linear(p.joint_attention_dim, width)
        self.transformer_blocks = nn.ModuleList(
            JointBlock(
                width,
                p.attention_head_dim,
                normed=p.qk_norm is not None,
                dual=i in p.dual_attention_layers,
                last=i == p.num_layers - 1,
            )
            for i in range(p.num_layers)
        )
        self.norm_out = AdaLayerNorm(width, 2, scale_first=True)
        self.proj_out = nn.Linear(width, p.patch_size**2 * p.out_channels)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> SD3Transformer:
        """Build from diffusers' config.json. Raises BadInputError as `SD3Params.from_config`."""
        return cls(SD3Params.from_config(config))

    def forward(
        self,
        hidden_states: Tensor,  # (B, C, H, W) latents
        encoder_hidden_states: Tensor,  # (B, T, X) text tokens
        pooled_projections: Tensor,  # (B, P) pooled text
        timestep: Tensor,  # (B,) from 1000 (noise) to 0
        positions: Tensor | None = None,  # (1, S, D) of this size, where the caller has them already
        skip_layers: Collection[int] = (),  # blocks to leave out, for skip-layer guidance
    ) -> Tensor:
        """Predict the velocity -> (B, C, H, W)."""
        height, width = hidden_states.shape[-2:]
        positions = self.pos_embed.positions(height, width) if positions is None else positions
        img = sequence.scatter(self.pos_embed(hidden_states, positions))  # (B, S, D); S of this rank from here on
        txt = self.context_embedder(encoder_hidden_states)  # (B, T, D)
        vec = self.time_text_embed(timestep, pooled_projections)  # (B, D)

        for i, block in enumerate(self.transformer_blocks):
            if i not in skip_layers:
                img, txt = block(img, txt, vec)
        img = sequence.gather(img)  # (B, S, D), of the whole image

        (img,) = self.norm_out(img, vec)
        return self._unpatched(self.proj_out(img), height, width)

    def _unpatched(self, tokens: Tensor, height: int, width: int) -> Tensor:
        """(B, S, p * p * C) -> (B, C, H, W): channels are innermost in a token."""
        p = self.params.patch_size
        grid = tokens.unflatten(1, (height // p, width // p)).unflatten(3, (p, p, -1))  # (B, H / p, W / p, p, p, C)
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(tokens.shape[0], -1, height, width)


# https://github.com/Stability-AI/sd3.5/blob/fbf8f483f992d8d6ad4eaaeb23b1dc5f523c3b3a/mmditx.py#L14
# Cropping: mmditx.py#L814.
class PatchEmbed(nn.Module):
    """Patches as tokens, with the learned positions at the middle of the largest picture."""

    pos_embed: Tensor

    def __init__(self, channels: int, width: int, patch: int, side: int) -> None:
        super().__init__()
        self.patch, self.side = patch, side
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)
        self.register_buffer("pos_embed", torch.zeros(1, side * side, width))

    def forward(self, latents: Tensor, positions: Tensor) -> Tensor:
        """latents: (B, C, H, W), positions: (1, S, D) -> (B, S, D)."""
        tokens: Tensor = self.proj(latents).flatten(2).mT.contiguous()  # (B, S, D)
        return tokens + positions

    def positions(self, height: int, width: int) -> Tensor:
        """Of a picture of H x W latent positions, the same at every step -> (1, S, D).

        Raises:
            UsageError: the picture is larger than the largest.
        """
        rows, columns = height // self.patch, width // self.patch
        if max(rows, columns) > self.side:
            raise UsageError(
                "the picture is larger than the model has positions for",
                expected=f"at most {self.side} x {self.side} patches of {self.patch} x {self.patch} latent positions",
                found=f"{rows} x {columns}",
                hint="smaller --height and --width",
            )
        top, left = (self.side - rows) // 2, (self.side - columns) // 2
        grid = self.pos_embed.unflatten(1, (self.side, self.side))  # (1, side, side, D)
        return grid[:, top : top + rows, left : left + columns].flatten(1, 2)


# https://github.com/Stability-AI/sd3.5/blob/fbf8f483f992d8d6ad4eaaeb23b1dc5f523c3b3a/mmditx.py#L138
class Conditioning(nn.Module):
    """Timestep and pooled text, each through a small MLP, added up."""

    def __init__(self, width: int, pooled: int) -> None:
        super().__init__()
        self.timestep_embedder = MLPEmbedder(FREQUENCIES, width)
        self.text_embedder = MLPEmbedder(pooled, width)

    def forward(self, timestep: Tensor, pooled: Tensor) -> Tensor:
        """timestep: (B,), pooled: (B, P) -> (B, D)."""
        time: Tensor = self.timestep_embedder(sinusoid(timestep, FREQUENCIES).to(pooled.dtype))
        text: Tensor = self.text_embedder(pooled)
        return time + text


# https://github.com/Stability-AI/sd3.5/blob/fbf8f483f992d8d6ad4eaaeb23b1dc5f523c3b3a/mmditx.py#L591
class JointBlock(nn.Module):
    """Image and text streams with weights of their own, meeting in attention.

    A dual block's image also attends to itself alone; the last block has no text to give back.
    """

    def __init__(self, width: int, head: int, *, normed: bool, dual: bool, last: bool) -> None:
        super().__init__()
        self.norm1 = DualAdaLayerNorm(width, 9) if dual else AdaLayerNorm(width, 6)
        self.norm1_context = AdaLayerNorm(width, 2, scale_first=True) if last else AdaLayerNorm(width, 6)
        self.attn = JointAttention(width, head, normed, last)
        self.attn2 = SelfAttention(width, head, normed) if dual else None
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.ff = FeedForward(width)
        self.norm2_context = None if last else nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.ff_context = None if last else FeedForward(width)

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor) -> tuple[Tensor, Tensor | None]:
        """img: (B, S, D), txt: (B, T, D), vec: (B, D) -> img, and txt but from the last block."""
        img_in, img_gate, img_shift, img_scale, img_mlp_gate, *dual = self.norm1(img, vec)
        txt_in, *txt_parts = self.norm1_context(txt, vec)
        img_attn, txt_attn = self.attn(img_in, txt_in)  # (B, S, D), (B, T, D)

        img = img + img_gate * img_attn
        if self.attn2 is not None:
            dual_in, dual_gate = dual  # (B, S, D), (B, 1, D)
            img = img + dual_gate * self.attn2(dual_in)
        img = img + img_mlp_gate * self.ff(modulate(self.norm2(img), img_shift, img_scale))
        if self.norm2_context is None or self.ff_context is None:
            return img, None
        txt_gate, txt_shift, txt_scale, txt_mlp_gate = txt_parts
        txt = txt + txt_gate * txt_attn
        txt = txt + txt_mlp_gate * self.ff_context(modulate(self.norm2_context(txt), txt_shift, txt_scale))
        return img, txt


# https://github.com/Stability-AI/sd3.5/blob/fbf8f483f992d8d6ad4eaaeb23b1dc5f523c3b3a/mmditx.py#L517
class DualAdaLayerNorm(AdaLayerNorm):
    """An AdaLayerNorm that modulates x for two attentions."""

    def forward(self, x: Tensor, vec: Tensor) -> tuple[Tensor, ...]:
        """x: (B, S, D), vec: (B, D) -> what AdaLayerNorm of 6 parts gives, then x (B, S, D) and gate of the second."""
        parts = self.linear(F.silu(vec)).unsqueeze(1).chunk(self.parts, dim=-1)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate, dual_shift, dual_scale, dual_gate = parts
        x = self.norm(x)
        first, second = modulate(x, shift, scale), modulate(x, dual_shift, dual_scale)
        return first, gate, mlp_shift, mlp_scale, mlp_gate, second, dual_gate


# https://github.com/Stability-AI/sd3.5/blob/fbf8f483f992d8d6ad4eaaeb23b1dc5f523c3b3a/mmditx.py#L219
class SelfAttention(nn.Module):
    """Attention of one stream; q and k are normalised per head in the models that say so."""

    def __init__(self, width: int, head: int, normed: bool) -> None:
        super().__init__()
        self.head = head
        self.to_qkv = PackedLinear(width, (width, width, width))
        self.norm_q, self.norm_k = (_norm(head, normed) for _ in range(2))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def heads(self, x: Tensor) -> Heads:
        """x: (B, S, D) -> q, k, v (B, S, N, E)."""
        q, k, v = (part.unflatten(-1, (-1, self.head)) for part in self.to_qkv.parts(x))
        return self.norm_q(q), self.norm_k(k), v

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, S, D) -> (B, S, D)."""
        y: Tensor = self.to_out[0](attention(*self.heads(x)))
        return y


# https://github.com/Stability-AI/sd3.5/blob/fbf8f483f992d8d6ad4eaaeb23b1dc5f523c3b3a/mmditx.py#L600
class JointAttention(SelfAttention):
    """Image and text attend to each other; `add_*`, `norm_added_*` and `to_add_out` are the text's."""

    def __init__(self, width: int, head: int, normed: bool, last: bool) -> None:
        super().__init__(width, head, normed)
        self.add_qkv_proj = PackedLinear(width, (width, width, width))
        self.norm_added_q, self.norm_added_k = (_norm(head, normed) for _ in range(2))
        self.to_add_out = None if last else nn.Linear(width, width)

    def forward(self, img: Tensor, txt: Tensor) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        """img: (B, S, D), txt: (B, T, D) -> the same shapes, None for the text in the last block."""
        q, k, v = (part.unflatten(-1, (-1, self.head)) for part in self.add_qkv_proj.parts(txt))  # (B, T, N, E)
        img, txt = _attend(self.heads(img), (self.norm_added_q(q), self.norm_added_k(k), v))
        return self.to_out[0](img), None if self.to_add_out is None else self.to_add_out(txt)


def _attend(img: Heads, txt: Heads) -> tuple[Tensor, Tensor]:
    """Attention over both streams: (B, S, N, E), (B, T, N, E) three times each -> (B, S, D), (B, T, D).

    Text stands first, as in the original. diffusers adds up over the image first, and so does quality `exact`.
    """
    size, text = img[0].shape[1], txt[0].shape[1]
    if quality() == "exact" and sequence.ranks() is None:
        img_attn, txt_attn = attention(*map(_joined, img, txt)).split((size, text), dim=1)
    else:
        txt_attn, img_attn = attention(*map(_joined, txt, img), shared=text).split((text, size), dim=1)
    return img_attn, txt_attn


def _joined(first: Tensor, second: Tensor) -> Tensor:
    """Tokens after tokens -> (B, L, N, E)."""
    return torch.cat((first, second), dim=1)


def _norm(head: int, normed: bool) -> nn.Module:
    return RMSNorm(head) if normed else nn.Identity()
