"""Activation memory of Qwen-Image's autoencoder: Wan's, with a single latent frame per image."""

from __future__ import annotations

from conversions.wan.vae_memory import decode

FORMULAS = {"AutoencoderKLQwenImage": decode}
