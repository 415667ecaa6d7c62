"""Z-Image's transformer, native to porter's runtime. Weights are packed while they are read
(`ON_LOAD`); on disk names and shapes are diffusers'.

B: images, all of one size, C: latent channels, H, W: latent positions, X: width of a caption's token,
T: caption tokens, filled to a multiple of 32, S: image tokens (2x2 latent patches), filled likewise, L = T + S,
N: heads, E: head width, D = N * E: model width, V = min(D, 256): width of what the time says,
P: rows of tables, 1 where all captions are filled to one length, else B.

Ported from https://github.com/Tongyi-MAI/Z-Image/blob/c7ec13578cc27b01d547e1b3c62bc8b95bc6cb6e/src/zimage/transformer.py
Deviations, everywhere: one batch with a mask instead of lists; the text comes first in the joint sequence, where the
original puts the image (at quality `exact` ours does too); tables are made once for an image; q, k and v are one
product, and so are the halves of the gated feed-forward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conversions.z_image.places import Order, Places, Table, filled, places
from conversions.z_image.recipe import CONDITION, MIDDLE, ON_LOAD, PATCH, SINUSOIDS
from porter.core.errors import BadInputError
from runtime.attention import ALL_BACKENDS, attention, cross_attention
from runtime.layers import PackedLinear, RMSNorm, apply_rotary, sinusoid
from runtime.parallel import sequence
from runtime.quality import quality

HEAD_EPS = 1e-5  # of the norms of queries and keys; diffusers has no field for it
SIDE = PATCH[0]
SIZE = f"{SIDE}-{PATCH[1]}"  # how names on disk call the patch's side and frames


@dataclass(frozen=True)
class ZImageParams:
    """The fields of diffusers' transformer/config.json."""

    all_patch_size: tuple[int, ...]
    all_f_patch_size: tuple[int, ...]
    in_channels: int
    dim: int
    n_layers: int
    n_refiner_layers: int
    n_heads: int
    n_kv_heads: int
    norm_eps: float
    qk_norm: bool
    cap_feat_dim: int
    siglip_feat_dim: int | None
    rope_theta: float
    t_scale: float
    axes_dims: tuple[int, ...]
    axes_lens: tuple[int, ...]

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ZImageParams:
        """Read config.json; keys that begin with an underscore are diffusers' own notes.

        Raises:
            BadInputError: a key is missing or unknown, contradicts another, or asks for what this model does not have.
        """
        given = {key: value for key, value in config.items() if not key.startswith("_")}
        given.setdefault("siglip_feat_dim", None)  # Z-Image-Turbo's config was written before the field was
        names = {field.name for field in fields(cls)}
        if odd := sorted(names ^ given.keys()):
            raise BadInputError(
                f"the transformer's config.json does not describe a Z-Image transformer: {', '.join(odd)}",
                expected=f"exactly the keys {', '.join(sorted(names))}",
                found=f"missing {sorted(names - given.keys())}, unknown {sorted(given.keys() - names)}",
                hint="convert the model again: porter convert <original> -o <port> --overwrite",
            )
        params = cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in given.items()})
        params._check()
        return params

    def _check(self) -> None:
        known = {
            "all_patch_size": (SIDE,), "all_f_patch_size": (PATCH[1],), "siglip_feat_dim": None,
            "n_kv_heads": self.n_heads,
        }  # fmt: skip
        if other := {key: getattr(self, key) for key, value in known.items() if getattr(self, key) != value}:
            raise BadInputError(
                f"the native Z-Image transformer does not have {', '.join(other)} of this model",
                expected=", ".join(f"{key} {known[key]}" for key in other),
                found=", ".join(f"{key} {value}" for key, value in other.items()),
                hint="run it with diffusers' own class: porter generate <port> --executor diffusers",
            )
        if self.n_heads * sum(self.axes_dims) != self.dim or len(self.axes_dims) != 3 or len(self.axes_lens) != 3:
            raise BadInputError(
                "the transformer's config.json contradicts itself",
                expected="three axes_dims and axes_lens, and axes_dims that add up to dim / n_heads",
                found=f"axes_dims {self.axes_dims}, axes_lens {self.axes_lens}, dim {self.dim}, n_heads {self.n_heads}",
                hint="name the original model's axes: porter convert <original> --config <file with axes_dims>",
            )


