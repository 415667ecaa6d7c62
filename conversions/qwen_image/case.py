"""What parity must know about Qwen-Image beyond the recipes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from conversions.common.candidates import diffusers_candidate, heads_and_tokens, load
from conversions.qwen_image.model import QwenImageTransformer
from conversions.qwen_image.recipe import ON_LOAD
from parity.case import Block, Candidate, ComponentCase, Cross, FamilyCases, Named
from porter.core.files import read_config
from runtime.loader import load_module

HERE = Path(__file__).parent


# --- the transformer -------------------------------------------------------------------------------------------------


def _arguments(given: Named) -> dict[str, Any]:
    """Latents (1, C, H, W) in patches of 2 x 2, t (1), text (1, T, E) without padding."""
    latents = given["latents"]
    height, width = (size // 2 for size in latents.shape[-2:])
    patches = latents.unflatten(3, (width, 2)).unflatten(2, (height, 2)).permute(0, 2, 4, 1, 3, 5)  # (1, H, W, C, 2, 2)
    return {
        "hidden_states": patches.flatten(3).flatten(1, 2), "encoder_hidden_states": given["text"],
        "timestep": given["t"], "img_shapes": [(1, height, width)],
    }  # fmt: skip


def _diffusers(model: Any, given: Mapping[str, Any]) -> Tensor:
    """Its shapes are a list for each image."""
    shapes = [given["img_shapes"]] * len(given["timestep"])
    out: Tensor = model(**given | {"img_shapes": shapes}, return_dict=False)[0]
    return out


def _forward(model: Any, given: Named) -> Tensor:
    return _diffusers(model, _arguments(given))


def _native(model: Any, given: Named) -> Tensor:
    out: Tensor = model(**_arguments(given))
    return out


def load_native(folder: Path) -> nn.Module:
    """The native transformer of a port, float32, filled strictly by the runtime's own loader."""
    config = read_config(folder / "config.json")
    return load_module(QwenImageTransformer, config, folder, dtype=torch.float32, device=torch.device("cpu"))


HEADS = heads_and_tokens(r"\.norm_(added_)?[qk]")
TRANSFORMER = diffusers_candidate("QwenImageTransformer2DModel", {"first": _forward, "second": _forward}, HEADS)
NATIVE = Candidate("native", load_native, {"first": _native, "second": _native}, layout=HEADS, on_load=ON_LOAD)


# --- the autoencoder -------------------------------------------------------------------------------------------------


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
            (NATIVE, TRANSFORMER),
        ),
        ComponentCase(
            "vae", "conversions.qwen_image.vae_recipe:AUTOENCODER", HERE / "reference" / "vae.safetensors",
            (AUTOENCODER,),
        ),
    ),
    code=("conversions.qwen_image", "conversions.common", "porter.core"),
)  # fmt: skip
