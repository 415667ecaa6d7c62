"""The loop: one for all families.  B: images; latents keep the model's packing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from runtime.attention import attention_backend
from runtime.config import PipelineConfig
from runtime.request import Req

from .base import PipelineStage, VerificationResult
from .text_encoding import module_dtype


class DenoisingStage(PipelineStage):
    """Predicts and steps from noise to latents; each step is shown to the taps."""

    def __init__(self, transformer: nn.Module, scheduler: Any) -> None:
        self.transformer, self.scheduler = transformer, scheduler

    def verify_input(self, batch: Req, config: PipelineConfig) -> VerificationResult:
        result = VerificationResult()
        for name in ("latents", "timesteps"):
            value = getattr(batch, name)
            result.add_check(name, value, isinstance(value, Tensor), "a tensor")
        result.add_check("prompt_embeds", batch.prompt_embeds, bool(batch.prompt_embeds), "a tensor for each encoder")
        return result

    def forward(self, batch: Req, config: PipelineConfig) -> Req:
        latents, timesteps = batch.latents, batch.timesteps
        assert latents is not None and timesteps is not None  # verified
        device = latents.device
        freqs_cis = config.get_freqs_cis(batch, self.transformer, device)
        positive = config.prepare_pos_cond_kwargs(batch, freqs_cis, device)
        guided = batch.do_classifier_free_guidance
        negative = config.prepare_neg_cond_kwargs(batch, freqs_cis, device) if guided else {}
        supported = getattr(self.transformer, "supported_attention_backends", ("sdpa",))
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=config.enable_autocast)
        with attention_backend(config.attention_backend, supported), autocast:
            for step, t in enumerate(timesteps):
                timestep = config.scale_timestep(t.expand(latents.shape[0]).to(latents.dtype))  # (B,)
                noise_pred = self.transformer(hidden_states=latents, timestep=timestep, **positive)
                if guided:
                    opposite = self.transformer(hidden_states=latents, timestep=timestep, **negative)
                    noise_pred = opposite + batch.true_cfg_scale * (noise_pred - opposite)
                latents = self.scheduler.step(noise_pred, t, latents, return_dict=False)[0]
                latents = latents.to(module_dtype(self.transformer))
                batch.tap(f"{self.name}.step.{step}", noise_pred=noise_pred, latents=latents)
        batch.latents = latents
        batch.tap(self.name, latents=latents)
        return batch

    def verify_output(self, batch: Req, config: PipelineConfig) -> VerificationResult:
        result = VerificationResult()
        result.add_check("latents", batch.latents, batch.latents is not None, "a tensor")
        return result
