"""The schedule: sigmas and timesteps, shifted by the scheduler."""

from __future__ import annotations

import inspect
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
        given: dict[str, Any] = {} if mu is None else {"mu": mu}
        given |= (
            {"sigmas": batch.sigmas} if batch.sigmas is not None else {"num_inference_steps": batch.num_inference_steps}
        )
        try:
            self.scheduler.set_timesteps(**self._taken(given, batch), device=self.device)
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

    def _taken(self, given: dict[str, Any], batch: Req) -> dict[str, Any]:
        """What of the pipeline's schedule this scheduler takes; of another one than the model's own it may be less."""
        accepted = inspect.signature(self.scheduler.set_timesteps).parameters
        if odd := [name for name in given if name not in accepted]:
            batch.warn(f"{type(self.scheduler).__name__} has a schedule of its own: it takes no {' and no '.join(odd)}")
            kept = {name: value for name, value in given.items() if name in accepted}
            return kept if "sigmas" in kept else {**kept, "num_inference_steps": batch.num_inference_steps}
        return given

    def verify_output(self, batch: Req, config: PipelineConfig) -> VerificationResult:
        result = VerificationResult()
        steps = batch.num_inference_steps
        falling = batch.timesteps is not None and self._long_enough(batch) and bool((batch.timesteps.diff() <= 0).all())
        result.add_check("timesteps", batch.timesteps, falling, f"{steps} falling numbers")
        return result

    def _long_enough(self, batch: Req) -> bool:
        """Schedulers of the second order run the model more than once for a step."""
        count, steps = len(batch.timesteps), batch.num_inference_steps  # type: ignore[arg-type]
        return count == steps or (getattr(self.scheduler, "order", 1) > 1 and count > (steps or 0))
