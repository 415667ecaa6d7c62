"""Fill what the request leaves unset, and refuse what cannot be made."""

from __future__ import annotations

import math

import torch
from PIL import Image

from runtime.config import PipelineConfig, SamplingParams
from runtime.request import Req

from .base import PipelineStage, VerificationResult

MAX_SEED = 2**63 - 1
MAX_IMAGES = 2**20
MAX_SIDE = 2**14  # pixels
MAX_SCALE = 10_000
MAX_FRAMES = 2**16


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
        for name in ("guidance_scale", "guidance_scale_2", "true_cfg_scale"):
            value = getattr(batch, name)
            if value is not None:
                result.add_check(name, value, 0 <= value <= MAX_SCALE, f"a number from 0 to {MAX_SCALE}")
        if negative is not None:
            scale = getattr(batch, config.cfg_field)
            scale = getattr(self.sampling_params, config.cfg_field) if scale is None else scale
            used = scale is not None and scale > config.cfg_none
            expected = f"above {config.cfg_none:g}, or the negative prompt does nothing"
            result.add_check(config.cfg_field, scale, used, expected)
            lengths = isinstance(negative, str) or len(negative) in (1, len(batch.prompts))
            result.add_check("negative_prompt", negative, lengths, "one text, or one for each prompt")
        if batch.sigmas is not None and batch.num_inference_steps is not None:
            result.add_check(
                "sigmas", batch.sigmas, len(batch.sigmas) == batch.num_inference_steps, "one for each step"
            )
        self._verify_media(batch, config, result)
        for check in config.verify_request(batch):
            result.add_check(*check)
        multiple = config.size_multiple()
        for name in ("height", "width"):
            value = getattr(batch, name)
            if value is not None:
                below = min(max(multiple, int(value) // multiple * multiple), MAX_SIDE - multiple)
                expected = f"a multiple of {multiple} up to {MAX_SIDE}, such as {below} or {below + multiple}"
                result.add_check(name, value, _whole(1, MAX_SIDE)(value) and value % multiple == 0, expected)
        return result

    def _verify_media(self, batch: Req, config: PipelineConfig, result: VerificationResult) -> None:
        """Pictures and frames: what the task takes, and nothing that it would ignore."""
        low, high = config.images()
        count, pictures = len(batch.image or []), isinstance(batch.image, list | None)
        all_pictures = pictures and all(isinstance(each, Image.Image) for each in batch.image or [])
        number = f"{low} or more" if high is None else f"{low}" if low == high else f"{low} to {high}"
        words = f"{number} pictures"
        result.add_check("image", batch.image, all_pictures and low <= count and (high is None or count <= high), words)
        for name, wanted in (("mask_image", config.takes_mask), ("last_image", config.takes_last_image)):
            value = getattr(batch, name)
            fits = value is None or (wanted and isinstance(value, Image.Image))
            result.add_check(name, value, fits, "a picture" if wanted else "nothing: this model does not take it")
        frames, factor = batch.num_frames, config.vae_temporal_factor()
        if frames is not None:
            expected = f"1, or one more than a multiple of {factor}" if config.task_type.video else "nothing: no video"
            fits = config.task_type.video and _whole(1, MAX_FRAMES)(frames) and (frames - 1) % factor == 0
            result.add_check("num_frames", frames, fits, expected)
        settings = self.sampling_params.extra
        for name, value in batch.extra.items():
            expected = f"one of the settings {', '.join(sorted(settings))}" if settings else "no further settings"
            result.add_check(name, value, name in settings, expected)

    def forward(self, batch: Req, config: PipelineConfig) -> Req:
        if batch.sigmas is not None and batch.num_inference_steps is None:
            batch.num_inference_steps = len(batch.sigmas)
        used = {config.cfg_field, *(["guidance_scale"] if config.should_use_guidance else []), *config.further_scales}
        for name in ("guidance_scale", "guidance_scale_2", "true_cfg_scale"):
            value = getattr(batch, name)
            if value is not None and name not in used:
                batch.warn(f"{name} {value:g} is ignored: this model does not take it")
        asked = getattr(batch, config.cfg_field)
        self.sampling_params.fill(batch)
        batch.do_classifier_free_guidance = config.guides(batch)
        if asked is not None and asked > config.cfg_none and not batch.do_classifier_free_guidance:
            batch.warn(f"{config.cfg_field} {asked:g} is ignored: there is no negative prompt")
        if batch.height is None or batch.width is None:  # a model need not say, where the request does
            height, width = config.default_size(batch)
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
