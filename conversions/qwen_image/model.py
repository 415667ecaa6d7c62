"""Qwen-Image's transformer, native to porter's runtime. Weights are packed while they are read
(`ON_LOAD`); on disk names and shapes are diffusers'.

B: images, S: image tokens (2x2 latent patches; behind those of the noise those of given pictures), T: text tokens,
L = T + S (text first), C: channels of a packed patch, X: width of a text token, N: heads, E: head width,
D = N * E: model width.

Qwen-Image was released as diffusers' class. The code linked to, the one of the parity trace, is
https://github.com/modelscope/DiffSynth-Studio/tree/fed7b18fac2ed4cb802796eec91970e7659bccde/diffsynth/models.
Deviations, everywhere: q, k and v are one product, on disk three; the GELU is the released class's approximation by
tanh, there x * sigmoid(1.702 x); prompts of a batch may have different lengths, there it has one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from conversions.qwen_image.recipe import ON_LOAD
from porter.core.errors import BadInputError, UsageError
from runtime.attention import attention
from runtime.layers import (
    AdaLayerNorm,
    FeedForward,
    MLPEmbedder,
    PackedLinear,
    RMSNorm,
    apply_rotary,
    clip_half,
    modulate,
    sinusoid,
)
from runtime.parallel import sequence

THETA = 10000.0  # fixed in every Qwen-Image; diffusers has no field for it
POSITIONS = 4096  # on each side of 0
FREQUENCIES = 256  # width of the timestep's sinusoids
Table = tuple[Tensor, Tensor]  # cosines and sines, (L, E / 2) each
Shape = tuple[int, int, int]  # frames, rows and columns of a picture, in tokens

# What a config.json that was written before the field was means: the class's own values.
_LATER: dict[str, Any] = {
    "axes_dims_rope": (16, 56, 56), "guidance_embeds": False,
    "zero_cond_t": False, "use_additional_t_cond": False, "use_layer3d_rope": False,
}  # fmt: skip
_NEVER_USED = "pooled_projection_dim"  # the first release has it; the class has no such parameter


@dataclass(frozen=True)
class QwenImageParams:
    """The fields of diffusers' transformer/config.json."""

    patch_size: int
    in_channels: int
    out_channels: int
    num_layers: int
    attention_head_dim: int
    num_attention_heads: int
    joint_attention_dim: int
    axes_dims_rope: tuple[int, ...]
    guidance_embeds: bool
    zero_cond_t: bool  # tokens of given pictures are modulated as at time 0 (Edit-2511)
    use_additional_t_cond: bool  # the timestep's embedding has one of two vectors added (Layered)
    use_layer3d_rope: bool  # the last picture is the given one, at frame -1 (Layered)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> QwenImageParams:
        """Read config.json; keys that begin with an underscore are diffusers' own notes.

        Raises:
            BadInputError: a key is missing, unknown, contradicts another, or asks for what no release has.
        """
        given = {key: value for key, value in config.items() if not key.startswith("_") and key != _NEVER_USED}
        given = _LATER | given
        given["out_channels"] = given.get("out_channels") or given.get("in_channels")
        given["axes_dims_rope"] = tuple(given["axes_dims_rope"])
        names = {field.name for field in fields(cls)}
        if odd := sorted(names ^ given.keys()):
            raise BadInputError(
                f"the transformer's config.json does not describe a Qwen-Image transformer: {', '.join(odd)}",
                expected=f"exactly the keys {', '.join(sorted(names))}",
                found=f"missing {sorted(names - given.keys())}, unknown {sorted(given.keys() - names)}",
                hint="convert the model again: porter convert <original> -o <port> --overwrite",
            )
        params = cls(**given)
        axes = params.axes_dims_rope
        if len(axes) != 3 or sum(axes) != params.attention_head_dim or any(width % 2 for width in axes):
            raise BadInputError(
                "the transformer's config.json contradicts itself",
                expected="three even numbers in axes_dims_rope that add up to attention_head_dim",
                found=f"axes_dims_rope {axes}, attention_head_dim {params.attention_head_dim}",
                hint="name the original model's axes: porter convert <original> --config <file with axes_dims_rope>",
            )
        if params.guidance_embeds or (params.zero_cond_t and params.use_additional_t_cond):
            raise BadInputError(
                "the transformer's config.json asks for what no Qwen-Image has",
                expected="guidance_embeds false, and not both zero_cond_t and use_additional_t_cond",
                found=f"guidance_embeds {params.guidance_embeds}, zero_cond_t {params.zero_cond_t}, "
                f"use_additional_t_cond {params.use_additional_t_cond}",
                hint="run it with diffusers' own classes",
            )
        return params


