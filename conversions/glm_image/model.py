"""GLM-Image's transformer, native to porter's runtime. Weights are packed while they are read (`ON_LOAD`); on disk
names and shapes are diffusers'.

B: images, C: latent channels, H, W: latent positions, p: patch size, S = H * W / p²: image tokens, T: tokens of the
glyph text, L = T + S (text first), X: width of a text token, N: heads, E: head width, D = N * E: model width,
V: width of the conditioning vector.

Ported from https://github.com/huggingface/diffusers/tree/58eb52c0803ea9af3abec60841c2a093bdf1f951/src/diffusers, the
code that the model was released with. Deviations, everywhere: q, k and v are one product; a mask is bool, and no text
token that it leaves out is seen (diffusers adds its mask to the scores as numbers 0 and 1); K/V caches of condition
images are not taken: text to image only.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from conversions.glm_image.recipe import ON_LOAD
from porter.core.errors import BadInputError
from runtime.attention import ALL_BACKENDS, attention
from runtime.layers import FeedForward, MLPEmbedder, PackedLinear, apply_rotary_halves, modulate, sinusoid
from runtime.parallel import sequence

THETA = 10000.0  # fixed in diffusers' class
EPS = 1e-5  # of every norm
Table = tuple[Tensor, Tensor]  # cosines and sines, (S, E / 2) each


@dataclass(frozen=True)
class GlmImageParams:
    """The fields of diffusers' transformer/config.json."""

    patch_size: int
    in_channels: int
    out_channels: int
    num_layers: int
    attention_head_dim: int
    num_attention_heads: int
    text_embed_dim: int
    time_embed_dim: int
    condition_dim: int
    prior_vq_quantizer_codebook_size: int

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> GlmImageParams:
        """Read config.json; keys that begin with an underscore are diffusers' own notes.

        Raises:
            BadInputError: a key is missing, unknown, or no size that the model can have.
        """
        given = {key: value for key, value in config.items() if not key.startswith("_")}
        names = {field.name for field in fields(cls)}
        hint = "convert the model again: porter convert <original> -o <port> --overwrite"
        if odd := sorted(names ^ given.keys()):
            raise BadInputError(
                f"the transformer's config.json does not describe a GLM-Image transformer: {', '.join(odd)}",
                expected=f"exactly the keys {', '.join(sorted(names))}",
                found=f"missing {sorted(names - given.keys())}, unknown {sorted(given.keys() - names)}",
                hint=hint,
            )
        # A head has two axes of cosines and sines; sinusoids come in pairs.
        multiples = {"attention_head_dim": 4, "time_embed_dim": 2, "condition_dim": 2}
        for name, value in given.items():
            step = multiples.get(name, 1)
            if type(value) is not int or value <= 0 or value % step:
                raise BadInputError(
                    f"the transformer's config.json has no usable {name}",
                    expected="a whole number from 1" if step == 1 else f"a multiple of {step}",
                    found=repr(value),
                    hint=hint,
                )
        return cls(**given)


