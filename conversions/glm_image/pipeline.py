"""GLM-Image's pipeline on the native runtime, in the Hybrid style: one stage of its own before the standard loop.

B: images, S: image tokens, T: tokens of the glyph text, X: width of a text token.

The order of operations is that of diffusers' GlmImagePipeline, the code that the model was released with; deviations
stand in before_denoising.py. Here: latents are denormalised in float32 before they take the autoencoder's dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from conversions.glm_image.before_denoising import (
    GLYPHS,
    IMAGE_PIXELS,
    PRIOR,
    GlmImageBeforeDenoisingStage,
    timesteps,
)
from conversions.glm_image.model import GlmImageTransformer, Table
from porter.core.errors import BadInputError
from runtime.config import PipelineConfig, SamplingParams
from runtime.pipeline import ComposedPipelineBase
from runtime.registry import register_configs, register_pipeline
from runtime.request import Req
from runtime.stages import InputValidationStage

PRIOR_PIXELS = 32  # of a prior token's side, fixed in transformers' processor
_AGAIN = "convert the model again: porter convert <model> -o <port> --overwrite"


@dataclass(frozen=True)
class GlmImageSamplingParams(SamplingParams):
    num_inference_steps: int = 50
    guidance_scale: float | None = 1.5
    max_sequence_length: int | None = 2048  # of each glyph text


@dataclass
class GlmImagePipelineConfig(PipelineConfig):
    cfg_field: str = "guidance_scale"
    cfg_without_negative: bool = True

    def size_multiple(self) -> int:
        """A prior token's side, which image tokens must fit.

        Raises:
            BadInputError: an image token has another side.
        """
        side = self.vae_scale_factor() * int(self.dit_config["patch_size"])
        if side != IMAGE_PIXELS:
            raise BadInputError(
                "the transformer's patches and the autoencoder do not fit the prior tokens",
                expected=f"image tokens of {IMAGE_PIXELS} pixels a side: patch_size x the autoencoder's scale",
                found=f"{self.dit_config['patch_size']} x {self.vae_scale_factor()}",
                hint=_AGAIN,
            )
        return PRIOR_PIXELS

    # https://github.com/huggingface/diffusers/blob/58eb52c0803ea9af3abec60841c2a093bdf1f951/src/diffusers/pipelines/glm_image/pipeline_glm_image.py#L68
    def prepare_mu(self, batch: Req) -> float | None:
        """Grows with the root of the number of image tokens."""
        assert batch.height is not None and batch.width is not None
        known, tokens = self.scheduler_config, (batch.height // IMAGE_PIXELS) * (batch.width // IMAGE_PIXELS)
        root = (tokens / known.get("base_image_seq_len", 256)) ** 0.5
        return float(root * known.get("max_shift", 0.75) + known.get("base_shift", 0.25))

    def prepare_sigmas(self, batch: Req) -> list[float]:
        """The timesteps as parts of the whole."""
        if batch.sigmas is not None:
            return batch.sigmas
        whole = self.scheduler_config.get("num_train_timesteps", 1000)
        return [float(t) for t in np.array(timesteps(batch, self), dtype=np.float32) / whole]

    def get_freqs_cis(self, batch: Req, transformer: nn.Module, device: torch.device) -> Table:
        assert isinstance(transformer, GlmImageTransformer) and batch.raw_latent_shape is not None
        height, width = batch.raw_latent_shape[-2:]
        return transformer.rotary(height, width, device)

    def prepare_pos_cond_kwargs(self, batch: Req, freqs_cis: Any, device: torch.device) -> dict[str, Any]:
        return self._conditions(batch, batch.prompt_embeds, batch.prompt_masks, freqs_cis, drop=False)

    def prepare_neg_cond_kwargs(self, batch: Req, freqs_cis: Any, device: torch.device) -> dict[str, Any]:
        return self._conditions(batch, batch.negative_prompt_embeds, batch.negative_prompt_masks, freqs_cis, drop=True)

    def _conditions(
        self, batch: Req, embeds: list[Tensor], masks: list[Tensor | None], table: Table, *, drop: bool
    ) -> dict[str, Any]:
        glyphs, prior = embeds[GLYPHS], batch.prompt_embeds[PRIOR].squeeze(-1)  # (B, T, X), (B, S)
        size = glyphs.new_tensor([[batch.height, batch.width]])
        return {
            "encoder_hidden_states": glyphs,
            "attention_mask": masks[GLYPHS],
            "prior_token_id": prior,
            "prior_token_drop": torch.full_like(prior, drop, dtype=torch.bool),
            "target_size": size.expand(len(glyphs), -1),
            "crop_coords": torch.zeros_like(size).expand(len(glyphs), -1),
            "rotary": table,
        }

    def scale_timestep(self, timestep: Tensor, batch: Req) -> Tensor:
        """The model counts from 999 to 0."""
        return timestep - 1

    def post_model(self, noise_pred: Tensor, batch: Req) -> Tensor:
        """Guidance and the loop's state are float32, whatever the model's dtype."""
        return noise_pred.float()

    def get_decode_scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """Each latent channel has its own.

        Raises:
            BadInputError: the autoencoder's config does not name them.
        """
        channels, found = self.vae_config["latent_channels"], []
        for name in ("latents_std", "latents_mean"):
            values = self.vae_config.get(name)
            numbers = [v for v in values if type(v) in (int, float)] if isinstance(values, list) else []
            if [channels, numbers] != [len(numbers), values] or (name == "latents_std" and 0 in numbers):
                raise BadInputError(
                    f"the autoencoder's config has no usable {name}", expected=f"a list of {channels} numbers",
                    found=repr(values)[:80], hint=_AGAIN,
                )  # fmt: skip
            found.append(torch.tensor(numbers).view(1, channels, 1, 1))
        return 1 / found[0], found[1]


class GlmImagePipeline(ComposedPipelineBase):
    """Text to image; Hybrid style: prior tokens are written before the loop starts."""

    pipeline_name = "GlmImagePipeline"
    native_models: ClassVar[Mapping[str, type[nn.Module]]] = {"GlmImageTransformer2DModel": GlmImageTransformer}
    _required_config_modules = (
        "scheduler",
        "text_encoder",
        "tokenizer",
        "vision_language_encoder",
        "processor",
        "transformer",
        "vae",
    )

    def create_pipeline_stages(self) -> None:
        self.add_stage(InputValidationStage(self.sampling_params))
        self.add_stage(GlmImageBeforeDenoisingStage(self.modules))
        self.add_standard_denoising_stages()


EntryClass = register_pipeline(GlmImagePipeline)
register_configs(
    GlmImagePipeline.pipeline_name,
    sampling_param_cls=GlmImageSamplingParams,
    pipeline_config_cls=GlmImagePipelineConfig,
    hf_model_paths=("zai-org/GLM-Image",),
)
