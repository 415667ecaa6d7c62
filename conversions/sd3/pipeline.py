"""The pipeline of Stable Diffusion 3 and 3.5 on the native runtime: standard stages, and what is special as callbacks.

B: images, T: text tokens of one encoder, X: width that the transformer takes, P: width of one pooled text.

The order of operations is that of diffusers' StableDiffusion3Pipeline. Deviation: both halves of classifier-free
guidance run one after the other, in diffusers as one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conversions.sd3.model import SD3Transformer
from conversions.sd3.params import SD3Params
from runtime.config import PipelineConfig, SamplingParams, TextEncoderSpec
from runtime.pipeline import ComposedPipelineBase
from runtime.registry import register_configs, register_pipeline
from runtime.request import Req
from runtime.stages import TextEmbeddings, TextEncodingStage
from runtime.stages.text_encoding import module_device

LONGEST = 512  # tokens that T5 was used with
CLIP_L = TextEncoderSpec("text_encoder", "tokenizer", pooled=True)
CLIP_G = TextEncoderSpec("text_encoder_2", "tokenizer_2", pooled=True)
T5 = TextEncoderSpec("text_encoder_3", "tokenizer_3", max_length=LONGEST)


@dataclass(frozen=True)
class SD3SamplingParams(SamplingParams):
    """Of Stable Diffusion 3 medium. Skip-layer guidance is for 3.5 medium, and off unless layers are named."""

    num_inference_steps: int = 28
    guidance_scale: float | None = 7.0
    max_sequence_length: int | None = 256
    skip_guidance_layers: tuple[int, ...] = ()  # blocks that a further prediction leaves out; 7, 8, 9 for 3.5 medium
    skip_layer_guidance_scale: float = 2.8
    skip_layer_guidance_start: float = 0.01  # after this part of the steps
    skip_layer_guidance_stop: float = 0.2  # before this part of the steps


@dataclass(frozen=True)
class SD35MediumSamplingParams(SD3SamplingParams):
    num_inference_steps: int = 40
    guidance_scale: float | None = 4.5


@dataclass(frozen=True)
class SD35LargeSamplingParams(SD3SamplingParams):
    guidance_scale: float | None = 3.5


@dataclass(frozen=True)
class SD35TurboSamplingParams(SD3SamplingParams):
    num_inference_steps: int = 4
    guidance_scale: float | None = 1.0


@dataclass
class SD3PipelineConfig(PipelineConfig):
    cfg_field: str = "guidance_scale"
    cfg_without_negative: bool = True
    text_encoders: tuple[TextEncoderSpec, ...] = field(default=(CLIP_L, CLIP_G, T5))

    def __post_init__(self) -> None:
        """Many copies of the models leave T5 out, the largest part."""
        if (self.model_index.get(T5.encoder) or [None])[0] is None:
            self.text_encoders = (CLIP_L, CLIP_G)

    @property
    def params(self) -> SD3Params:
        """Of the transformer. Raises BadInputError as `SD3Params.from_config`."""
        return SD3Params.from_config(self.dit_config)

    # sizes
    def default_size(self, batch: Req) -> tuple[int, int]:
        side = self.params.sample_size * self.vae_scale_factor()
        return side, side

    def size_multiple(self) -> int:
        return self.vae_scale_factor() * self.params.patch_size

    def verify_request(self, batch: Req) -> Iterator[tuple[str, Any, bool, str]]:
        """Sides have learned positions; skip-layer guidance has four settings."""
        largest, count = self.params.pos_embed_max_size * self.size_multiple(), self.params.num_layers
        for name in ("height", "width"):
            side = getattr(batch, name)
            yield name, side, _at_most(largest, side), f"at most {largest}, as far as the model has positions"
        length = batch.max_sequence_length
        yield "max_sequence_length", length, _at_most(LONGEST, length), f"at most {LONGEST}"
        for name, value in batch.extra.items():
            if name == "skip_guidance_layers":
                layers = isinstance(value, list | tuple) and all(type(i) is int and 0 <= i < count for i in value)
                yield name, value, layers, f"numbers of blocks, 0 to {count - 1}"
            elif name.startswith("skip_layer_guidance"):
                number = isinstance(value, int | float) and not isinstance(value, bool)
                yield name, value, number and 0 <= value <= 100, "a number from 0 to 100"

    # before the loop
    def prepare_mu(self, batch: Req) -> float | None:
        """A line through (base_image_seq_len, base_shift) and (max_image_seq_len, max_shift), at the image's tokens."""
        if not self.scheduler_config.get("use_dynamic_shifting"):
            return None
        *_, height, width = self.prepare_latent_shape(batch)
        patch = self.params.patch_size
        return self.size_shift((height // patch) * (width // patch), max_shift=1.16)

    # in the loop
    def get_freqs_cis(self, batch: Req, transformer: nn.Module, device: torch.device) -> Tensor:
        """The learned positions of this size."""
        assert isinstance(transformer, SD3Transformer) and batch.latents is not None
        height, width = batch.latents.shape[-2:]
        return transformer.pos_embed.positions(height, width)

    def prepare_pos_cond_kwargs(self, batch: Req, freqs_cis: Any, device: torch.device) -> dict[str, Any]:
        if batch.extra["skip_guidance_layers"] and not batch.do_classifier_free_guidance:
            batch.warn(f"skip_guidance_layers is ignored: guidance_scale {batch.guidance_scale:g} is not above 1")
        return self._conditions(batch, batch.prompt_embeds, batch.pooled_embeds, freqs_cis)

    def prepare_neg_cond_kwargs(self, batch: Req, freqs_cis: Any, device: torch.device) -> dict[str, Any]:
        return self._conditions(batch, batch.negative_prompt_embeds, batch.negative_pooled_embeds, freqs_cis)

    # https://github.com/Stability-AI/sd3.5/blob/fbf8f483f992d8d6ad4eaaeb23b1dc5f523c3b3a/sd3_infer.py#L316
    def _conditions(self, batch: Req, tokens: list[Tensor], pooled: list[Tensor], positions: Tensor) -> dict[str, Any]:
        """Tokens of both CLIPs side by side, padded with zeros to X; those of T5, or zeros, after them."""
        clip = torch.cat(tokens[:2], dim=-1)  # (B, T, X of both)
        assert batch.max_sequence_length is not None  # InputValidationStage filled it
        shape = clip.shape[0], batch.max_sequence_length, self.params.joint_attention_dim
        t5 = tokens[2] if len(tokens) > 2 else clip.new_zeros(shape)  # (B, T, X)
        return {
            "encoder_hidden_states": torch.cat((F.pad(clip, (0, t5.shape[-1] - clip.shape[-1])), t5), dim=1),
            "pooled_projections": torch.cat(pooled, dim=-1),  # (B, P of both)
            "positions": positions,
        }

    # https://github.com/Stability-AI/sd3.5/blob/fbf8f483f992d8d6ad4eaaeb23b1dc5f523c3b3a/sd3_impls.py#L219
    def guide_further(
        self, noise_pred: Tensor, positive: Tensor, predict: Callable[..., Tensor], batch: Req, step: int
    ) -> Tensor:
        """Skip-layer guidance: in some of the first steps, away from what fewer layers predict."""
        settings, steps = batch.extra, len(batch.timesteps if batch.timesteps is not None else ())
        layers, scale = settings["skip_guidance_layers"], settings["skip_layer_guidance_scale"]
        start, stop = settings["skip_layer_guidance_start"], settings["skip_layer_guidance_stop"]
        if not layers or not steps * start < step < steps * stop:
            return noise_pred
        return noise_pred + (positive - predict(skip_layers=tuple(layers))) * scale


class SD3TextEncodingStage(TextEncodingStage):
    """Both CLIPs give the tokens of their last layer but one and a projected pooled text; T5 gives its last layer."""

    def encode(self, texts: list[str], batch: Req, config: PipelineConfig) -> TextEmbeddings:
        found = TextEmbeddings([])
        for spec in config.text_encoders:
            encoder = self.encoders[spec.encoder]
            ids = self.tokenize(texts, spec, batch).to(module_device(encoder))  # (prompts, T)
            if not spec.pooled:
                found.tokens.append(encoder(ids).last_hidden_state.to(encoder.dtype))  # (prompts, T, X)
                continue
            out = encoder(ids, output_hidden_states=True)
            found.tokens.append(out.hidden_states[-2].to(encoder.dtype))  # (prompts, T, X of one)
            found.pooled.append(out.text_embeds.to(encoder.dtype))  # (prompts, P)
        return found


class SD3Pipeline(ComposedPipelineBase):
    """Text to image; Modular style: the standard stages and the callbacks above."""

    pipeline_name = "StableDiffusion3Pipeline"
    native_models: ClassVar[Mapping[str, type[nn.Module]]] = {"SD3Transformer2DModel": SD3Transformer}
    _required_config_modules = (
        "scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "transformer", "vae",
    )  # fmt: skip
    _optional_config_modules = ("text_encoder_3", "tokenizer_3")

    def create_pipeline_stages(self) -> None:
        specs = self.config.text_encoders
        encoders = {spec.encoder: self.modules[spec.encoder] for spec in specs}
        tokenizers = {spec.tokenizer: self.modules[spec.tokenizer] for spec in specs}
        self.add_standard_t2i_stages(text_encoding=SD3TextEncodingStage(encoders, tokenizers))


def _at_most(limit: int, value: Any) -> bool:
    return value is None or (isinstance(value, int) and value <= limit)


def _medium_35(configs: Mapping[str, dict[str, Any]]) -> bool:
    return bool(configs.get("transformer", {}).get("dual_attention_layers"))


def _large_35(configs: Mapping[str, dict[str, Any]]) -> bool:
    return configs.get("transformer", {}).get("qk_norm") is not None and not _medium_35(configs)


EntryClass = register_pipeline(SD3Pipeline)
register_configs(
    SD3Pipeline.pipeline_name,
    sampling_param_cls=SD3SamplingParams,
    pipeline_config_cls=SD3PipelineConfig,
    hf_model_paths=("stabilityai/stable-diffusion-3-medium-diffusers", "stabilityai/stable-diffusion-3-medium"),
)
register_configs(
    SD3Pipeline.pipeline_name,
    sampling_param_cls=SD35TurboSamplingParams,  # its configs are those of 3.5 large: only the hub id tells
    pipeline_config_cls=SD3PipelineConfig,
    hf_model_paths=("stabilityai/stable-diffusion-3.5-large-turbo",),
)
register_configs(
    SD3Pipeline.pipeline_name,
    sampling_param_cls=SD35MediumSamplingParams,
    pipeline_config_cls=SD3PipelineConfig,
    hf_model_paths=("stabilityai/stable-diffusion-3.5-medium",),
    model_detectors=(_medium_35,),
)
register_configs(
    SD3Pipeline.pipeline_name,
    sampling_param_cls=SD35LargeSamplingParams,
    pipeline_config_cls=SD3PipelineConfig,
    hf_model_paths=("stabilityai/stable-diffusion-3.5-large",),
    model_detectors=(_large_35,),
)
