"""FLUX.1's transformer, native to porter's runtime. Weights are packed while they are read
(`ON_LOAD`); on disk names and shapes are diffusers'.

B: images, S: image tokens (2x2 latent patches), T: text tokens, L = T + S (text first),
C: channels of a packed patch, X: width of a text token, P: width of the pooled text,
N: heads, E: head width, D = N * E: model width.

Ported from https://github.com/black-forest-labs/flux/tree/802fb4713906133fcbd0d8dc5351620ca4773036/src/flux.
Deviations, everywhere: q, k and v (and the MLP's input in single blocks) are one product, as in the original, on disk
several; the final modulation's halves are stored scale first; ids carry no batch axis (all images share them).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from conversions.flux1.recipe import ON_LOAD
from porter.core.errors import BadInputError
from runtime.attention import ALL_BACKENDS, attention
from runtime.layers import (
    AdaLayerNorm,
    FeedForward,
    MLPEmbedder,
    PackedLinear,
    apply_rotary,
    clip_half,
    modulate,
    rotary_table,
    sinusoid,
)
from runtime.parallel import sequence

THETA = 10000.0  # fixed in every FLUX.1; diffusers has no field for it
FREQUENCIES = 256  # width of the sinusoids of timestep and guidance
DEV_AXES = (16, 56, 56)  # what a config without `axes_dims_rope` means: FLUX.1-dev's was written before the field was
Table = tuple[Tensor, Tensor]  # cosines and sines, (L, E / 2) each


@dataclass(frozen=True)
class FluxParams:
    """The fields of diffusers' transformer/config.json."""

    patch_size: int
    in_channels: int
    out_channels: int
    num_layers: int
    num_single_layers: int
    attention_head_dim: int
    num_attention_heads: int
    joint_attention_dim: int
    pooled_projection_dim: int
    guidance_embeds: bool
    axes_dims_rope: tuple[int, ...]

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> FluxParams:
        """Read config.json; keys that begin with an underscore are diffusers' own notes.

        Raises:
            BadInputError: a key is missing, unknown, or contradicts another.
        """
        given = {key: value for key, value in config.items() if not key.startswith("_")}
        given["out_channels"] = given.get("out_channels") or given.get("in_channels")
        given["axes_dims_rope"] = tuple(given.get("axes_dims_rope", DEV_AXES))
        names = {field.name for field in fields(cls)}
        if odd := sorted(names ^ given.keys()):
            raise BadInputError(
                f"the transformer's config.json does not describe a FLUX.1 transformer: {', '.join(odd)}",
                expected=f"exactly the keys {', '.join(sorted(names))}",
                found=f"missing {sorted(names - given.keys())}, unknown {sorted(given.keys() - names)}",
                hint="convert the model again: porter convert <original> -o <port> --overwrite",
            )
        params = cls(**given)
        if params.patch_size != 1 or sum(params.axes_dims_rope) != params.attention_head_dim:
            raise BadInputError(
                "the transformer's config.json contradicts itself",
                expected="patch_size 1, and axes_dims_rope that add up to attention_head_dim",
                found=f"patch_size {params.patch_size}, axes_dims_rope {params.axes_dims_rope}, "
                f"attention_head_dim {params.attention_head_dim}",
                hint="name the original model's axes: porter convert <original> --config <file with axes_dims_rope>",
            )
        return params


