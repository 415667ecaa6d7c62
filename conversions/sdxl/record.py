"""The original UNets of Stable Diffusion XL at tiny size; see `conversions.record_reference`."""

from __future__ import annotations

from typing import Any

from conversions.common.unet.record import POOLED, SINUSOIDS, SIZES, generative_models, pooled_and_sizes

_TOLD: dict[str, Any] = {"addition_embed_type": "text_time", "addition_time_embed_dim": SINUSOIDS}
_LABELS: dict[str, Any] = {"num_classes": "sequential", "adm_in_channels": POOLED + SIZES * SINUSOIDS}

UNETS = (
    # As released: no transformers at the finest level, deeper ones at coarser levels.
    generative_models(
        "unet-base", {"attention_head_dim": [2, 4, 8], **_TOLD}, pooled_and_sizes, num_res_blocks=1,
        channel_mult=[1, 2, 4], attention_resolutions=[4, 2], transformer_depth=[1, 1, 2], num_head_channels=16,
        **_LABELS,
    ),
    # As released: none at the finest and the coarsest level, but in the middle.
    generative_models(
        "unet-refiner", {"attention_head_dim": [2, 4, 4], **_TOLD}, pooled_and_sizes, num_res_blocks=1,
        channel_mult=[1, 2, 2], attention_resolutions=[2], transformer_depth=2, num_head_channels=16, **_LABELS,
    ),
)  # fmt: skip
ORIGINALS = (*UNETS,)