# https://github.com/modelscope/DiffSynth-Studio/blob/fed7b18fac2ed4cb802796eec91970e7659bccde/diffsynth/models/qwen_image_dit.py#L569
# Deviation: latents come packed, as in diffusers; the original packs them itself.
class QwenImageTransformer(nn.Module):
    """Velocity of the flow at (latents, time), given text and, for editing, pictures."""

    supported_attention_backends = ("sdpa", "math", "flash", "efficient", "cudnn")
    on_load = ON_LOAD

    def __init__(self, params: QwenImageParams) -> None:
        super().__init__()
        self.params = p = params
        width, heads = p.num_attention_heads * p.attention_head_dim, p.num_attention_heads
        self.time_text_embed = Conditioning(width, p.use_additional_t_cond)
        self.txt_norm = RMSNorm(p.joint_attention_dim)
        self.img_in = nn.Linear(p.in_channels, width)
        self.txt_in = nn.Linear(p.joint_attention_dim, width)
        self.transformer_blocks = nn.ModuleList(DoubleBlock(width, heads) for _ in range(p.num_layers))
        self.norm_out = AdaLayerNorm(width, 2, scale_first=True)
        self.proj_out = nn.Linear(width, p.patch_size**2 * p.out_channels)
        self.turns = [axis_turns(axis) for axis in p.axes_dims_rope]  # no buffers: they keep their type and device

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> QwenImageTransformer:
        """Build from diffusers' config.json. Raises BadInputError as `QwenImageParams.from_config`."""
        return cls(QwenImageParams.from_config(config))

    def rotary(self, img_shapes: Sequence[Shape], text: int) -> Table:
        """Position table of the joint sequence, the same at every step: `text` tokens, then the pictures'.

        -> (L, E / 2) twice

        Raises:
            UsageError: there are more positions than the model counts.
        """
        positions = joint_positions(img_shapes, text, layered=self.params.use_layer3d_rope)  # (L, 3)
        if int(positions.abs().max()) >= POSITIONS:
            raise UsageError(
                "prompt and pictures do not fit the transformer's positions", expected=f"at most {POSITIONS} in a row",
                found=f"{text} tokens of text, pictures of {', '.join(f'{h} x {w}' for _, h, w in img_shapes)} tokens",
                hint="a shorter prompt, fewer pictures, or smaller --height and --width",
            )  # fmt: skip
        rows = [turns[positions[:, axis] + POSITIONS] for axis, turns in enumerate(self.turns)]
        turns = torch.cat(rows, dim=-1).to(self.img_in.weight.device)  # (L, E / 2)
        return turns.real.contiguous(), turns.imag.contiguous()

    def forward(
        self,
        hidden_states: Tensor,  # (B, S, C) packed latents, and behind them those of given pictures
        encoder_hidden_states: Tensor,  # (B, T, X) text tokens
        timestep: Tensor,  # (B,) from 1 (noise) to 0
        img_shapes: Sequence[Shape],  # of each picture in hidden_states, the same for all images
        encoder_hidden_states_mask: Tensor | None = None,  # bool (B, T), True for tokens that are no padding
        additional_t_cond: Tensor | None = None,  # (B,) 0 or 1, for models with use_additional_t_cond
        rotary: Table | None = None,  # the table of these shapes, where the caller has it already
    ) -> Tensor:
        """Predict the velocity -> (B, S, C)."""
        text = encoder_hidden_states.shape[1]
        rope = self.rotary(img_shapes, text) if rotary is None else rotary
        # Of a sequence-parallel group each rank has the text, and its part of the image (S of it from here on).
        rope = tuple(torch.cat((t[:text], sequence.scatter(t[text:], dim=0))) for t in rope)  # type: ignore[assignment]
        img = sequence.scatter(self.img_in(hidden_states))  # (B, S, D)
        txt = self.txt_in(self.txt_norm(encoder_hidden_states))  # (B, T, D)
        time, clean = timestep.to(img.dtype), None
        if self.params.zero_cond_t:
            time = torch.cat((time, time * 0))  # (2 B,)
            tokens = torch.arange(hidden_states.shape[1], device=img.device)
            clean = sequence.scatter(tokens >= prod(img_shapes[0]), dim=0)  # (S,) True for tokens of given pictures
        vec = self.time_text_embed(time, additional_t_cond)  # (B, D), or (2 B, D)
        mask = encoder_hidden_states_mask
        if mask is not None:
            mask = torch.cat((mask, mask.new_ones(img.shape[:2])), dim=1)  # (B, L)

        for block in self.transformer_blocks:
            img, txt = block(img, txt, vec, rope, mask, clean)
        img = sequence.gather(img)  # (B, S, D), of the whole image

        (img,) = self.norm_out(img, vec[: len(timestep)])
        velocity: Tensor = self.proj_out(img)  # (B, S, C)
        return velocity


