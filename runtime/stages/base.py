"""The contract of a stage: verify what comes in, do one thing, verify what goes out."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch

from porter.core.errors import UsageError
from runtime.config import PipelineConfig
from runtime.request import Req


class VerificationResult:
    """Collects the fields of a request that are not what a stage needs."""

    def __init__(self) -> None:
        self.failures: list[tuple[str, str, str]] = []

    def add_check(self, field: str, value: Any, holds: Callable[[Any], bool] | bool, expected: str) -> None:
        """Note `field` as wrong unless `holds`; `expected` says in words what it should be."""
        if not (holds(value) if callable(holds) else holds):
            self.failures.append((field, expected, _short(value)))


def _short(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


class PipelineStage(ABC):
    """One step of a pipeline. Modules come through the constructor, everything else through the request."""

    given_name: str | None = None  # by the pipeline that it is a stage of

    @property
    def name(self) -> str:
        """The stage's name in taps: `TextEncodingStage` is "text_encoding", unless its pipeline calls it otherwise."""
        words = r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])"  # "ImageVAEEncoding": three of them
        return self.given_name or re.sub(words, "_", type(self).__name__.removesuffix("Stage")).lower()

    @abstractmethod
    def forward(self, batch: Req, config: PipelineConfig) -> Req:
        """Do the stage's one job on `batch` and return it."""

    def verify_input(self, batch: Req, config: PipelineConfig) -> VerificationResult:
        """Fields that the stage reads."""
        return VerificationResult()

    def verify_output(self, batch: Req, config: PipelineConfig) -> VerificationResult:
        """Fields that the stage wrote."""
        return VerificationResult()

    def __call__(self, batch: Req, config: PipelineConfig) -> Req:
        """Verify, run, verify.

        Raises:
            UsageError: a field is not what the stage needs, or not what it promises; named with both.
        """
        self.check_input(batch, config)
        batch = self.forward(batch, config)
        self._demand(self.verify_output(batch, config), "must leave")
        return batch

    def check_input(self, batch: Req, config: PipelineConfig) -> None:
        """Verify without running. Raises UsageError as `__call__` does."""
        self._demand(self.verify_input(batch, config), "needs")

    def _demand(self, result: VerificationResult, verb: str) -> None:
        if not result.failures:
            return
        raise UsageError(
            f"{', '.join(field for field, _, _ in result.failures)}: not what {type(self).__name__} {verb}",
            expected="; ".join(f"{field}: {expected}" for field, expected, _ in result.failures),
            found="; ".join(f"{field}: {found}" for field, _, found in result.failures),
            hint="porter generate --help",
        )


class BeforeDenoisingStage(PipelineStage):
    """Base of a Hybrid pipeline's one model-specific stage: all that stands between the request and the loop.

    It leaves what `DenoisingStage` and `DecodingStage` need: prompt embeddings, timesteps, noise and its raw shape.
    """

    given_name = "before_denoising"

    def verify_output(self, batch: Req, config: PipelineConfig) -> VerificationResult:
        result = VerificationResult()
        size = batch.batch_size
        embeds = tensors_of_batch(size, 3)
        result.add_check("prompt_embeds", batch.prompt_embeds, embeds, "finite tensors, one row for each image")
        result.add_check("timesteps", batch.timesteps, isinstance(batch.timesteps, torch.Tensor), "a tensor")
        rows = None if batch.latents is None else batch.latents.shape[0]
        result.add_check("latents", batch.latents, rows == size, f"{size} rows of noise")
        result.add_check("raw_latent_shape", batch.raw_latent_shape, batch.raw_latent_shape is not None, "a shape")
        return result


def tensors_of_batch(size: int, ndim: int) -> Callable[[Any], bool]:
    """A check: a non-empty list of finite tensors with `ndim` axes, the first of length `size`."""

    def holds(value: Any) -> bool:
        return bool(value) and all(
            isinstance(t, torch.Tensor) and t.ndim == ndim and t.shape[0] == size and bool(t.isfinite().all())
            for t in value
        )

    return holds
