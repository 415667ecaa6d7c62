"""Fill what the request leaves unset, and refuse what cannot be made."""

from __future__ import annotations

import math

import torch

from runtime.config import PipelineConfig, SamplingParams
from runtime.request import Req

from .base import PipelineStage, VerificationResult

MAX_SEED = 2**63 - 1
MAX_IMAGES = 2**20
MAX_SIDE = 2**14  # pixels
MAX_SCALE = 10_000


class InputValidationStage(PipelineStage):
    """The first stage: defaults, sizes, and one random generator for each image."""

    def __init__(self, sampling_params: SamplingParams) -> None:
        self.sampling_params = sampling_params

    def verify_input(self, batch: Req, config: PipelineConfig) -> VerificationResult:
        result = VerificationResult()
        prompt, negative = batch.prompt, batch.negative_prompt
        several = isinstance(prompt, list | tuple) and bool(prompt) and all(isinstance(p, str) for p in prompt)
        words = isinstance(prompt, str) or several
        result.add_check(
            "prompt", prompt, words or (prompt is None and bool(batch.prompt_embeds)), "text (may be empty)"
        )
        images = _whole(1, MAX_IMAGES)
        result.add_check("num_images", batch.num_images, images, f"a whole number from 1 to {MAX_IMAGES}")
        if batch.num_inference_steps is not None:
            result.add_check("num_inference_steps", batch.num_inference_steps, _whole(1), "a whole number from 1")
        if batch.seed is not None:
            last = MAX_SEED - MAX_IMAGES  # image i adds i
            result.add_check("seed", batch.seed, _whole(0, last), f"a whole number from 0 to {last}")
        if batch.max_sequence_length is not None:
            result.add_check("max_sequence_length", batch.max_sequence_length, _whole(1), "a whole number from 1")
        for name in ("guidance_scale", "true_cfg_scale"):
            value = getattr(batch, name)
            if value is not None:
                result.add_check(name, value, 0 <= value <= MAX_SCALE, f"a number from 0 to {MAX_SCALE}")
        if negative is not None:
            used = batch.true_cfg_scale is not None and batch.true_cfg_scale > 1
            result.add_check(
                "true_cfg_scale", batch.true_cfg_scale, used, "above 1, or the negative prompt does nothing"
            )
            lengths = isinstance(negative, str) or len(negative) in (1, len(batch.prompts))
            result.add_check("negative_prompt", negative, lengths, "one text, or one for each prompt")
        if batch.sigmas is not None and batch.num_inference_steps is not None:
            result.add_check(
                "sigmas", batch.sigmas, len(batch.sigmas) == batch.num_inference_steps, "one for each step"
            )
        multiple = config.size_multiple()
        for name in ("height", "width"):
            value = getattr(batch, name)
            if value is not None:
                below = min(max(multiple, int(value) // multiple * multiple), MAX_SIDE - multiple)
                expected = f"a multiple of {multiple} up to {MAX_SIDE}, such as {below} or {below + multiple}"
                result.add_check(name, value, _whole(1, MAX_SIDE)(value) and value % multiple == 0, expected)
        return result

    def forward(self, batch: Req, config: PipelineConfig) -> Req:
        if batch.sigmas is not None and batch.num_inference_steps is None:
            batch.num_inference_steps = len(batch.sigmas)
        if batch.guidance_scale is not None and not config.should_use_guidance:
            batch.warnings.append(f"guidance_scale {batch.guidance_scale:g} is ignored: this model takes no guidance")
        if batch.true_cfg_scale is not None and batch.true_cfg_scale > 1 and not batch.do_classifier_free_guidance:
            batch.warnings.append(f"true_cfg_scale {batch.true_cfg_scale:g} is ignored: there is no negative prompt")
        self.sampling_params.fill(batch)
        if batch.height is None or batch.width is None:  # a model need not say, where the request does
            height, width = config.default_size()
            batch.height = height if batch.height is None else batch.height
            batch.width = width if batch.width is None else batch.width
        if batch.generator is None:
            assert batch.seed is not None  # filled above
            # On the CPU whatever the device, so that a seed means the same noise everywhere.
            batch.generator = [torch.Generator("cpu").manual_seed(batch.seed + i) for i in range(batch.batch_size)]
        return batch

    def verify_output(self, batch: Req, config: PipelineConfig) -> VerificationResult:
        result = VerificationResult()
        for name in ("height", "width", "num_inference_steps"):
            result.add_check(name, getattr(batch, name), _whole(1), "a whole number from 1")
        if config.should_use_guidance:
            result.add_check("guidance_scale", batch.guidance_scale, batch.guidance_scale is not None, "a number")
        count = len(batch.generator or [])
        result.add_check("generator", batch.generator, count == batch.batch_size, f"{batch.batch_size} generators")
        return result


class _whole:
    """A check: a whole number from `low` to `high`."""

    def __init__(self, low: int, high: float = math.inf) -> None:
        self.low, self.high = low, high

    def __call__(self, value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and self.low <= value <= self.high
