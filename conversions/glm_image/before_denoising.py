"""What GLM-Image does before its loop: prior tokens by an autoregressive model, glyph text, noise, schedule.

B: images, h, w: latent positions, S: image tokens, T: tokens of the glyph text, X: width of a text token.

Ported from https://github.com/huggingface/diffusers/blob/58eb52c0803ea9af3abec60841c2a093bdf1f951/src/diffusers/pipelines/glm_image/pipeline_glm_image.py.
Deviations:
- Each image has prior tokens of its own, sampled from its own seed, so that it can be repeated alone. diffusers samples
  all prompts of a batch from the first seed, and gives the images of one prompt the same tokens.
- Glyph texts of different length are masked; diffusers lets the model see their padding.
- torch's global generators are as before afterwards; diffusers leaves them seeded.
- Text to image only. A negative prompt is refused: the guidance leaves out the prior tokens and the glyph text.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from porter.core.errors import CheckFailed, UsageError
from runtime.attention import useful
from runtime.config import PipelineConfig
from runtime.loader import quiet_libraries
from runtime.memory import using
from runtime.request import Req
from runtime.stages import BeforeDenoisingStage, VerificationResult
from runtime.stages.text_encoding import module_device, module_dtype

IMAGE_PIXELS = 16  # of an image token's side: each prior token stands for 2 x 2
GLYPHS, PRIOR = 0, 1  # places in `Req.prompt_embeds`: (B, T, X), and (B, S, 1) whole numbers
_QUOTES = (r"'([^']*)'", r"“([^“”]*)”", r'"([^"]*)"', r"「([^「」]*)」")


class GlmImageBeforeDenoisingStage(BeforeDenoisingStage):
    """The autoregressive model writes prior tokens, the glyph encoder reads what is quoted; then noise and schedule."""

    def __init__(self, modules: Mapping[str, Any]) -> None:
        self.processor, self.tokenizer = modules["processor"], modules["tokenizer"]
        self.prior_encoder, self.glyph_encoder = modules["vision_language_encoder"], modules["text_encoder"]
        self.transformer, self.scheduler = modules["transformer"], modules["scheduler"]

    def verify_input(self, batch: Req, config: PipelineConfig) -> VerificationResult:
        result = VerificationResult()
        given = batch.prompt_embeds
        fits = len(given) == 2 if given else batch.prompt is not None
        result.add_check("prompt_embeds" if given else "prompt", given or batch.prompt, fits, "glyphs and prior tokens")
        nothing = "nothing: this model's guidance leaves the prior tokens and the glyph text out"
        result.add_check("negative_prompt", batch.negative_prompt, batch.negative_prompt is None, nothing)
        mark = self.processor.image_token
        for text in batch.prompts:
            result.add_check("prompt", text, mark not in text, f"no {mark}, which stands for a picture")
        count = len(batch.generator or [])
        result.add_check("generator", batch.generator, count == batch.batch_size, f"{batch.batch_size} generators")
        return result

    def forward(self, batch: Req, config: PipelineConfig) -> Req:
        device, dtype = module_device(self.transformer), module_dtype(self.transformer)
        if not batch.prompt_embeds:
            prior = self._prior_tokens(batch).to(device)  # (B, S)
            glyphs, mask = self._glyphs(batch.prompts, batch)
            batch.prompt_embeds, batch.prompt_masks = [glyphs.to(device, dtype), prior[..., None]], [mask, None]
        if batch.do_classifier_free_guidance and not batch.negative_prompt_embeds:
            glyphs, mask = self._glyphs(batch.negative_prompts or [""] * batch.batch_size, batch)
            batch.negative_prompt_embeds, batch.negative_prompt_masks = [glyphs.to(device, dtype)], [mask]
        batch.prompt_masks = batch.prompt_masks or [None, None]
        batch.negative_prompt_masks = batch.negative_prompt_masks or [None]
        self._noise(batch, config, device, dtype)
        self._schedule(batch, config, device)
        assert batch.latents is not None and batch.timesteps is not None
        negative = {f"negative_prompt_embeds.{i}": t for i, t in enumerate(batch.negative_prompt_embeds)}
        tensors = {f"prompt_embeds.{i}": t for i, t in enumerate(batch.prompt_embeds)} | negative
        batch.tap(self.name, **tensors, latents=batch.latents, timesteps=batch.timesteps, sigmas=self.scheduler.sigmas)
        return batch

    def verify_output(self, batch: Req, config: PipelineConfig) -> VerificationResult:
        result = super().verify_output(batch, config)
        assert batch.height is not None and batch.width is not None
        shape = (batch.batch_size, (batch.height // IMAGE_PIXELS) * (batch.width // IMAGE_PIXELS), 1)
        codebook = config.dit_config["prior_vq_quantizer_codebook_size"]
        prior = batch.prompt_embeds[PRIOR] if len(batch.prompt_embeds) > PRIOR else None
        fits = (
            prior is not None and prior.shape == shape and prior.dtype == torch.int64
            and bool(((prior >= 0) & (prior < codebook)).all())
        )  # fmt: skip
        expected = f"prior tokens of shape {shape}, whole numbers from 0 to {codebook - 1}"
        result.add_check(f"prompt_embeds[{PRIOR}]", prior, fits, expected)
        return result

    # https://github.com/huggingface/diffusers/blob/58eb52c0803ea9af3abec60841c2a093bdf1f951/src/diffusers/pipelines/glm_image/pipeline_glm_image.py#L321
    def _prior_tokens(self, batch: Req) -> Tensor:
        """One row of tokens for each image, in the image tokens' grid: (B, S)."""
        assert batch.generator is not None  # verified
        texts = [text for text in batch.prompts for _ in range(batch.num_images)]
        with quiet_libraries():
            rows = [
                self._sample(text, generator.initial_seed(), batch)
                for text, generator in zip(texts, batch.generator, strict=True)
            ]
        return torch.stack(rows)

    def _sample(self, text: str, seed: int, batch: Req) -> Tensor:
        """A small picture's tokens, which are left away, then the picture's own, each for 2 x 2 image tokens: (S,)."""
        device = module_device(self.prior_encoder)
        inputs = self.processor.apply_chat_template(
            [[{"role": "user", "content": [{"type": "text", "text": text}]}]], tokenize=True, padding=False,
            target_h=batch.height, target_w=batch.width, return_dict=True, return_tensors="pt",
        ).to(device)  # fmt: skip
        (_, rows, columns), (_, *small) = inputs["image_grid_thw"].tolist()
        before, count = small[0] * small[1], rows * columns
        length = inputs["input_ids"].shape[1]
        limit = self.prior_encoder.config.text_config.max_position_embeddings
        if length + before + count > limit:
            batch.warn(
                f"vision_language_encoder was made for {limit} tokens, and the prompt and its picture take"
                f" {length + before + count}: {text[:40]!r}..."
            )
        with seeded(seed, device), using(self.prior_encoder):
            written = self.prior_encoder.generate(
                **inputs, max_new_tokens=before + count + 1, do_sample=True, return_dict_in_generate=False
            )
        tokens = written[0, length + before :][:count]
        codebook = self.transformer.params.prior_vq_quantizer_codebook_size
        if len(tokens) < count or bool((tokens >= codebook).any()):
            raise CheckFailed(
                "the autoregressive model wrote no picture",
                expected=f"{count} tokens below {codebook}",
                found=f"{len(tokens)} tokens, {int((tokens >= codebook).sum())} of them from {codebook} on",
                hint="another --seed",
            )
        grid: Tensor = tokens.view(rows, columns)
        return grid.repeat_interleave(2, dim=0).repeat_interleave(2, dim=1).flatten()

    # https://github.com/huggingface/diffusers/blob/58eb52c0803ea9af3abec60841c2a093bdf1f951/src/diffusers/pipelines/glm_image/pipeline_glm_image.py#L491
    def _glyphs(self, prompts: list[str], batch: Req) -> tuple[Tensor, Tensor | None]:
        """What is quoted in each prompt, read by the glyph encoder: (B, T, X), bool (B, T) where lengths differ.

        Padding stands in front, as in diffusers.
        """
        rows = [self._glyph_row(prompt, batch) for prompt in prompts]
        longest = max(len(row) for row in rows)
        glyphs = torch.stack([nn.functional.pad(row, (0, 0, longest - len(row), 0)) for row in rows])
        lengths = torch.tensor([len(row) for row in rows], device=glyphs.device)
        mask = torch.arange(longest, device=glyphs.device) >= longest - lengths[:, None]
        each = batch.batch_size // len(prompts)
        glyphs, mask = glyphs.repeat_interleave(each, dim=0), mask.repeat_interleave(each, dim=0)
        return glyphs, useful(mask)

    def _glyph_row(self, prompt: str, batch: Req) -> Tensor:
        """One prompt's quoted texts, encoded beside each other and joined: (T, X)."""
        texts = [text for quotes in _QUOTES for text in re.findall(quotes, prompt)] or [""]
        limit, pad = batch.max_sequence_length, self.tokenizer.pad_token_id
        ids = self.tokenizer(texts, max_length=limit, truncation=True).input_ids
        for text in texts:
            count = len(self.tokenizer(text, truncation=True, max_length=1 << 20).input_ids)
            if limit is not None and count > limit:
                batch.warn(f"text_encoder reads {limit} of the {count} tokens that are quoted: {text[:40]!r}...")
        # A token of padding that counts as text stands before each of an even number of texts.
        ids = [[pad] * ((len(ids) + 1) % 2) + row for row in ids]
        longest = max(len(row) for row in ids)
        device = module_device(self.glyph_encoder)
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids], device=device)
        padded = torch.tensor([row + [pad] * (longest - len(row)) for row in ids], device=device)
        found: Tensor = self.glyph_encoder(padded, attention_mask=mask).last_hidden_state  # (texts, longest, X)
        return found[mask.bool()]

    def _noise(self, batch: Req, config: PipelineConfig, device: torch.device, dtype: torch.dtype) -> None:
        """Drawn in the model's dtype, then held in float32 through the loop."""
        batch.raw_latent_shape = config.prepare_latent_shape(batch)  # (B, C, h, w)
        if batch.latents is None:
            assert batch.generator is not None  # verified
            shape = (1, *batch.raw_latent_shape[1:])
            noise = [torch.randn(shape, generator=g, device=g.device, dtype=dtype).to(device) for g in batch.generator]
            batch.latents = torch.cat(noise)
        batch.latents = batch.latents.to(device).float()

    def _schedule(self, batch: Req, config: PipelineConfig, device: torch.device) -> None:
        """Timesteps and sigmas are both given to the scheduler.

        Raises:
            UsageError: it takes none, or its shift overflows at this size.
        """
        if not {"timesteps", "sigmas", "mu"} <= inspect.signature(self.scheduler.set_timesteps).parameters.keys():
            raise UsageError(
                "this model gives its scheduler timesteps and sigmas", expected="FlowMatchEulerDiscreteScheduler",
                found=type(self.scheduler).__name__, hint="leave the scheduler as the model has it",
            )  # fmt: skip
        batch.sigmas, mu = config.prepare_sigmas(batch), config.prepare_mu(batch)
        given = {"timesteps": timesteps(batch, config), "sigmas": batch.sigmas}
        try:
            self.scheduler.set_timesteps(**given, device=device, mu=mu)
        except OverflowError as error:
            raise UsageError(
                "height and width: the schedule's shift grows with the picture, and overflows at this size",
                found=f"{batch.height} x {batch.width} pixels, mu {mu}", hint="smaller --height and --width",
            ) from error  # fmt: skip
        self.scheduler.set_begin_index(0)  # otherwise the first step searches its place on the device
        batch.timesteps = self.scheduler.timesteps


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """torch's global generators start from `seed`, for a library that takes no generator; restored afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


# https://github.com/huggingface/diffusers/blob/58eb52c0803ea9af3abec60841c2a093bdf1f951/src/diffusers/pipelines/glm_image/pipeline_glm_image.py#L962
def timesteps(batch: Req, config: PipelineConfig) -> list[float]:
    """From 1000 down in even steps, cut to whole numbers. The scheduler shifts the sigmas, and leaves these."""
    assert batch.num_inference_steps is not None
    steps = np.linspace(config.scheduler_config.get("num_train_timesteps", 1000), 1.0, batch.num_inference_steps + 1)
    return [float(t) for t in steps[:-1].astype(np.int64)]
