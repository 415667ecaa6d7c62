"""Prompts to embeddings, through any number of text encoders.  B: images, T: tokens, X: width, P: pooled width."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from runtime.config import PipelineConfig, TextEncoderSpec
from runtime.memory import device_of, using
from runtime.request import Req

from .base import PipelineStage, VerificationResult, tensors_of_batch


@dataclass
class TextEmbeddings:
    """What the encoders made, a prompt per row and an entry per encoder; masks are None where all tokens count."""

    tokens: list[Tensor]  # (prompts, T, X)
    pooled: list[Tensor] = field(default_factory=list)  # (prompts, P)
    masks: list[Tensor | None] = field(default_factory=list)  # bool (prompts, T)


class TextEncodingStage(PipelineStage):
    """Runs each encoder of `config.text_encoders`; a request that brings its embeddings passes through.

    A family whose prompts take more than that (a template, hidden states of an inner layer) overrides `encode`.
    """

    def __init__(self, encoders: Mapping[str, Any], tokenizers: Mapping[str, Any]) -> None:
        self.encoders, self.tokenizers = encoders, tokenizers

    def verify_input(self, batch: Req, config: PipelineConfig) -> VerificationResult:
        result = VerificationResult()
        given = batch.prompt is not None or bool(batch.prompt_embeds)
        result.add_check("prompt", batch.prompt, given, "text, or prompt_embeds")
        pooled = sum(spec.pooled for spec in config.text_encoders)
        if batch.prompt_embeds:
            result.add_check(
                "pooled_embeds", batch.pooled_embeds, len(batch.pooled_embeds) == pooled, f"{pooled} tensors"
            )
        return result

    def forward(self, batch: Req, config: PipelineConfig) -> Req:
        # The only encoder stays for both prompts; of several each has the device for itself.
        with using(*(self.encoders.values() if len(self.encoders) == 1 else ())):
            self._embed(batch, config)
        for side in ("", "negative_"):  # embeddings that were given may come without masks
            masks, tokens = getattr(batch, f"{side}prompt_masks"), getattr(batch, f"{side}prompt_embeds")
            setattr(batch, f"{side}prompt_masks", masks or [None] * len(tokens))
        names = ("prompt_embeds", "pooled_embeds", "negative_prompt_embeds", "negative_pooled_embeds")
        batch.tap(self.name, **{f"{name}.{i}": t for name in names for i, t in enumerate(getattr(batch, name))})
        return batch

    def _embed(self, batch: Req, config: PipelineConfig) -> None:
        """Add the embeddings that the request lacks."""
        if not batch.prompt_embeds:
            found = _for_images(self.encode(batch.prompts, batch, config), batch.num_images)
            batch.prompt_embeds, batch.pooled_embeds, batch.prompt_masks = found.tokens, found.pooled, found.masks
        if batch.do_classifier_free_guidance and not batch.negative_prompt_embeds:
            found = _for_images(self.encode(batch.negative_prompts, batch, config), batch.num_images)
            batch.negative_prompt_embeds, batch.negative_pooled_embeds = found.tokens, found.pooled
            batch.negative_prompt_masks = found.masks

    def encode(self, texts: list[str], batch: Req, config: PipelineConfig) -> TextEmbeddings:
        """One row for each of `texts`."""
        found = TextEmbeddings([])
        for spec in config.text_encoders:
            encoder = self.encoders[spec.encoder]
            ids = self.tokenize(texts, spec, batch)  # (prompts, T)
            out = encoder(ids.to(module_device(encoder)), output_hidden_states=False)
            found.tokens.append(out.last_hidden_state.to(encoder.dtype))  # (prompts, T, X)
            if spec.pooled:
                found.pooled.append(out.pooler_output.to(encoder.dtype))  # (prompts, P)
        return found

    def tokenize(self, texts: Sequence[str], spec: TextEncoderSpec, batch: Req) -> Tensor:
        """Token ids padded to the encoder's length; what does not fit is dropped with a warning."""
        tokenizer = self.tokenizers[spec.tokenizer]
        # Some tokenizers say no length, or an absurd one; the encoder's positions are the limit then.
        positions = getattr(self.encoders[spec.encoder].config, "max_position_embeddings", None)
        length = int(min(tokenizer.model_max_length, positions or math.inf))
        if spec.max_length is not None:
            length = min(length, spec.max_length, batch.max_sequence_length or length)
        ids: Tensor = tokenizer(
            list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids
        for text in texts:
            count = len(tokenizer(text, truncation=True, max_length=1 << 20).input_ids)
            if count > length:
                batch.warn(f"{spec.encoder} reads {length} of the prompt's {count} tokens: {text[:40]!r}...")
        return ids

    def verify_output(self, batch: Req, config: PipelineConfig) -> VerificationResult:
        result = VerificationResult()
        size, finite = batch.batch_size, "finite tensors, one row for each image"
        result.add_check("prompt_embeds", batch.prompt_embeds, tensors_of_batch(size, 3), finite)
        if any(spec.pooled for spec in config.text_encoders):
            result.add_check("pooled_embeds", batch.pooled_embeds, tensors_of_batch(size, 2), finite)
        if batch.do_classifier_free_guidance:
            negative = batch.negative_prompt_embeds
            result.add_check("negative_prompt_embeds", negative, tensors_of_batch(size, 3), finite)
        return result


def _for_images(found: TextEmbeddings, count: int) -> TextEmbeddings:
    """Each prompt's row `count` times, side by side: (B, …)."""

    def more(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.repeat_interleave(count, dim=0)

    masks = [more(t) for t in found.masks] or [None] * len(found.tokens)
    tokens, pooled = ([t.repeat_interleave(count, dim=0) for t in part] for part in (found.tokens, found.pooled))
    return TextEmbeddings(tokens, pooled, masks)


def module_dtype(module: torch.nn.Module) -> torch.dtype:
    """dtype that a module computes in: what it says itself, where some of its parameters keep another; else that of its
    first parameter that is not stored in 8 bits."""
    said = getattr(module, "dtype", None)
    kinds = (p.dtype for p in module.parameters() if p.dtype.itemsize > 1)
    return said if isinstance(said, torch.dtype) else next(kinds)


def module_device(module: torch.nn.Module) -> torch.device:
    """Device that a module runs on, wherever its weights are meanwhile."""
    return device_of(module)
