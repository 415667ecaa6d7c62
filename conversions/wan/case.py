"""What parity must know about Wan beyond the recipes: how diffusers' classes are called, and what their blocks take."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conversions.common.candidates import diffusers_candidate
from parity.case import Block, ComponentCase, FamilyCases, Named, Shapes

HERE = Path(__file__).parent


def _forward(model: Any, given: Named) -> Tensor:
    """x (1, C, F, H, W), t (1) or (1, tokens), context (1, T, text); y (1, C', F, H, W), clip_fea (images, n, E).

    diffusers keeps the rotary table as it was built, in float32, and the original computes it in float64; so the table
    is built anew in the precision of the run, which in float32 is what diffusers has.
    """
    rope = model.rope
    table = type(rope)(rope.attention_head_dim, rope.patch_size, rope.max_seq_len)
    rope.freqs_cos, rope.freqs_sin = table.freqs_cos, table.freqs_sin
    x = torch.cat([given["x"], given["y"]], 1) if "y" in given else given["x"]
    out: Tensor = model(
        hidden_states=x, timestep=given["t"], encoder_hidden_states=given["context"],
        encoder_hidden_states_image=given.get("clip_fea"), return_dict=False,
    )[0]  # fmt: skip
    return out


def _block_in(own: Named, _: Shapes) -> Named:
    return {"x": own["hidden_states"], "e": own["temb"], "context": own["encoder_hidden_states"]}


TRANSFORMER = replace(
    diffusers_candidate("WanTransformer3DModel", {"first": _forward, "second": _forward}),
    blocks=(Block(r"blocks\.\d+", inputs=_block_in),),
)


def _statistics(model: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents, as diffusers' pipelines take them from the config."""
    mean, std = (
        torch.tensor(model.config[key], dtype=like.dtype).view(1, -1, 1, 1, 1)
        for key in ("latents_mean", "latents_std")
    )
    return mean, std


def _encode(model: Any, given: Named) -> Tensor:
    """Videos (B, 3, F, H, W) -> the mean of their latents, normalised, which the original does inside `encode`."""
    mean, std = _statistics(model, given["x"])
    latents: Tensor = (model.encode(given["x"]).latent_dist.mode() - mean) / std
    return latents


def _decode(model: Any, given: Named) -> Tensor:
    """Normalised latents (B, C, f, h, w) -> videos."""
    mean, std = _statistics(model, given["z"])
    video: Tensor = model.decode(given["z"] * std + mean, return_dict=False)[0]
    return video


AUTOENCODER = replace(
    diffusers_candidate("AutoencoderKLWan", {"encode": _encode, "decode": _decode}),
    blocks=(Block(r".+"),),  # a convolution also takes cached frames; both sides call everything alike
)


def _case(component: str, variant: str) -> ComponentCase:
    recipe = "recipe:TRANSFORMER" if component == "transformer" else "vae_recipe:AUTOENCODER"
    return ComponentCase(
        component, f"conversions.wan.{recipe}", HERE / "reference" / f"{component}-{variant}.safetensors",
        (TRANSFORMER if component == "transformer" else AUTOENCODER,),
    )  # fmt: skip


CASES = FamilyCases(
    components=(
        *(_case("transformer", name) for name in ("2.1-t2v", "2.1-i2v", "2.1-flf2v", "2.2-ti2v")),
        *(_case("vae", name) for name in ("2.1", "2.2")),
    ),
    code=("conversions.wan", "conversions.common", "porter.core"),
)
