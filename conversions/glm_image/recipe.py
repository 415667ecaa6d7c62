"""GLM-Image's transformer: how the native model packs diffusers' GlmImageTransformer2DModel while it is read.

Its weights were published in diffusers' layout, so there is nothing to convert.
"""

from __future__ import annotations

from porter.core.onload import on_load
from porter.core.ops import Concat
from porter.core.recipe import INPUTS, OUTPUTS, Rule

_B, _P = "transformer_blocks.{i:int}.", "transformer_blocks.{i}."
_FF = "{f:glyph_projector|prior_projector}.net."

ON_LOAD = on_load(
    "glm-image-on-load",
    Rule(
        (_B + "attn1.to_q.{p:weight|bias}", _P + "attn1.to_k.{p}", _P + "attn1.to_v.{p}"),
        _P + "attn1.to_qkv.{p}", (Concat(),), "one product reads the input once", shard=OUTPUTS,
    ),
    Rule(_B + "attn1.to_out.0.{p:weight|bias}", _P + "attn1.to_out.0.{p}", shard=INPUTS),
    Rule(_B + "ff.net.0.proj.{p:weight|bias}", _P + "ff.net.0.proj.{p}", shard=OUTPUTS),
    Rule(_B + "ff.net.2.{p:weight|bias}", _P + "ff.net.2.{p}", shard=INPUTS),
    Rule(_FF + "0.proj.{p:weight|bias}", "{f}.net.0.proj.{p}", shard=OUTPUTS),
    Rule(_FF + "2.{p:weight|bias}", "{f}.net.2.{p}", shard=INPUTS),
)  # fmt: skip
