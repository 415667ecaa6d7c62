"""AutoencoderKL under parity: one case for every family that has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from conversions.common.candidates import diffusers_candidate
from parity.case import ComponentCase, Named


def _encode(model: Any, given: Named) -> Tensor:
    """x (B, C, H, W) -> the mean of the latents' distribution, as the decoder takes it."""
    mean: Tensor = model.encode(given["x"]).latent_dist.mode()
    return mean


def _moments(model: Any, given: Named) -> Tensor:
    """x (B, C, H, W) -> mean and log-variance of the latents' distribution, before it is clamped."""
    moments: Tensor = model.encode(given["x"]).latent_dist.parameters
    return moments


def _decode(model: Any, given: Named) -> Tensor:
    """z (B, z, H, W), no longer scaled or shifted -> image."""
    image: Tensor = model.decode(given["z"], return_dict=False)[0]
    return image


DIFFUSERS = diffusers_candidate("AutoencoderKL", {"encode": _encode, "moments": _moments, "decode": _decode})


def autoencoder_case(trace: Path) -> ComponentCase:
    """A family's `vae`, held to its own trace."""
    return ComponentCase("vae", "conversions.common.autoencoder_kl.recipe:AUTOENCODER", trace, (DIFFUSERS,))