# https://github.com/modelscope/DiffSynth-Studio/blob/fed7b18fac2ed4cb802796eec91970e7659bccde/diffsynth/models/general_modules.py#L80
class Conditioning(nn.Module):
    """Timestep through a small MLP; for layered pictures one of two vectors is added."""

    def __init__(self, width: int, additional: bool) -> None:
        super().__init__()
        self.timestep_embedder = MLPEmbedder(FREQUENCIES, width)
        self.addition_t_embedding = nn.Embedding(2, width) if additional else None

    def forward(self, timestep: Tensor, additional: Tensor | None) -> Tensor:
        """timestep, additional: (B,) -> (B, D)."""
        wanted = self.addition_t_embedding is not None
        if (additional is not None) != wanted:
            raise ValueError(f"use_additional_t_cond is {wanted}, but additional_t_cond is {additional}")
        vec: Tensor = self.timestep_embedder(sinusoid(timestep, FREQUENCIES, scale=1000).to(timestep.dtype))
        if self.addition_t_embedding is not None:
            vec = vec + self.addition_t_embedding(additional)
        return vec


# https://github.com/modelscope/DiffSynth-Studio/blob/fed7b18fac2ed4cb802796eec91970e7659bccde/diffsynth/models/qwen_image_dit.py#L450
# Deviation: in float16 both streams are clipped to the finite range, as diffusers does.
class DoubleBlock(nn.Module):
    """Image and text streams with weights of their own, meeting in attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.img_mod, self.txt_mod = (nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width)) for _ in range(2))
        self.img_norm1, self.img_norm2, self.txt_norm1, self.txt_norm2 = (
            nn.LayerNorm(width, elementwise_affine=False, eps=1e-6) for _ in range(4)
        )
        self.attn = JointAttention(width, heads)
        self.img_mlp, self.txt_mlp = FeedForward(width), FeedForward(width)

    def forward(
        self, img: Tensor, txt: Tensor, vec: Tensor, rope: Table, mask: Tensor | None, clean: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """img: (B, S, D), txt: (B, T, D), vec: (B, D), or (2 B, D) with `clean` (S,); mask: (B, L) -> img, txt."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = _by_token(self.img_mod(vec), clean).chunk(6, dim=-1)
        txt_mod = self.txt_mod(vec[: len(txt)]).unsqueeze(1)  # (B, 1, 6 D)
        txt_shift, txt_scale, txt_gate, txt_mlp_shift, txt_mlp_scale, txt_mlp_gate = txt_mod.chunk(6, dim=-1)
        img_in = modulate(self.img_norm1(img), shift, scale)
        txt_in = modulate(self.txt_norm1(txt), txt_shift, txt_scale)
        img_attn, txt_attn = self.attn(img_in, txt_in, rope, mask)  # (B, S, D), (B, T, D)

        img = img + gate * img_attn
        img = img + mlp_gate * self.img_mlp(modulate(self.img_norm2(img), mlp_shift, mlp_scale))
        txt = txt + txt_gate * txt_attn
        txt = txt + txt_mlp_gate * self.txt_mlp(modulate(self.txt_norm2(txt), txt_mlp_shift, txt_mlp_scale))
        return clip_half(img), clip_half(txt)


