"""Activation memory of Qwen-Image's autoencoders: Wan's code, with a single latent frame for a picture."""

from __future__ import annotations

from functools import partial

from conversions.wan.vae_memory import decode

FORMULAS = {"AutoencoderKLQwenImage": decode, "AutoencoderKLQwenImage21": partial(decode, still=True)}
