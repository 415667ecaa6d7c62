"""The UNet of Stable Diffusion 1, 2 and XL."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from torch import Tensor

from tests.conversions.proofs import Config, Proof, Real, Table, of_class

# Everything that a config.json of the class may say, as the class has it.
_CLASS: Config = {
    name: given.default
    for name, given in inspect.signature(UNet2DConditionModel.__init__).parameters.items()
    if name != "self" and given.default is not inspect.Parameter.empty
}
_CROSS, _PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"


def _config(levels: tuple[bool, ...], **more: Any) -> Config:
    """A config with transformers in the levels that say so."""
    kinds = tuple(_CROSS if has else _PLAIN for has in levels)
    ups = tuple(kind.replace("Down", "Up") for kind in reversed(kinds))
    return {**_CLASS, "down_block_types": kinds, "up_block_types": ups, **more}


def _ldm(state: dict[str, Tensor], config: Config) -> Mapping[str, Tensor]:
    """diffusers' converter, which wants the prefix of a whole checkpoint."""
    return convert_ldm_unet_checkpoint({f"model.diffusion_model.{n}": t for n, t in state.items()}, dict(config))


_SD2: Config = {"cross_attention_dim": 1024, "use_linear_projection": True}
_UPSCALED: Config = {
    "in_channels": 7, "num_class_embeds": 1000, "only_cross_attention": (True, True, True, False), "sample_size": 128,
    "attention_head_dim": 8,
}  # fmt: skip
_XL: Config = {"use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256}
_DEEP = (True, True, True, False)  # levels with transformers: all but the coarsest
_RELEASED: Mapping[tuple[str, str], Config] = {
    ("sd1", "Stable Diffusion 1.5"): _config(_DEEP, cross_attention_dim=768, attention_head_dim=8, sample_size=64),
    ("sd2", "Stable Diffusion 2.1"): _config(_DEEP, **_SD2, attention_head_dim=(5, 10, 20, 20), sample_size=96),
    ("sd2", "Stable Diffusion 2.1 unCLIP"): _config(
        _DEEP, **_SD2, attention_head_dim=(5, 10, 20, 20), sample_size=96, class_embed_type="projection",
        projection_class_embeddings_input_dim=2048,
    ),
    ("sd2", "Stable Diffusion x4 upscaler"): _config(
        (False, True, True, True), **_SD2, **_UPSCALED, block_out_channels=(256, 512, 512, 1024)
    ),
    ("sdxl", "Stable Diffusion XL base"): _config(
        (False, True, True), **_XL, block_out_channels=(320, 640, 1280), transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20), cross_attention_dim=2048, projection_class_embeddings_input_dim=2816,
        sample_size=128,
    ),
    ("sdxl", "Stable Diffusion XL refiner"): _config(
        (False, True, True, False), **_XL, block_out_channels=(384, 768, 1536, 1536), transformer_layers_per_block=4,
        attention_head_dim=(6, 12, 24, 24), cross_attention_dim=1280, projection_class_embeddings_input_dim=2560,
        sample_size=128,
    ),
}  # fmt: skip
REAL = {
    model: Real(model, config, Table(family, "UNetModel", model), Table(family, "UNet2DConditionModel", model))
    for (family, model), config in _RELEASED.items()
}
_SMALL: Config = {
    "block_out_channels": (32, 64, 96), "cross_attention_dim": 24, "attention_head_dim": 4, "sample_size": 16,
    "in_channels": 4, "out_channels": 3,
}  # fmt: skip
_TINY: Mapping[str, tuple[Config, tuple[str, ...]]] = {
    "1": (_config((True, True, False), **_SMALL), ("Stable Diffusion 1.5",)),
    "1-inpainting": (_config((True, True, False), **{**_SMALL, "in_channels": 9, "layers_per_block": 1}), ()),
    "2": (
        _config((True, False, True), **_SMALL, use_linear_projection=True, layers_per_block=3),
        ("Stable Diffusion 2.1",),
    ),
    "2-unclip": (
        _config(
            (True, True, False), **{**_SMALL, "attention_head_dim": (1, 2, 3)}, use_linear_projection=True,
            class_embed_type="projection", projection_class_embeddings_input_dim=40,
        ),
        ("Stable Diffusion 2.1 unCLIP",),
    ),
    "2-upscaler": (
        _config(
            (False, True, True), **{**_SMALL, "in_channels": 7}, use_linear_projection=True, num_class_embeds=11,
            only_cross_attention=(True, True, False),
        ),
        ("Stable Diffusion x4 upscaler",),
    ),
    "xl-base": (
        _config(
            (False, True, True), **_SMALL, **_XL, transformer_layers_per_block=(1, 2, 3),
            projection_class_embeddings_input_dim=40,
        ),
        ("Stable Diffusion XL base",),
    ),
    "xl-refiner": (
        _config(
            (False, True, False), **_SMALL, **_XL, transformer_layers_per_block=2,
            projection_class_embeddings_input_dim=40,
        ),
        ("Stable Diffusion XL refiner",),
    ),
}  # fmt: skip
PROOFS = tuple(
    Proof(
        f"unet-{name}", "conversions.common.unet.recipe:UNET", tiny, of_class("diffusers", "UNet2DConditionModel"),
        tuple(REAL[model] for model in models), oracle=_ldm,
    )
    for name, (tiny, models) in _TINY.items()
)  # fmt: skip