# https://github.com/Tongyi-MAI/Z-Image/blob/c7ec13578cc27b01d547e1b3c62bc8b95bc6cb6e/src/zimage/transformer.py#L237
class ZImageTransformer(nn.Module):
    """Direction from noise to image at (latents, time), given a caption."""

    supported_attention_backends = ALL_BACKENDS
    on_load = ON_LOAD

    def __init__(self, params: ZImageParams) -> None:
        super().__init__()
        self.params = p = params
        patch = SIDE**2 * p.in_channels
        self.all_x_embedder = nn.ModuleDict({SIZE: nn.Linear(patch, p.dim)})
        self.x_pad_token = nn.Parameter(torch.zeros(1, p.dim))
        self.noise_refiner = nn.ModuleList(Block(p) for _ in range(p.n_refiner_layers))
        self.cap_embedder = nn.Sequential(RMSNorm(p.cap_feat_dim, p.norm_eps), nn.Linear(p.cap_feat_dim, p.dim))
        self.cap_pad_token = nn.Parameter(torch.zeros(1, p.dim))
        self.context_refiner = nn.ModuleList(Block(p, modulated=False) for _ in range(p.n_refiner_layers))
        self.t_embedder = TimestepEmbedder(min(p.dim, CONDITION))
        self.layers = nn.ModuleList(Block(p) for _ in range(p.n_layers))
        self.all_final_layer = nn.ModuleDict({SIZE: FinalLayer(p.dim, patch)})

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ZImageTransformer:
        """Build from diffusers' config.json. Raises BadInputError as `ZImageParams.from_config`."""
        return cls(ZImageParams.from_config(config))

    def places(self, lengths: Sequence[int], height: int, width: int, device: torch.device) -> Places:
        """Positions and masks for captions of `lengths` tokens and images of `height` x `width` latent positions.

        Raises:
            UsageError: a caption is longer, or an image larger, than the model has positions for.
        """
        p, rows, columns = self.params, height // SIDE, width // SIDE
        return places(lengths, rows, columns, dims=p.axes_dims, lens=p.axes_lens, theta=p.rope_theta).to(device)

    def forward(
        self,
        hidden_states: Tensor,  # (B, C, H, W) latents
        timestep: Tensor,  # (B,) from 0 (noise) to 1
        encoder_hidden_states: Tensor,  # (B, up to T, X) captions, each from the left
        encoder_attention_mask: Tensor | None = None,  # bool (B, up to T), True for a caption's tokens; None: all are
        places: Places | None = None,  # of these captions and this size, where the caller has them already
    ) -> Tensor:
        """Predict the direction -> (B, C, H, W)."""
        if places is None:
            lengths = _lengths(encoder_hidden_states, encoder_attention_mask)
            places = self.places(lengths, *hidden_states.shape[2:], hidden_states.device)
        vec = self.t_embedder(timestep * self.params.t_scale).type_as(hidden_states)  # (B, V)

        # Of a sequence-parallel group each rank has the text, and its part of the image (S of it from here on).
        img = sequence.scatter(self._embed_image(hidden_states))  # (B, S, D)
        image_table = sequence.scatter(places.image[0]), sequence.scatter(places.image[1])
        for block in self.noise_refiner:
            img = block(img, image_table, vec)

        txt = self._embed_text(encoder_hidden_states, places)  # (B, T, D)
        for block in self.context_refiner:
            txt = block(txt, places.text, mask=places.seen, shared=None)

        order = Order(txt.shape[1], img.shape[1], image_first=quality() == "exact" and sequence.ranks() is None)
        x = order.join(txt, img)  # (B, L, D)
        table = order.join(places.text[0], image_table[0]), order.join(places.text[1], image_table[1])
        mask = None if places.seen is None else order.join(places.seen, places.seen.new_ones(img.shape[:2]))  # (B, L)
        for block in self.layers:
            x = block(x, table, vec, mask, shared=order.shared)
        patches = order.image(self.all_final_layer[SIZE](x, vec))  # (B, S, 4 C)
        return _unpatch(sequence.gather(patches), *hidden_states.shape[1:])

    def _embed_image(self, latents: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, S, D), behind the image the learned filling."""
        patches = _patch(latents)
        count, missing = patches.shape[1], filled(patches.shape[1]) - patches.shape[1]
        img: Tensor = self.all_x_embedder[SIZE](torch.cat((patches, patches[:, -1:].expand(-1, missing, -1)), dim=1))
        return torch.cat((img[:, :count], self.x_pad_token.expand(img.shape[0], missing, -1)), dim=1)

    def _embed_text(self, captions: Tensor, places: Places) -> Tensor:
        """(B, up to T, X) -> (B, T, D), behind each caption the learned filling."""
        captions = captions.gather(1, places.source[..., None].expand(-1, -1, captions.shape[2]))
        return torch.where(places.own[..., None], self.cap_embedder(captions), self.cap_pad_token)


# https://github.com/Tongyi-MAI/Z-Image/blob/c7ec13578cc27b01d547e1b3c62bc8b95bc6cb6e/src/zimage/transformer.py#L23
class TimestepEmbedder(nn.Module):
    """The time's sinusoids through a small MLP: (B,) -> (B, V)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(SINUSOIDS, MIDDLE), nn.SiLU(), nn.Linear(MIDDLE, width))

    def forward(self, t: Tensor) -> Tensor:
        vec: Tensor = self.mlp(sinusoid(t, SINUSOIDS).to(self.mlp[0].weight.dtype))
        return vec


