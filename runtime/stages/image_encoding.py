"""Given pictures to embeddings, and to latents.  B: images, T: tokens, X: width."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from runtime.config import PipelineConfig
from runtime.request import Req

from .autoencoder import autoencoding
from .base import PipelineStage, VerificationResult, tensors_of_batch
from .text_encoding import module_device, module_dtype


class ImageEncodingStage(PipelineStage):
    """Runs the vision encoder on the request's pictures, as `config.encode_image` says."""

    def __init__(self, image_encoder: Any, image_processor: Any) -> None:
        self.image_encoder, self.image_processor = image_encoder, image_processor

    def forward(self, batch: Req, config: PipelineConfig) -> Req:
        if batch.image and not batch.image_embeds:
            batch.image_embeds = config.encode_image(self.image_encoder, self.image_processor, batch)
        batch.tap(self.name, **{f"image_embeds.{i}": t for i, t in enumerate(batch.image_embeds)})
        return batch

    def verify_output(self, batch: Req, config: PipelineConfig) -> VerificationResult:
        result = VerificationResult()
        holds = not batch.image or tensors_of_batch(batch.batch_size, 3)(batch.image_embeds)
        result.add_check("image_embeds", batch.image_embeds, holds, "finite tensors, one row for each image")
        return result


class ImageVAEEncodingStage(PipelineStage):
    """Encodes the request's pictures by the autoencoder, as `config.prepare_image_latents` says.

    It comes after the noise: an encoding that draws takes the numbers that follow.
    """

    def __init__(self, vae: Any, transformer: nn.Module) -> None:
        self.vae, self.transformer = vae, transformer

    def forward(self, batch: Req, config: PipelineConfig) -> Req:
        if batch.image and batch.image_latents is None:
            dtype, device = module_dtype(self.transformer), module_device(self.transformer)
            with autoencoding(self.vae, config):
                batch.image_latents = config.prepare_image_latents(self.vae, batch, dtype, device)
        if batch.image_latents is not None:
            batch.tap(self.name, image_latents=batch.image_latents)
        return batch

    def verify_output(self, batch: Req, config: PipelineConfig) -> VerificationResult:
        result = VerificationResult()
        made, rows = batch.image_latents, batch.batch_size
        fits = made is None or (isinstance(made, Tensor) and made.shape[0] == rows and bool(torch.isfinite(made).all()))
        result.add_check("image_latents", made, fits, f"{rows} finite rows")
        return result
