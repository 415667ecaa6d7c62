"""FLUX.1's pipeline on the native runtime: standard stages, and what is special about FLUX.1 as callbacks.

B: images, h, w: latent positions, S = h * w / 4 image tokens, C: latent channels, T: text tokens.

The order of operations is that of diffusers' FluxPipeline. Deviation: position ids stay float32 in every dtype, where
diffusers casts them to the model's (bfloat16 counts exactly only to 256).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from conversions.flux1.model import FluxTransformer, Table
from runtime.config import PipelineConfig, SamplingParams, TextEncoderSpec
from runtime.layers import pack, unpack
from runtime.pipeline import ComposedPipelineBase
from runtime.registry import register_configs, register_pipeline
from runtime.request import Req

CLIP = TextEncoderSpec("text_encoder", "tokenizer", pooled=True)
T5 = TextEncoderSpec("text_encoder_2", "tokenizer_2", max_length=512)


@dataclass(frozen=True)
class FluxSamplingParams(SamplingParams):
    num_inference_steps: int = 28
    guidance_scale: float | None = 3.5


@dataclass(frozen=True)
class FluxSchnellSamplingParams(SamplingParams):
    num_inference_steps: int = 4


@dataclass
class FluxPipelineConfig(PipelineConfig):
    """Facts and callbacks of text to image; pipelines that also take pictures add theirs."""

    text_encoders: tuple[TextEncoderSpec, ...] = field(default=(CLIP, T5))

    def __post_init__(self) -> None:
        self.should_use_guidance = self.dit_config.get("guidance_embeds", True)  # schnell is trained without

    def size_multiple(self) -> int:
        return 2 * self.vae_scale_factor()  # latents are packed 2 x 2

    # https://github.com/black-forest-labs/flux/blob/802fb4713906133fcbd0d8dc5351620ca4773036/src/flux/sampling.py#L41
    def maybe_pack_latents(self, latents: Tensor, batch: Req) -> Tensor:
        return pack(latents)

    def encode(self, vae: Any, pixels: Tensor, device: torch.device) -> Any:
        """A picture (3, H, W) in [-1, 1] -> the distribution of its latents (1, C, h, w)."""
        # Channels last, as diffusers' pictures lie in memory: the same bits come out.
        return vae.encode(pixels[None].to(device, vae.dtype, memory_format=torch.channels_last)).latent_dist

    def normalise(self, latents: Tensor) -> Tensor:
        """What the autoencoder encoded, as the transformer knows it; the decoding stage does the reverse."""
        scale, shift = self.get_decode_scale_and_shift()
        return (latents - shift) * scale

    # https://github.com/black-forest-labs/flux/blob/802fb4713906133fcbd0d8dc5351620ca4773036/src/flux/sampling.py#L356
    def post_denoising_loop(self, latents: Tensor, batch: Req) -> Tensor:
        """(B, S, 4 C) -> (B, C, h, w)."""
        return unpack(latents, _raw_shape(batch))

    def prepare_sigmas(self, batch: Req) -> list[float] | None:
        """From 1 down to 1 / n in n even steps; the scheduler shifts them and adds the final 0."""
        if batch.sigmas is not None or self.scheduler_config.get("use_flow_sigmas"):
            return batch.sigmas
        return self.even_sigmas(batch)

    # https://github.com/black-forest-labs/flux/blob/802fb4713906133fcbd0d8dc5351620ca4773036/src/flux/sampling.py#L281
    def prepare_mu(self, batch: Req) -> float | None:
        """A line through (base_image_seq_len, base_shift) and (max_image_seq_len, max_shift), at S tokens."""
        _, _, height, width = self.prepare_latent_shape(batch)
        return self.size_shift((height // 2) * (width // 2))

    def get_freqs_cis(self, batch: Req, transformer: nn.Module, device: torch.device) -> Table:
        """The rotary table of the joint sequence, text first."""
        assert isinstance(transformer, FluxTransformer)
        return transformer.rotary(*self._ids(batch, device))

    def _ids(self, batch: Req, device: torch.device) -> tuple[Tensor, Tensor]:
        """Positions: text (T, 3) all zero; image (S, 3) as (0, row, column)."""
        _, _, height, width = _raw_shape(batch)
        return torch.zeros(batch.prompt_embeds[1].shape[1], 3, device=device), grid(0, height, width).to(device)

    def prepare_pos_cond_kwargs(self, batch: Req, freqs_cis: Any, device: torch.device) -> dict[str, Any]:
        return self._conditions(batch, batch.prompt_embeds[1], batch.pooled_embeds[0], freqs_cis, device)

    def prepare_neg_cond_kwargs(self, batch: Req, freqs_cis: Any, device: torch.device) -> dict[str, Any]:
        tokens, pooled = batch.negative_prompt_embeds[1], batch.negative_pooled_embeds[0]
        return self._conditions(batch, tokens, pooled, freqs_cis, device)

    def _conditions(
        self, batch: Req, tokens: Tensor, pooled: Tensor, table: Table, device: torch.device
    ) -> dict[str, Any]:
        txt_ids, img_ids = self._ids(batch, device)
        guidance = None
        if self.should_use_guidance:
            assert batch.guidance_scale is not None  # InputValidationStage filled it
            guidance = torch.full((batch.batch_size,), batch.guidance_scale, dtype=torch.float32, device=device)
        return {
            "encoder_hidden_states": tokens,  # (B, T, X)
            "pooled_projections": pooled,  # (B, P)
            "txt_ids": txt_ids,
            "img_ids": img_ids,
            "guidance": guidance,
            "rotary": table,
        }

    def scale_timestep(self, timestep: Tensor, batch: Req) -> Tensor:
        """The model counts time from 1 to 0, the scheduler from 1000; rounded first, as diffusers does."""
        assert batch.latents is not None
        return timestep.to(batch.latents.dtype) / 1000


class FluxPipeline(ComposedPipelineBase):
    """Text to image; Modular style: the standard stages and the callbacks above."""

    pipeline_name = "FluxPipeline"
    native_models: ClassVar[Mapping[str, type[nn.Module]]] = {"FluxTransformer2DModel": FluxTransformer}
    _required_config_modules = (
        "scheduler",
        "text_encoder",
        "text_encoder_2",
        "tokenizer",
        "tokenizer_2",
        "transformer",
        "vae",
    )

    def create_pipeline_stages(self) -> None:
        self.add_standard_t2i_stages()


def grid(first: int, height: int, width: int) -> Tensor:
    """Positions (S, 3) of a picture of `height` x `width` latent positions, row after row: (first, row, column)."""
    return torch.cartesian_prod(torch.tensor([float(first)]), torch.arange(height // 2.0), torch.arange(width // 2.0))


def _raw_shape(batch: Req) -> tuple[int, ...]:
    assert batch.raw_latent_shape is not None  # LatentPreparationStage ran
    return batch.raw_latent_shape


def _without_guidance(configs: Mapping[str, dict[str, Any]]) -> bool:
    return configs.get("transformer", {}).get("guidance_embeds") is False


register_pipeline(FluxPipeline)
register_configs(
    FluxPipeline.pipeline_name,
    sampling_param_cls=FluxSamplingParams,
    pipeline_config_cls=FluxPipelineConfig,
    hf_model_paths=("black-forest-labs/FLUX.1-dev",),
)
register_configs(
    FluxPipeline.pipeline_name,
    sampling_param_cls=FluxSchnellSamplingParams,
    pipeline_config_cls=FluxPipelineConfig,
    hf_model_paths=("black-forest-labs/FLUX.1-schnell",),
    model_detectors=(_without_guidance,),
)