# https://github.com/Tongyi-MAI/Z-Image/blob/c7ec13578cc27b01d547e1b3c62bc8b95bc6cb6e/src/zimage/transformer.py#L141
class Block(nn.Module):
    """Attention and a gated feed-forward, each normalised before and after; the time scales and gates both."""

    def __init__(self, p: ZImageParams, modulated: bool = True) -> None:
        super().__init__()
        self.attention = SelfAttention(p)
        self.feed_forward = FeedForward(p.dim)
        self.attention_norm1, self.attention_norm2 = (RMSNorm(p.dim, p.norm_eps) for _ in range(2))
        self.ffn_norm1, self.ffn_norm2 = (RMSNorm(p.dim, p.norm_eps) for _ in range(2))
        modulation = nn.Sequential(nn.Linear(min(p.dim, CONDITION), 4 * p.dim))
        self.adaLN_modulation = modulation if modulated else None

    def forward(
        self, x: Tensor, table: Table, vec: Tensor | None = None, mask: Tensor | None = None, shared: int | None = 0
    ) -> Tensor:
        """x: (B, L, D), vec: (B, V) where the time has a say; `mask` and `shared`: see `SelfAttention` -> (B, L, D)."""
        if self.adaLN_modulation is None:
            x = x + self.attention_norm2(self.attention(self.attention_norm1(x), table, mask, shared))
            return x + self.ffn_norm2(self.feed_forward(self.ffn_norm1(x)))
        scale, gate, mlp_scale, mlp_gate = self.adaLN_modulation(vec).unsqueeze(1).chunk(4, dim=-1)  # (B, 1, D) each
        y = self.attention_norm1(x) * (1.0 + scale)
        x = x + gate.tanh() * self.attention_norm2(self.attention(y, table, mask, shared))
        y = self.ffn_norm1(x) * (1.0 + mlp_scale)
        return x + mlp_gate.tanh() * self.ffn_norm2(self.feed_forward(y))


# https://github.com/Tongyi-MAI/Z-Image/blob/c7ec13578cc27b01d547e1b3c62bc8b95bc6cb6e/src/zimage/transformer.py#L83
# Deviation: the epsilon of queries' and keys' norms is fixed, as in diffusers; the original takes the blocks' own.
class SelfAttention(nn.Module):
    """Attention within one sequence."""

    def __init__(self, p: ZImageParams) -> None:
        super().__init__()
        self.head = p.dim // p.n_heads
        self.to_qkv = PackedLinear(p.dim, (p.dim, p.dim, p.dim), bias=False)
        self.norm_q, self.norm_k = (RMSNorm(self.head, HEAD_EPS) if p.qk_norm else nn.Identity() for _ in range(2))
        self.to_out = nn.ModuleList([nn.Linear(p.dim, p.dim, bias=False)])

    def forward(self, x: Tensor, table: Table, mask: Tensor | None, shared: int | None) -> Tensor:
        """x: (B, L, D) of which all ranks have the first `shared` tokens (None: all of them) -> (B, L, D)."""
        q, k, v = (part.unflatten(-1, (-1, self.head)) for part in self.to_qkv.parts(x))  # (B, L, N, E)
        q, k = apply_rotary(self.norm_q(q), table), apply_rotary(self.norm_k(k), table)
        y = cross_attention(q, k, v, mask) if shared is None else attention(q, k, v, mask, shared=shared)
        out: Tensor = self.to_out[0](y)
        return out


# https://github.com/Tongyi-MAI/Z-Image/blob/c7ec13578cc27b01d547e1b3c62bc8b95bc6cb6e/src/zimage/transformer.py#L63
class FeedForward(nn.Module):
    """SiLU of one projection times the other, projected back: (B, L, D) -> (B, L, D)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = int(width / 3 * 8)
        self.w13 = PackedLinear(width, (inner, inner), bias=False)
        self.w2 = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w13.parts(x)
        y: Tensor = self.w2(F.silu(gate) * up)
        return y


# https://github.com/Tongyi-MAI/Z-Image/blob/c7ec13578cc27b01d547e1b3c62bc8b95bc6cb6e/src/zimage/transformer.py#L182
class FinalLayer(nn.Module):
    """Tokens to patches; the time scales what is normalised."""

    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(min(width, CONDITION), width))
        self.linear = nn.Linear(width, patch)

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        """x: (B, L, D), vec: (B, V) -> (B, L, 4 C)."""
        scale = 1.0 + self.adaLN_modulation(vec)
        y: Tensor = self.linear(self.norm_final(x) * scale.unsqueeze(1))
        return y


def _patch(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H / 2 * W / 2, 4 C): a patch's rows, then its columns, then channels."""
    x = x.unflatten(3, (-1, SIDE)).unflatten(2, (-1, SIDE))  # (B, C, H / 2, 2, W / 2, 2)
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def _unpatch(x: Tensor, channels: int, height: int, width: int) -> Tensor:
    """(B, S, 4 C) -> (B, C, H, W); the filling is left out."""
    rows, columns = height // SIDE, width // SIDE
    x = x[:, : rows * columns].unflatten(1, (rows, columns)).unflatten(-1, (SIDE, SIDE, channels))
    return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, channels, height, width)


def _lengths(captions: Tensor, mask: Tensor | None) -> list[int]:
    """Tokens of each caption."""
    if mask is None:
        return [captions.shape[1]] * captions.shape[0]
    lengths: list[int] = mask.sum(1).tolist()
    return lengths
