"""Activation memory of HiDream-I1's transformer. Eager, no gradients, fused attention.

B batch · L tokens of the picture · T tokens of one text · E = 3·T, the text in a block · S = L + E · d width · h width
of a head
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from conversions.common.denoising import FLOAT
from porter.core.memory import Workload

LLAMA, T5 = 1, 0  # places in `caption_channels`


def forward(config: Mapping[str, Any], work: Workload) -> int:
    """Bytes at the peak of one forward: rotary positions of a double block's key.

    The block's input, its normalised copy, query, key and value, of picture and text by themselves (5·B·L·d and
    6·B·E·d, with the text before it was joined with a layer of Llama's); the last three joined (3·B·S·d); query and key
    in float32 (2·B·S·d), the query turned, and of the key both products and their sum (4·B·S·d). A float32 model needs
    no copies. The tables, four numbers for each pair (2·B·S·h), in float32.

    All through it live what the text encoders gave, of Llama every layer, and its projection for each block.

    The pipeline makes about as many pixels of every size as `max_resolution` has, and a picture that is not square is
    padded to that, so L does not depend on the size that is asked for. The experts are not the peak in 16 bits, however
    they are chosen; in float32 they would be where one of them got more than two thirds of the tokens.
    """
    patch, (high, wide) = config["patch_size"], config["max_resolution"]
    picture, text = high * wide // (patch * patch), work.text_tokens
    both = picture + 3 * text
    head = config["attention_head_dim"]
    width = config["num_attention_heads"] * head
    copies = 2 if work.element < FLOAT else 0
    turned = both * width * (3 * work.element + (4 + copies) * FLOAT)
    alone = (5 * picture + 6 * 3 * text) * width * work.element
    tables = 2 * both * head * FLOAT
    layers, channels = config["llama_layers"], config["caption_channels"]
    states = text * ((max(layers) + 1) * channels[LLAMA] + channels[T5] + (len(layers) + 1) * width)
    latents = high * wide * config["in_channels"]
    return int(work.batch * (turned + alone + tables + work.element * (states + latents)))


FORMULAS = {"HiDreamImageTransformer2DModel": forward}
