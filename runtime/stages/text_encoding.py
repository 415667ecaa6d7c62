"""Prompts to embeddings, through any number of text encoders.  B: images, T: tokens, X: width, P: pooled width."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from runtime.config import PipelineConfig, TextEncoderSpec
from runtime.request import Req

from .base import PipelineStage, VerificationResult, tensors_of_batch


class TextEncodingStage(PipelineStage):
    """Runs each encoder of `config.text_encoders`; a request that brings its embeddings passes through."""

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
        if not batch.prompt_embeds:
            batch.prompt_embeds, batch.pooled_embeds = self._encode(batch.prompts, batch, config)
        if batch.do_classifier_free_guidance and not batch.negative_prompt_embeds:
            negative = batch.negative_prompt
            texts = [negative] if isinstance(negative, str) else list(negative or [])
            texts = texts * len(batch.prompts) if len(texts) == 1 else texts
            encoded = self._encode(texts, batch, config)
            batch.negative_prompt_embeds, batch.negative_pooled_embeds = encoded
        tensors = {f"prompt_embeds.{i}": t for i, t in enumerate(batch.prompt_embeds)}
        tensors |= {f"pooled_embeds.{i}": t for i, t in enumerate(batch.pooled_embeds)}
        tensors |= {f"negative_prompt_embeds.{i}": t for i, t in enumerate(batch.negative_prompt_embeds)}
        tensors |= {f"negative_pooled_embeds.{i}": t for i, t in enumerate(batch.negative_pooled_embeds)}
        batch.tap(self.name, **tensors)
        return batch

    def _encode(self, texts: list[str], batch: Req, config: PipelineConfig) -> tuple[list[Tensor], list[Tensor]]:
        tokens, pooled = [], []
        for spec in config.text_encoders:
            encoder = self.encoders[spec.encoder]
            ids = self._tokenize(texts, spec, batch)  # (prompts, T)
            out = encoder(ids.to(encoder.device), output_hidden_states=False)
            tokens.append(out.last_hidden_state.to(encoder.dtype))  # (prompts, T, X)
            if spec.pooled:
                pooled.append(out.pooler_output.to(encoder.dtype))  # (prompts, P)
        # Each prompt's images stand together: (B, …).
        tokens, pooled = ([t.repeat_interleave(batch.num_images, dim=0) for t in part] for part in (tokens, pooled))
        return tokens, pooled

    def _tokenize(self, texts: Sequence[str], spec: TextEncoderSpec, batch: Req) -> Tensor:
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
                batch.warnings.append(f"{spec.encoder} reads {length} of the prompt's {count} tokens: {text[:40]!r}...")
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


def module_dtype(module: torch.nn.Module) -> torch.dtype:
    """dtype of a module's first parameter."""
    return next(module.parameters()).dtype


def module_device(module: torch.nn.Module) -> torch.device:
    """Device of a module's first parameter."""
    return next(module.parameters()).device
