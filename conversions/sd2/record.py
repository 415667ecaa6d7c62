"""The original UNets and text encoder of Stable Diffusion 2.x at tiny size; its autoencoder is Stable Diffusion 1.x's.

They come from two repositories; see `conversions.record_reference`.
"""

from __future__ import annotations

from typing import Any

import torch

from conversions.common.clip.recording import recorded
from conversions.common.unet.record import generative_models

# As released: no transformers at the coarsest level, heads of one width.
_LEVELS: dict[str, Any] = {"attention_resolutions": [2, 1], "channel_mult": [1, 2, 2], "num_head_channels": 16}
_HEADS = [2, 4, 4]

UNETS = (
    generative_models("unet", {"attention_head_dim": _HEADS}, num_res_blocks=1, **_LEVELS),
    generative_models(
        "unet-unclip", {"attention_head_dim": _HEADS, "class_embed_type": "projection"},
        lambda draw: {"y": torch.randn(2, 40, generator=draw)}, num_classes="sequential", adm_in_channels=40,
        num_res_blocks=1, **_LEVELS,
    ),
    # As released: none at the finest level, and where they are, both attentions look at the text but for the coarsest.
    generative_models(
        "unet-upscaler", {"attention_head_dim": 4}, lambda draw: {"classes": torch.tensor([7.0, 2.0])}, num_classes=11,
        in_channels=7, attention_resolutions=[2, 4], channel_mult=[1, 2, 2], num_heads=4, num_res_blocks=1,
        disable_self_attentions=[True, True, False],
    ),
)  # fmt: skip
ORIGINALS = (*UNETS, recorded("text_encoder", whole=False))
