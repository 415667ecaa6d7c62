"""The original UNet of Stable Diffusion 1 at tiny size; see `conversions.record_reference`."""

from __future__ import annotations

from conversions.common.unet.record import latent_diffusion

UNETS = (
    # As released: no transformers at the coarsest level, as many heads at each.
    latent_diffusion(
        "unet", {"attention_head_dim": 4}, attention_resolutions=[2, 1], num_res_blocks=2, channel_mult=[1, 2, 2],
        num_heads=4,
    ),
)  # fmt: skip
ORIGINALS = (*UNETS,)
