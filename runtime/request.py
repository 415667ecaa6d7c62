"""The request batch that travels through the stages of a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

# tap(name, tensors): called after each stage ("text_encoding") and each step ("denoising.step.0").
Tap = Callable[[str, Mapping[str, Tensor]], None]


@dataclass
class Req:
    """What is asked for, and everything the stages add on the way. None is unset: 0 is a value.

    B = number of prompts x num_images. Image i of the batch uses seed + i, so that one image can be repeated alone.
    """

    # asked for
    prompt: str | list[str] | None = None
    negative_prompt: str | list[str] | None = None
    seed: int | None = None
    height: int | None = None  # pixels
    width: int | None = None  # pixels
    num_images: int = 1  # for each prompt
    num_inference_steps: int | None = None
    guidance_scale: float | None = None  # for models that take guidance as an input
    true_cfg_scale: float | None = None  # classifier-free guidance with two passes a step
    max_sequence_length: int | None = None  # tokens of the encoders that allow a choice
    sigmas: list[float] | None = None  # noise levels before the scheduler's shift

    # added by the stages, or given to skip them
    generator: list[torch.Generator] | None = None  # one for each image
    prompt_embeds: list[Tensor] = field(default_factory=list)  # one for each encoder, (B, T, X)
    pooled_embeds: list[Tensor] = field(default_factory=list)  # one for each encoder that pools, (B, P)
    negative_prompt_embeds: list[Tensor] = field(default_factory=list)
    negative_pooled_embeds: list[Tensor] = field(default_factory=list)
    timesteps: Tensor | None = None  # (num_inference_steps,)
    latents: Tensor | None = None  # noise, then the state of the loop, in the model's packing
    raw_latent_shape: tuple[int, ...] | None = None  # of the latents before packing, (B, C, H / f, W / f)
    output: Tensor | None = None  # (B, 3, H, W) in [0, 1]

    warnings: list[str] = field(default_factory=list)  # what the user should know about this request
    taps: list[Tap] = field(default_factory=list)

    @property
    def prompts(self) -> list[str]:
        """The prompts as a list."""
        return [self.prompt] if isinstance(self.prompt, str) else list(self.prompt or [])

    @property
    def batch_size(self) -> int:
        """Images in the batch; given embeddings count where there is no prompt."""
        if self.prompt is None and self.prompt_embeds:
            return self.prompt_embeds[0].shape[0]
        return len(self.prompts) * self.num_images

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether each step also runs on the negative prompt."""
        negative = self.negative_prompt is not None or bool(self.negative_prompt_embeds)
        return negative and self.true_cfg_scale is not None and self.true_cfg_scale > 1

    def tap(self, name: str, **tensors: Tensor) -> None:
        """Show every tap the tensors of one stage or step."""
        for tap in self.taps:
            tap(name, tensors)