# https://github.com/black-forest-labs/flux/blob/802fb4713906133fcbd0d8dc5351620ca4773036/src/flux/model.py#L34
# Deviation: RoPE tables (the original's math.py#L15) are computed in float64 and rounded to float32 once, as diffusers
# does; the original computes in the ids' float32.
class FluxTransformer(nn.Module):
    """Velocity of the flow at (latents, time), given text and guidance."""

    supported_attention_backends = ALL_BACKENDS
    on_load = ON_LOAD

    def __init__(self, params: FluxParams) -> None:
        super().__init__()
        self.params = p = params
        width = p.num_attention_heads * p.attention_head_dim
        self.time_text_embed = Conditioning(width, p.pooled_projection_dim, p.guidance_embeds)
        self.context_embedder = nn.Linear(p.joint_attention_dim, width)
        self.x_embedder = nn.Linear(p.in_channels, width)
        heads = p.num_attention_heads
        self.transformer_blocks = nn.ModuleList(DoubleBlock(width, heads) for _ in range(p.num_layers))
        self.single_transformer_blocks = nn.ModuleList(SingleBlock(width, heads) for _ in range(p.num_single_layers))
        self.norm_out = AdaLayerNorm(width, 2, scale_first=True)
        self.proj_out = nn.Linear(width, p.out_channels)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> FluxTransformer:
        """Build from diffusers' config.json. Raises BadInputError as `FluxParams.from_config`."""
        return cls(FluxParams.from_config(config))

    def rotary(self, txt_ids: Tensor, img_ids: Tensor) -> Table:
        """Position table of the joint sequence, the same at every step. (T, 3), (S, 3) -> (L, E / 2) twice."""
        return rotary_table(torch.cat((txt_ids, img_ids)), self.params.axes_dims_rope, THETA)

    def forward(
        self,
        hidden_states: Tensor,  # (B, S, C) packed latents
        encoder_hidden_states: Tensor,  # (B, T, X) text tokens
        pooled_projections: Tensor,  # (B, P) pooled text
        timestep: Tensor,  # (B,) from 1 (noise) to 0
        img_ids: Tensor,  # (S, 3)
        txt_ids: Tensor,  # (T, 3)
        guidance: Tensor | None = None,  # (B,) guidance scale, for models with a guidance embedding
        rotary: Table | None = None,  # the table of these ids, where the caller has it already
    ) -> Tensor:
        """Predict the velocity -> (B, S, C). `guidance` is needed exactly when the config says guidance_embeds."""
        text = encoder_hidden_states.shape[1]
        rope = self.rotary(txt_ids, img_ids) if rotary is None else rotary
        # Of a sequence-parallel group each rank has the text, and its part of the image (S of it from here on).
        rope = tuple(torch.cat((t[:text], sequence.scatter(t[text:], dim=0))) for t in rope)  # type: ignore[assignment]
        img = sequence.scatter(self.x_embedder(hidden_states))  # (B, S, D)
        txt = self.context_embedder(encoder_hidden_states)  # (B, T, D)
        vec = self.time_text_embed(timestep.to(img.dtype), guidance, pooled_projections)  # (B, D)

        for block in self.transformer_blocks:
            img, txt = block(img, txt, vec, rope)
        x = torch.cat((txt, img), dim=1)  # (B, L, D)
        for block in self.single_transformer_blocks:
            x = block(x, vec, rope, text)
        img = sequence.gather(x[:, text:])  # (B, S, D), of the whole image

        (img,) = self.norm_out(img, vec)
        velocity: Tensor = self.proj_out(img)  # (B, S, C)
        return velocity


# https://github.com/black-forest-labs/flux/blob/802fb4713906133fcbd0d8dc5351620ca4773036/src/flux/model.py#L99
# Sinusoids: src/flux/modules/layers.py#L28. Deviation: timestep and guidance are rounded to the model's dtype before
# they are multiplied by 1000, as diffusers does.
class Conditioning(nn.Module):
    """Timestep, guidance and pooled text, each through a small MLP, added up."""

    def __init__(self, width: int, pooled: int, guidance: bool) -> None:
        super().__init__()
        self.timestep_embedder = MLPEmbedder(FREQUENCIES, width)
        self.guidance_embedder = MLPEmbedder(FREQUENCIES, width) if guidance else None
        self.text_embedder = MLPEmbedder(pooled, width)

    def forward(self, timestep: Tensor, guidance: Tensor | None, pooled: Tensor) -> Tensor:
        """timestep, guidance: (B,), pooled: (B, P) -> (B, D)."""
        if (guidance is None) != (self.guidance_embedder is None):
            raise ValueError(f"guidance_embeds is {self.guidance_embedder is not None}, but guidance is {guidance}")
        vec: Tensor = self.timestep_embedder(sinusoid(timestep * 1000, FREQUENCIES).to(pooled.dtype))
        if self.guidance_embedder is not None and guidance is not None:
            guidance = guidance.to(timestep.dtype) * 1000
            vec = vec + self.guidance_embedder(sinusoid(guidance, FREQUENCIES).to(pooled.dtype))
        text: Tensor = self.text_embedder(pooled)
        return vec + text


