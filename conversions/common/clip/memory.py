"""Activation memory of CLIP's text and image encoders. Eager, no gradients, PyTorch's fused attention.

L tokens · B sequences · d width of the model · f width of the feed-forward · n layers
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from porter.core.memory import Workload

INDEX = 8  # bytes of a token id


def encode(config: Mapping[str, Any], work: Workload) -> int:
    """Bytes at the peak of one encoding, with every layer's output (Stable Diffusion XL, 3) or without (1.5, FLUX.1).

    The peak is inside the last layer's feed-forward: with hidden states every layer's input (n·B·L·d), without them the
    first's and this one's (2·B·L·d); the sum after attention and its normalised copy (2·B·L·d), and the activation: two
    tensors of B·L·f, three for `quick_gelu`.
    """
    tokens = work.text_tokens
    if limit := config.get("max_position_embeddings"):
        tokens = min(tokens, limit)
    kept = config["num_hidden_layers"] if work.hidden_states else 2
    return work.batch * tokens * (_layers(config, kept) * work.element + INDEX)


def look(config: Mapping[str, Any], work: Workload, *, states: bool) -> int:
    """Bytes at the peak of one encoding of an image in the size that the config names, whatever the picture's size is.

    As `encode`, with one token for each patch and one more, and the image. With `states` every layer's input is kept,
    as Wan calls it; without, the input of the first, and of this layer.
    """
    config = config.get("vision_config") or config
    side = config["image_size"] // config["patch_size"]
    kept = config["num_hidden_layers"] if states else 2
    image = config.get("num_channels", 3) * config["image_size"] ** 2
    return int(work.batch * ((side * side + 1) * _layers(config, kept) + image) * work.element)


def _layers(config: Mapping[str, Any], kept: int) -> int:
    inside = (3 if config.get("hidden_act") == "quick_gelu" else 2) * config["intermediate_size"]
    width: int = config["hidden_size"]
    return int((kept + 2) * width + inside)


FORMULAS = {
    "CLIPTextModel": encode,
    "CLIPTextModelWithProjection": encode,
    "CLIPVisionModel": partial(look, states=True),
    "CLIPVisionModelWithProjection": partial(look, states=False),
}
