"""Activation memory of HunyuanVideo 1.5's transformer. Eager, no gradients, fused attention with its mask.

B batch · L tokens of the video · E tokens of all conditions · S = L + E · d width · h width of a head
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conversions.common.denoising import FLOAT, patches
from porter.core.memory import Workload

BYT5, PICTURE = 256, 729  # tokens that its pipelines give beside the prompt's, whether anything fills them or not
VECTOR = 16  # the fused kernel reads rows of a mask that are a multiple of this


def forward(config: Mapping[str, Any], work: Workload) -> int:
    """Bytes at the peak of one forward: the mask that a block makes for attention, of every token against every token.

    As booleans it is there twice (2·B·S·S bytes: a row for each token, and that with its transpose), for the kernel
    once in the model's dtype (B·S·S); beside that its negation, from which it is made, or where S is no multiple of 16
    a copy with longer rows (B·S·S). The feed-forward never comes to as much, however short the video: E is too large.

    Around it query, key and value (3·B·S·d), the block's input and its normalised copy (2·B·L·d and 2·B·E·d), the
    conditions' own query, key and value (3·B·E·d), the embeddings of their kinds, their sums with those, and the sums
    joined (3·B·E·d). The tables of rotary positions, in float32 (2·L·h).

    Its pipelines compute each pass of guidance by itself, and give a picture's tokens even where there is none.
    """
    video, prompt = patches(work, config["patch_size"], config["patch_size_t"]), work.text_tokens
    width = config["num_attention_heads"] * config["attention_head_dim"]
    conditions = prompt + BYT5 + PICTURE
    both = video + conditions
    padding = -both % VECTOR
    beside = work.element * (both + padding) if padding else both
    mask = both * (2 * both + work.element * both + beside)
    given = patches(work, 1) * config["in_channels"] + prompt * config["text_embed_dim"]
    given += BYT5 * config["text_embed_2_dim"] + PICTURE * config["image_embed_dim"]
    numbers = width * (3 * both + 2 * video + 8 * conditions) + given
    tables = 2 * video * config["attention_head_dim"] * FLOAT
    return int(work.batch * (mask + work.element * numbers) + tables)


FORMULAS = {"HunyuanVideo15Transformer3DModel": forward}
