"""What parity must know about Qwen-Image beyond the recipes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conversions.common.candidates import diffusers_candidate, heads_and_tokens
from parity.case import Block, ComponentCase, FamilyCases, Named

HERE = Path(__file__).parent


def _forward(model: Any, given: Named) -> Tensor:
    """Latents (1, C, H, W) in patches of 2 x 2, t (1), text (1, T, E) without padding."""
    latents = given["latents"]
    height, width = (size // 2 for size in latents.shape[-2:])
    patches = latents.unflatten(3, (width, 2)).unflatten(2, (height, 2)).permute(0, 2, 4, 1, 3, 5)  # (1, H, W, C, 2, 2)
    out: Tensor = model(
        hidden_states=patches.flatten(3).flatten(1, 2), encoder_hidden_states=given["text"], timestep=given["t"],
        img_shapes=[[(1, height, width)]], return_dict=False,
    )[0]  # fmt: skip
    return out


TRANSFORMER = diffusers_candidate(
    "QwenImageTransformer2DModel", {"first": _forward, "second": _forward}, heads_and_tokens(r"\.norm_(added_)?[qk]")
)


def _statistics(model: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents, as diffusers' pipelines take them from the config."""
    mean, std = (
        torch.tensor(model.config[key], dtype=like.dtype).view(1, -1, 1, 1, 1)
        for key in ("latents_mean", "latents_std")
    )
    return mean, std


def _encode(model: Any, given: Named) -> Tensor:
    """Videos (B, C, F, H, W) -> the mean of their latents, normalised, which the original does inside `encode`."""
    mean, std = _statistics(model, given["x"])
    latents: Tensor = (model.encode(given["x"]).latent_dist.mode() - mean) / std
    return latents


def _decode(model: Any, given: Named) -> Tensor:
    """Normalised latents (B, C, f, h, w) -> videos."""
    mean, std = _statistics(model, given["z"])
    video: Tensor = model.decode(given["z"] * std + mean, return_dict=False)[0]
    return video


AUTOENCODER = replace(
    diffusers_candidate("AutoencoderKLQwenImage", {"encode": _encode, "decode": _decode}),
    blocks=(Block(r".+"),),  # a convolution also takes cached frames; both sides call everything alike
)

CASES = FamilyCases(
    components=(
        ComponentCase(
            "transformer", "conversions.qwen_image.recipe:TRANSFORMER", HERE / "reference" / "transformer.safetensors",
            (TRANSFORMER,),
        ),
        ComponentCase(
            "vae", "conversions.qwen_image.vae_recipe:AUTOENCODER", HERE / "reference" / "vae.safetensors",
            (AUTOENCODER,),
        ),
    ),
    code=("conversions.qwen_image", "conversions.common", "porter.core"),
)  # fmt: skip