# https://github.com/black-forest-labs/flux/blob/802fb4713906133fcbd0d8dc5351620ca4773036/src/flux/modules/layers.py#L129
# Deviation: in float16 the text stream is clipped to the finite range, as diffusers does.
class DoubleBlock(nn.Module):
    """Image and text streams with weights of their own, meeting in attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = AdaLayerNorm(width, 6)
        self.norm1_context = AdaLayerNorm(width, 6)
        self.attn = JointAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.ff = FeedForward(width)
        self.norm2_context = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.ff_context = FeedForward(width)

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor, rope: Table) -> tuple[Tensor, Tensor]:
        """img: (B, S, D), txt: (B, T, D), vec: (B, D) -> img, txt."""
        img_in, img_gate, img_shift, img_scale, img_mlp_gate = self.norm1(img, vec)
        txt_in, txt_gate, txt_shift, txt_scale, txt_mlp_gate = self.norm1_context(txt, vec)
        img_attn, txt_attn = self.attn(img_in, txt_in, rope)  # (B, S, D), (B, T, D)

        img = img + img_gate * img_attn
        img = img + img_mlp_gate * self.ff(modulate(self.norm2(img), img_shift, img_scale))
        txt = txt + txt_gate * txt_attn
        txt = txt + txt_mlp_gate * self.ff_context(modulate(self.norm2_context(txt), txt_shift, txt_scale))
        return img, clip_half(txt)


# https://github.com/black-forest-labs/flux/blob/802fb4713906133fcbd0d8dc5351620ca4773036/src/flux/modules/layers.py#L194
# Deviation: in float16 the output is clipped, as diffusers does.
class SingleBlock(nn.Module):
    """One joint stream; attention and MLP side by side."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm = AdaLayerNorm(width, 3)
        self.to_qkv_mlp = PackedLinear(width, (width, width, width, 4 * width))
        self.attn = SelfAttention(width // heads)
        self.act_mlp = nn.GELU(approximate="tanh")
        self.proj_out = nn.Linear(5 * width, width)

    def forward(self, x: Tensor, vec: Tensor, rope: Table, text: int) -> Tensor:
        """x: (B, L, D) of which the first `text` tokens are text, vec: (B, D) -> (B, L, D)."""
        y, gate = self.norm(x, vec)
        q, k, v, mlp = self.to_qkv_mlp.parts(y)  # (B, L, D) three times, (B, L, 4 D)
        attn = self.attn(q, k, v, rope, text)  # (B, L, D)
        mlp = self.act_mlp(mlp)
        return clip_half(x + gate * self.proj_out(torch.cat((attn, mlp), dim=-1)))


# https://github.com/black-forest-labs/flux/blob/802fb4713906133fcbd0d8dc5351620ca4773036/src/flux/modules/layers.py#L227
class SelfAttention(nn.Module):
    """Attention of the joint stream; its projections are the block's."""

    def __init__(self, head: int) -> None:
        super().__init__()
        self.head = head
        self.norm_q, self.norm_k = (nn.RMSNorm(head, eps=1e-6) for _ in range(2))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, rope: Table, text: int) -> Tensor:
        """q, k, v: (B, L, D) of which the first `text` tokens are text -> (B, L, D)."""
        q, k, v = (x.unflatten(-1, (-1, self.head)) for x in (q, k, v))  # (B, L, N, E)
        return attention(apply_rotary(self.norm_q(q), rope), apply_rotary(self.norm_k(k), rope), v, shared=text)


# https://github.com/black-forest-labs/flux/blob/802fb4713906133fcbd0d8dc5351620ca4773036/src/flux/modules/layers.py#L158
class JointAttention(nn.Module):
    """Image and text attend to each other; `add_*` and `norm_added_*` are the text's."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.head = width // heads
        self.to_qkv = PackedLinear(width, (width, width, width))
        self.norm_q, self.norm_k = (nn.RMSNorm(self.head, eps=1e-6) for _ in range(2))
        self.add_qkv_proj = PackedLinear(width, (width, width, width))
        self.norm_added_q, self.norm_added_k = (nn.RMSNorm(self.head, eps=1e-6) for _ in range(2))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        self.to_add_out = nn.Linear(width, width)

    def forward(self, img: Tensor, txt: Tensor, rope: Table) -> tuple[Tensor, Tensor]:
        """img: (B, S, D), txt: (B, T, D) -> the same shapes."""
        img_q, img_k, img_v = (x.unflatten(-1, (-1, self.head)) for x in self.to_qkv.parts(img))  # (B, S, N, E)
        txt_q, txt_k, txt_v = (x.unflatten(-1, (-1, self.head)) for x in self.add_qkv_proj.parts(txt))  # (B, T, N, E)
        q = torch.cat((self.norm_added_q(txt_q), self.norm_q(img_q)), dim=1)  # (B, L, N, E)
        k = torch.cat((self.norm_added_k(txt_k), self.norm_k(img_k)), dim=1)
        v = torch.cat((txt_v, img_v), dim=1)
        text = txt.shape[1]
        x = attention(apply_rotary(q, rope), apply_rotary(k, rope), v, shared=text)  # (B, L, D)
        img, txt = x[:, text:].contiguous(), x[:, :text].contiguous()  # of one picture they are already
        return self.to_out[0](img), self.to_add_out(txt)