# https://github.com/huggingface/diffusers/blob/58eb52c0803ea9af3abec60841c2a093bdf1f951/src/diffusers/models/transformers/transformer_glm_image.py#L503
class GlmImageTransformer(nn.Module):
    """Velocity of the flow at (latents, time), given prior tokens, glyph text and the picture's size."""

    supported_attention_backends = ALL_BACKENDS
    on_load = ON_LOAD

    def __init__(self, params: GlmImageParams) -> None:
        super().__init__()
        self.params = p = params
        width = p.num_attention_heads * p.attention_head_dim
        self.image_projector = ImageProjector(p.in_channels, width, p.patch_size)
        self.glyph_projector = Projector(p.text_embed_dim, width, nn.GELU())
        self.prior_token_embedding = nn.Embedding(p.prior_vq_quantizer_codebook_size, width)
        self.prior_projector = Projector(width, width, nn.SiLU())
        self.time_condition_embed = Conditioning(p.time_embed_dim, p.condition_dim)
        self.transformer_blocks = nn.ModuleList(
            Block(width, p.attention_head_dim, p.time_embed_dim) for _ in range(p.num_layers)
        )
        self.norm_out = FinalNorm(width, p.time_embed_dim)
        self.proj_out = nn.Linear(width, p.patch_size**2 * p.out_channels)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> GlmImageTransformer:
        """Build from diffusers' config.json. Raises BadInputError as `GlmImageParams.from_config`."""
        return cls(GlmImageParams.from_config(config))

    # https://github.com/huggingface/diffusers/blob/58eb52c0803ea9af3abec60841c2a093bdf1f951/src/diffusers/models/transformers/transformer_glm_image.py#L432
    # Deviation: each angle stands once; diffusers' tables repeat the first half.
    def rotary(self, height: int, width: int, device: torch.device) -> Table:
        """Position table of a picture of `height` x `width` latents, the same at every step: (S, E / 2) twice.

        The first half of the angles is the row's, the second the column's; all arithmetic is float32, as diffusers'.
        """
        p, axis = self.params.patch_size, self.params.attention_head_dim // 2
        exponents = torch.arange(0, axis, 2, dtype=torch.float32) / axis
        frequencies = 1.0 / THETA**exponents  # (E / 4,)
        rows, columns = (torch.outer(torch.arange(side // p), frequencies) for side in (height, width))
        shape = (height // p, width // p, axis // 2)
        grid = torch.cat((rows[:, None].expand(shape), columns[None].expand(shape)), dim=-1)  # (H / p, W / p, E / 2)
        angles = grid.flatten(0, 1)  # (S, E / 2)
        return angles.cos().to(device), angles.sin().to(device)

    def forward(
        self,
        hidden_states: Tensor,  # (B, C, H, W) latents
        timestep: Tensor,  # (B,) from 999 (noise) to 0
        encoder_hidden_states: Tensor,  # (B, T, X) glyph text
        prior_token_id: Tensor,  # (B, S) whole numbers
        prior_token_drop: Tensor,  # (B, S) bool, True for tokens that are left out (guidance's negative pass)
        target_size: Tensor,  # (B, 2) pixels
        crop_coords: Tensor,  # (B, 2) pixels
        attention_mask: Tensor | None = None,  # (B, T) bool, True for text tokens that are no padding
        rotary: Table | None = None,  # the table of this size, where the caller has it already
    ) -> Tensor:
        """Predict the velocity -> (B, C, H, W)."""
        height, width = hidden_states.shape[-2:]
        table = self.rotary(height, width, hidden_states.device) if rotary is None else rotary
        # Of a sequence-parallel group each rank has the text, and its part of the image (S of it from here on).
        rope = (sequence.scatter(table[0], dim=0), sequence.scatter(table[1], dim=0))
        img = sequence.scatter(self.image_projector(hidden_states))  # (B, S, D)
        prior = self.prior_token_embedding(prior_token_id).masked_fill(prior_token_drop[..., None], 0.0)
        img = img + self.prior_projector(sequence.scatter(prior))
        txt = self.glyph_projector(encoder_hidden_states)  # (B, T, D)
        vec = self.time_condition_embed(timestep, target_size, crop_coords, img.dtype)  # (B, V)
        mask = None
        if attention_mask is not None:
            mask = torch.cat((attention_mask, attention_mask.new_ones(img.shape[:2])), dim=1)  # (B, L)

        for block in self.transformer_blocks:
            img, txt = block(img, txt, vec, rope, mask)

        patches = sequence.gather(self.proj_out(self.norm_out(img, vec)))  # (B, S, p² C), of the whole image
        return unpatchify(patches, height, width, self.params.patch_size)


# https://github.com/huggingface/diffusers/blob/58eb52c0803ea9af3abec60841c2a093bdf1f951/src/diffusers/models/transformers/transformer_glm_image.py#L71
class ImageProjector(nn.Module):
    """Patches of the latents, each one token: channels outermost, then the patch's row, then its column."""

    def __init__(self, channels: int, width: int, patch: int) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Linear(patch**2 * channels, width)

    def forward(self, latents: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, S, D)."""
        p = self.patch
        patches = latents.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # (B, C, H / p, p, W / p, p)
        y: Tensor = self.proj(patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2))
        return y


# https://github.com/huggingface/diffusers/blob/58eb52c0803ea9af3abec60841c2a093bdf1f951/src/diffusers/models/transformers/transformer_glm_image.py#L697
def unpatchify(tokens: Tensor, height: int, width: int, p: int) -> Tensor:
    """(B, S, C p²) -> (B, C, H, W), channels outermost in a token."""
    patches = tokens.unflatten(2, (-1, p, p)).unflatten(1, (height // p, width // p))  # (B, H / p, W / p, C, p, p)
    return patches.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


# https://github.com/huggingface/diffusers/blob/58eb52c0803ea9af3abec60841c2a093bdf1f951/src/diffusers/models/attention.py#L1682
class Projector(nn.Module):
    """Linear, activation, linear: (…, in) -> (…, D)."""

    def __init__(self, in_width: int, width: int, activation: nn.Module) -> None:
        super().__init__()
        first = nn.Sequential(OrderedDict(proj=nn.Linear(in_width, width)))
        # The activation keeps the second linear at `net.2`, its name on disk.
        self.net = nn.Sequential(first, activation, nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x)
        return y


# https://github.com/huggingface/diffusers/blob/58eb52c0803ea9af3abec60841c2a093bdf1f951/src/diffusers/models/transformers/transformer_glm_image.py#L38
class Conditioning(nn.Module):
    """Timestep and sizes, each through a small MLP, added up and activated once for all blocks."""

    def __init__(self, width: int, condition: int) -> None:
        super().__init__()
        self.width, self.condition = width, condition
        self.timestep_embedder = MLPEmbedder(width, width)
        self.condition_embedder = MLPEmbedder(4 * condition, width)

    def forward(self, timestep: Tensor, target_size: Tensor, crop_coords: Tensor, dtype: torch.dtype) -> Tensor:
        """timestep: (B,), target_size, crop_coords: (B, 2) -> (B, V)."""
        sizes = torch.cat((crop_coords, target_size), dim=1)  # (B, 4)
        waves = sinusoid(sizes.flatten(), self.condition).reshape(len(sizes), -1)  # (B, 4 condition)
        time: Tensor = self.timestep_embedder(sinusoid(timestep, self.width).to(dtype))
        return nn.functional.silu(time + self.condition_embedder(waves.to(dtype)))


# https://github.com/huggingface/diffusers/blob/58eb52c0803ea9af3abec60841c2a093bdf1f951/src/diffusers/models/transformers/transformer_glm_image.py#L351
class Block(nn.Module):
    """Image and text share every weight; only the modulation tells them apart."""

    def __init__(self, width: int, head: int, condition: int) -> None:
        super().__init__()
        self.norm1 = JointNorm(width, condition)
        self.attn1 = JointAttention(width, head)
        self.norm2, self.norm2_context = plain_norm(width), plain_norm(width)
        self.ff = FeedForward(width)

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor, rope: Table, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """img: (B, S, D), txt: (B, T, D), vec: (B, V) -> img, txt."""
        (img_in, *img_vectors), (txt_in, *txt_vectors) = self.norm1(img, txt, vec)
        img_gate, img_shift, img_scale, img_mlp_gate = img_vectors  # (B, 1, D) each
        txt_gate, txt_shift, txt_scale, txt_mlp_gate = txt_vectors
        img_attn, txt_attn = self.attn1(img_in, txt_in, rope, mask)  # (B, S, D), (B, T, D)

        img = img + img_gate * img_attn
        img = img + img_mlp_gate * self.ff(modulate(self.norm2(img), img_shift, img_scale))
        txt = txt + txt_gate * txt_attn
        txt = txt + txt_mlp_gate * self.ff(modulate(self.norm2_context(txt), txt_shift, txt_scale))
        return img, txt


# https://github.com/huggingface/diffusers/blob/58eb52c0803ea9af3abec60841c2a093bdf1f951/src/diffusers/models/transformers/transformer_glm_image.py#L97
class JointNorm(nn.Module):
    """Norms of both streams, modulated by the conditioning vector, which gives six vectors to each."""

    def __init__(self, width: int, condition: int) -> None:
        super().__init__()
        self.norm, self.norm_context = plain_norm(width), plain_norm(width)
        self.linear = nn.Linear(condition, 12 * width)

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Of each stream what it is modulated to, then four vectors (B, 1, D): gate, and the MLP's shift, scale, gate.

        img: (B, S, D), txt: (B, T, D), vec: (B, V).
        """
        vectors = self.linear(vec).unsqueeze(1).chunk(12, dim=-1)  # (B, 1, D) each, image and text in turn
        (shift, scale, *img_rest), (txt_shift, txt_scale, *txt_rest) = vectors[::2], vectors[1::2]
        img = modulate(self.norm(img), shift, scale)
        txt = modulate(self.norm_context(txt), txt_shift, txt_scale)
        return (img, *img_rest), (txt, *txt_rest)


# https://github.com/huggingface/diffusers/blob/58eb52c0803ea9af3abec60841c2a093bdf1f951/src/diffusers/models/transformers/transformer_glm_image.py#L251
class JointAttention(nn.Module):
    """Attention of text and image as one sequence; only image tokens have a position."""

    def __init__(self, width: int, head: int) -> None:
        super().__init__()
        self.head = head
        self.to_qkv = PackedLinear(width, (width, width, width))
        self.norm_q, self.norm_k = plain_norm(head), plain_norm(head)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, img: Tensor, txt: Tensor, rope: Table, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """img: (B, S, D), txt: (B, T, D) -> the same shapes."""
        text = txt.shape[1]
        q, k, v = (x.unflatten(-1, (-1, self.head)) for x in self.to_qkv.parts(torch.cat((txt, img), dim=1)))
        q, k = self._placed(self.norm_q(q), rope, text), self._placed(self.norm_k(k), rope, text)  # (B, L, N, E)
        x = self.to_out[0](attention(q, k, v, mask, shared=text))  # (B, L, D)
        return x[:, text:], x[:, :text]

    @staticmethod
    def _placed(x: Tensor, rope: Table, text: int) -> Tensor:
        return torch.cat((x[:, :text], apply_rotary_halves(x[:, text:], rope)), dim=1)


# https://github.com/huggingface/diffusers/blob/58eb52c0803ea9af3abec60841c2a093bdf1f951/src/diffusers/models/transformers/transformer_glm_image.py#L471
class FinalNorm(nn.Module):
    """LayerNorm modulated by the conditioning vector, scale first; the vector is not activated again."""

    def __init__(self, width: int, condition: int) -> None:
        super().__init__()
        self.linear = nn.Linear(condition, 2 * width)
        self.norm = plain_norm(width)

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        """x: (B, S, D), vec: (B, V) -> (B, S, D)."""
        scale, shift = self.linear(vec).unsqueeze(1).chunk(2, dim=-1)
        return modulate(self.norm(x), shift, scale)


def plain_norm(width: int) -> nn.LayerNorm:
    """LayerNorm without weights."""
    return nn.LayerNorm(width, elementwise_affine=False, eps=EPS)
