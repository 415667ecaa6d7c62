"""Latents to pictures."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from porter.core.errors import CheckFailed
from runtime.config import PipelineConfig
from runtime.request import Req

from .autoencoder import autoencoding
from .base import PipelineStage, VerificationResult


class DecodingStage(PipelineStage):
    """Unpacks the latents, undoes their normalisation and runs the autoencoder's decoder."""

    def __init__(self, vae: Any) -> None:
        self.vae = vae

    def verify_input(self, batch: Req, config: PipelineConfig) -> VerificationResult:
        result = VerificationResult()
        result.add_check("latents", batch.latents, batch.latents is not None, "a tensor")
        result.add_check("raw_latent_shape", batch.raw_latent_shape, batch.raw_latent_shape is not None, "a shape")
        return result

    def forward(self, batch: Req, config: PipelineConfig) -> Req:
        assert batch.latents is not None  # verified
        _demand_finite(batch.latents, "the latents after the last step")
        latents = config.post_denoising_loop(batch.latents, batch)  # (B, C, h, w)
        with autoencoding(self.vae, config):
            latents = latents.to(self.vae.dtype)  # before the arithmetic, as diffusers does
            scale, shift = config.get_decode_scale_and_shift()
            latents = latents / _like(scale, latents) + _like(shift, latents)
            image = self.vae.decode(latents, return_dict=False)[0]  # (B, 3, …, H, W) in [-1, 1]
        _demand_finite(image, "the decoded picture")
        batch.output = config.post_decoding(image, batch)
        batch.tap(self.name, latents=latents, image=batch.output)
        return batch

    def verify_output(self, batch: Req, config: PipelineConfig) -> VerificationResult:
        result = VerificationResult()
        frames = (batch.num_frames,) if config.task_type.video else ()
        expected = (batch.batch_size, 3, *frames, batch.height, batch.width)
        shape = None if batch.output is None else tuple(batch.output.shape)
        result.add_check("output", batch.output, shape == expected, f"pictures of shape {expected}")
        return result


def _like(value: float | Tensor, latents: Tensor) -> float | Tensor:
    return value.to(latents) if isinstance(value, Tensor) else value


def _demand_finite(tensor: Tensor, what: str) -> None:
    """Raises CheckFailed: a picture of NaN would be written as if it were one."""
    if not bool(tensor.isfinite().all()):
        raise CheckFailed(
            f"{what} are not finite" if what.startswith("the latents") else f"{what} is not finite",
            found=f"{int((~tensor.isfinite()).sum())} of {tensor.numel()} values",
            hint="run it again with --dtype float32; if it stays: porter parity <port>",
        )
