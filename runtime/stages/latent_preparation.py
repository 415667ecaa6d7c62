"""The noise that the loop starts from."""

from __future__ import annotations

import torch
from torch import nn

from runtime.config import PipelineConfig
from runtime.request import Req

from .base import PipelineStage, VerificationResult
from .text_encoding import module_device, module_dtype


class LatentPreparationStage(PipelineStage):
    """Draws each image's noise from its own generator and packs it for the transformer."""

    def __init__(self, transformer: nn.Module) -> None:
        self.transformer = transformer

    def verify_input(self, batch: Req, config: PipelineConfig) -> VerificationResult:
        result = VerificationResult()
        count = len(batch.generator or [])
        result.add_check("generator", batch.generator, count == batch.batch_size, f"{batch.batch_size} generators")
        return result

    def forward(self, batch: Req, config: PipelineConfig) -> Req:
        batch.raw_latent_shape = config.prepare_latent_shape(batch)  # (B, C, h, w)
        device = module_device(self.transformer)
        dtype = getattr(torch, config.latents_precision) if config.latents_precision else module_dtype(self.transformer)
        if batch.latents is None:
            assert batch.generator is not None  # verified
            shape = (1, *batch.raw_latent_shape[1:])
            # In the loop's dtype: rounding float32 noise would give other numbers than the reference draws.
            noise = [torch.randn(shape, generator=g, device=g.device, dtype=dtype).to(device) for g in batch.generator]
            batch.latents = config.maybe_pack_latents(torch.cat(noise), batch)
        batch.latents = batch.latents.to(device, dtype)
        batch.tap(self.name, latents=batch.latents)
        return batch

    def verify_output(self, batch: Req, config: PipelineConfig) -> VerificationResult:
        result = VerificationResult()
        rows = None if batch.latents is None else batch.latents.shape[0]
        result.add_check("latents", batch.latents, rows == batch.batch_size, f"{batch.batch_size} rows of noise")
        return result
