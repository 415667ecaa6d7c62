"""The schedule: sigmas and timesteps, shifted by the scheduler."""

from __future__ import annotations

from typing import Any

import torch

from porter.core.errors import UsageError
from runtime.config import PipelineConfig
from runtime.request import Req

from .base import PipelineStage, VerificationResult


class TimestepPreparationStage(PipelineStage):
    """Asks the scheduler for the request's timesteps."""

    def __init__(self, scheduler: Any, device: torch.device) -> None:
        self.scheduler, self.device = scheduler, device

    def forward(self, batch: Req, config: PipelineConfig) -> Req:
        batch.sigmas = config.prepare_sigmas(batch)
        mu = config.prepare_mu(batch)
        extra = {} if mu is None else {"mu": mu}
        given = (
            {"sigmas": batch.sigmas} if batch.sigmas is not None else {"num_inference_steps": batch.num_inference_steps}
        )
        try:
            self.scheduler.set_timesteps(**given, device=self.device, **extra)
        except OverflowError as error:
            raise UsageError(
                "height and width: the schedule's shift grows with the picture, and overflows at this size",
                found=f"{batch.height} x {batch.width} pixels, mu {mu}",
                hint="smaller --height and --width",
            ) from error
        self.scheduler.set_begin_index(0)  # otherwise the first step searches its place on the device
        batch.timesteps = self.scheduler.timesteps
        assert batch.timesteps is not None
        batch.tap(self.name, timesteps=batch.timesteps, sigmas=torch.as_tensor(self.scheduler.sigmas))
        return batch

    def verify_output(self, batch: Req, config: PipelineConfig) -> VerificationResult:
        result = VerificationResult()
        steps = batch.num_inference_steps
        falling = (
            batch.timesteps is not None and len(batch.timesteps) == steps and bool((batch.timesteps.diff() <= 0).all())
        )
        result.add_check("timesteps", batch.timesteps, falling, f"{steps} falling numbers")
        return result
