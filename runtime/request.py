"""The request batch that travels through the stages of a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from porter.core.errors import UsageError

# tap(name, tensors): called after each stage ("text_encoding") and each step ("denoising.step.0").
Tap = Callable[[str, Mapping[str, Tensor]], None]


@dataclass
class Req:
    """What is asked for, and everything the stages add on the way. None is unset: 0 is a value.

    B = number of prompts x num_images. Image i of the batch uses seed + i, so that one image can be repeated alone.
    X: width of a token, T: tokens, (F, H, W): frames, height, width of the output.
    """

    # asked for
    prompt: str | list[str] | None = None
    negative_prompt: str | list[str] | None = None
    image: list[Image.Image] | None = None  # pictures to edit or to animate, the same for every prompt
    last_image: Image.Image | None = None  # where a video is to end
    mask_image: Image.Image | None = None  # white where a picture is to be painted anew
    seed: int | None = None
    height: int | None = None  # pixels
    width: int | None = None  # pixels
    num_frames: int | None = None  # of a video
    fps: int | None = None  # frames a second, of the file
    num_images: int = 1  # for each prompt
    num_inference_steps: int | None = None
    guidance_scale: float | None = None  # an input of the model, or classifier-free guidance, as the model has it
    guidance_scale_2: float | None = None  # for the second of two denoisers
    true_cfg_scale: float | None = None  # classifier-free guidance of models that also take guidance as an input
    max_sequence_length: int | None = None  # tokens of the encoders that allow a choice
    sigmas: list[float] | None = None  # noise levels before the scheduler's shift
    loras: list[tuple[str, float]] | None = None  # loaded ones with scales; None: the pipeline's own choice
    extra: dict[str, Any] = field(default_factory=dict)  # what only some models know; see SamplingParams

    # added by the stages, or given to skip them
    generator: list[torch.Generator] | None = None  # one for each image
    do_classifier_free_guidance: bool = False  # whether steps also run on the negative prompt; set by the validation
    prompt_embeds: list[Tensor] = field(default_factory=list)  # one for each encoder, (B, T, X)
    prompt_masks: list[Tensor | None] = field(default_factory=list)  # beside them: bool (B, T), None: all tokens count
    pooled_embeds: list[Tensor] = field(default_factory=list)  # one for each encoder that pools, (B, X)
    negative_prompt_embeds: list[Tensor] = field(default_factory=list)
    negative_prompt_masks: list[Tensor | None] = field(default_factory=list)
    negative_pooled_embeds: list[Tensor] = field(default_factory=list)
    image_embeds: list[Tensor] = field(default_factory=list)  # of the vision encoder, (B, T, X)
    image_latents: Tensor | None = None  # of the given pictures, as the model takes them
    timesteps: Tensor | None = None  # (num_inference_steps,)
    latents: Tensor | None = None  # noise, then the state of the loop, in the model's packing
    raw_latent_shape: tuple[int, ...] | None = None  # of the latents before packing, (B, C, h, w) or (B, C, f, h, w)
    output: Tensor | None = None  # (B, 3, H, W) or (B, 3, F, H, W) in [0, 1]

    warnings: list[str] = field(default_factory=list)  # what the user should know about this request
    taps: list[Tap] = field(default_factory=list)

    @property
    def prompts(self) -> list[str]:
        """The prompts as a list."""
        return [self.prompt] if isinstance(self.prompt, str) else list(self.prompt or [])

    @property
    def negative_prompts(self) -> list[str]:
        """A negative prompt for each prompt; empty texts where there is none."""
        given = self.negative_prompt if self.negative_prompt is not None else ""
        texts = [given] if isinstance(given, str) else list(given)
        return texts * len(self.prompts) if len(texts) == 1 else texts

    @property
    def batch_size(self) -> int:
        """Images in the batch; given embeddings count where there is no prompt."""
        if self.prompt is None and self.prompt_embeds:
            return self.prompt_embeds[0].shape[0]
        return len(self.prompts) * self.num_images

    def pictures(self) -> list[Image.Image]:
        """The results as pictures; of videos their frames, one video after the other.

        Raises:
            UsageError: nothing was made yet.
        """
        from runtime.image import to_pil

        if self.output is None:
            raise UsageError("this request has no output", expected="a request that a pipeline ran", found="a new one")
        flat = self.output if self.output.ndim == 4 else self.output.transpose(1, 2).flatten(0, 1)  # (B F, 3, H, W)
        return to_pil(flat)

    def tap(self, name: str, **tensors: Tensor) -> None:
        """Show every tap the tensors of one stage or step."""
        for tap in self.taps:
            tap(name, tensors)

    def warn(self, line: str) -> None:
        """Note what the user should know, once."""
        if line not in self.warnings:
            self.warnings.append(line)