# https://github.com/modelscope/DiffSynth-Studio/blob/fed7b18fac2ed4cb802796eec91970e7659bccde/diffsynth/models/qwen_image_dit.py#L362
class JointAttention(nn.Module):
    """Image and text attend to each other; `add_*` and `norm_added_*` are the text's."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.head = width // heads
        self.to_qkv, self.add_qkv_proj = (PackedLinear(width, (width, width, width)) for _ in range(2))
        self.norm_q, self.norm_k, self.norm_added_q, self.norm_added_k = (RMSNorm(self.head) for _ in range(4))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        self.to_add_out = nn.Linear(width, width)

    def forward(self, img: Tensor, txt: Tensor, rope: Table, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """img: (B, S, D), txt: (B, T, D), mask: (B, L) -> the same shapes."""
        img_q, img_k, img_v = (x.unflatten(-1, (-1, self.head)) for x in self.to_qkv.parts(img))  # (B, S, N, E)
        txt_q, txt_k, txt_v = (x.unflatten(-1, (-1, self.head)) for x in self.add_qkv_proj.parts(txt))  # (B, T, N, E)
        q = torch.cat((self.norm_added_q(txt_q), self.norm_q(img_q)), dim=1)  # (B, L, N, E)
        k = torch.cat((self.norm_added_k(txt_k), self.norm_k(img_k)), dim=1)
        v = torch.cat((txt_v, img_v), dim=1)
        text = txt.shape[1]
        x = attention(apply_rotary(q, rope), apply_rotary(k, rope), v, mask, shared=text)  # (B, L, D)
        # Contiguous, as diffusers has them: bfloat16's product rounds otherwise where rows lie apart.
        return self.to_out[0](x[:, text:].contiguous()), self.to_add_out(x[:, :text].contiguous())


# https://github.com/modelscope/DiffSynth-Studio/blob/fed7b18fac2ed4cb802796eec91970e7659bccde/diffsynth/models/qwen_image_dit.py#L123
# layered: #L264 of the same file.
def joint_positions(img_shapes: Sequence[Shape], text: int, *, layered: bool) -> Tensor:
    """Frame, row and column of every token -> (L, 3), text first.

    Picture i begins at frame i (layered: the last one is at -1), rows and columns count from the centre, and the text
    goes on along the diagonal from where the largest picture ends.
    """
    pictures = []
    for i, (frames, rows, columns) in enumerate(img_shapes):
        first = -1 if layered and i == len(img_shapes) - 1 else i
        axes = (torch.arange(first, first + frames), _centred(rows), _centred(columns))
        pictures.append(torch.cartesian_prod(*axes))  # (frames * rows * columns, 3)
    start = max(side // 2 for shape in img_shapes for side in shape[1:])
    start = max(start, len(img_shapes) - 1) if layered else start
    diagonal = torch.arange(start, start + text)[:, None].expand(-1, 3)  # (T, 3)
    return torch.cat((diagonal, *pictures))


def _centred(count: int) -> Tensor:
    """`count` whole numbers around 0, the larger half below it: (count,)."""
    return torch.arange(count) - (count - count // 2)


# https://github.com/modelscope/DiffSynth-Studio/blob/fed7b18fac2ed4cb802796eec91970e7659bccde/diffsynth/models/qwen_image_dit.py#L80
def axis_turns(width: int) -> Tensor:
    """The turn of every position from -`POSITIONS` up, as complex numbers on the CPU: (2 `POSITIONS`, width / 2).

    In float32, and made with the model, as the released class does: in float64 far positions would turn otherwise.
    """
    steps = torch.arange(0, width, 2, dtype=torch.float32, device="cpu") / width  # (width / 2,)
    angles = torch.arange(-POSITIONS, POSITIONS, device="cpu")[:, None] * (1.0 / THETA**steps)
    return torch.polar(torch.ones_like(angles), angles)


def _by_token(mod: Tensor, clean: Tensor | None) -> Tensor:
    """Modulation of each token: (B, 6 D) -> (B, 1, 6 D), or with `clean` (S,): (2 B, 6 D) -> (B, S, 6 D)."""
    if clean is None:
        return mod.unsqueeze(1)
    at_time, at_zero = mod.unsqueeze(1).chunk(2)  # (B, 1, 6 D) each
    return torch.where(clean[:, None], at_zero, at_time)
