"""Z-Image's pipeline on the native runtime: standard stages, a text encoding of its own, and callbacks.

B: images, C: latent channels, h, w: latent positions, T: text tokens, X: their width.

The order of operations is that of diffusers' ZImagePipeline. Guidance is its own too: the scale counts from 0, which
is none, and the prompt's own prediction is what it is added to. Deviation: where guidance is on, the prompt and the
negative prompt run one after the other instead of as one batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from conversions.z_image.model import ZImageTransformer
from conversions.z_image.places import Places
from conversions.z_image.recipe import PATCH
from porter.core.errors import BadInputError, UsageError
from runtime.attention import useful
from runtime.config import PipelineConfig, SamplingParams, TextEncoderSpec
from runtime.pipeline import ComposedPipelineBase
from runtime.registry import register_configs, register_pipeline
from runtime.request import Req
from runtime.stages.text_encoding import TextEmbeddings, TextEncodingStage, module_device

QWEN3 = TextEncoderSpec("text_encoder", "tokenizer", max_length=512)
TURBO_SHIFT = 3.0  # of Z-Image-Turbo's schedule; the base model's is 6


@dataclass(frozen=True)
class ZImageSamplingParams(SamplingParams):
    """cfg_normalization: the largest norm of a guided prediction, in norms of the prompt's own; 0 leaves it alone.
    cfg_truncation: where on the way from 0 (noise) to 1 guidance ends."""

    num_inference_steps: int = 50
    guidance_scale: float | None = 5.0
    max_sequence_length: int | None = 512
    cfg_normalization: float = 0.0
    cfg_truncation: float = 1.0


@dataclass(frozen=True)
class ZImageTurboSamplingParams(ZImageSamplingParams):
    """Eight steps without guidance. The model's page asks diffusers for nine, the last of which then computed nothing;
    0.42 computes all that it is asked for."""

    num_inference_steps: int = 8
    guidance_scale: float | None = 0.0


@dataclass
class ZImagePipelineConfig(PipelineConfig):
    cfg_field: str = "guidance_scale"
    cfg_none: float = 0.0
    cfg_without_negative: bool = True
    latents_precision: str | None = "float32"
    text_encoders: tuple[TextEncoderSpec, ...] = field(default=(QWEN3,))

    def size_multiple(self) -> int:
        return PATCH[0] * self.vae_scale_factor()

    # https://github.com/Tongyi-MAI/Z-Image/blob/c7ec13578cc27b01d547e1b3c62bc8b95bc6cb6e/src/zimage/pipeline.py#L104
    # Deviation: on from any scale above 0, as in diffusers; the original takes scales up to 1 for none.
    def guides(self, batch: Req) -> bool:
        """Also reads the settings of guidance, so that a bad one is refused before anything runs."""
        _setting(batch, "cfg_normalization"), _setting(batch, "cfg_truncation")
        return super().guides(batch)

    # https://github.com/Tongyi-MAI/Z-Image/blob/c7ec13578cc27b01d547e1b3c62bc8b95bc6cb6e/src/zimage/pipeline.py#L214
    def cfg_scale(self, batch: Req, step: int, timestep: Tensor) -> float | None:
        """None behind `cfg_truncation`. Time is asked only where it can be: the answer makes an accelerator wait."""
        truncation = _setting(batch, "cfg_truncation")
        if truncation < 1 and float(_time(timestep)) > truncation:
            return None
        return batch.guidance_scale

    # https://github.com/Tongyi-MAI/Z-Image/blob/c7ec13578cc27b01d547e1b3c62bc8b95bc6cb6e/src/zimage/pipeline.py#L248
    def combine_guidance(self, positive: Tensor, negative: Tensor, scale: float, batch: Req) -> Tensor:
        """(B, C, h, w) twice -> the guided prediction, each image's norm at most `cfg_normalization` times its own."""
        guided = positive + scale * (positive - negative)
        if limit := _setting(batch, "cfg_normalization"):
            largest, found = _norms(positive) * limit, _norms(guided)  # (B, 1, 1, 1)
            guided = torch.where(found > largest, guided * (largest / found), guided)
        return guided

    def prepare_sigmas(self, batch: Req) -> list[float] | None:
        """From 1 down to 1 / n in n even steps of float32; the scheduler shifts them and adds the final 0."""
        if batch.sigmas is not None:
            return batch.sigmas
        assert batch.num_inference_steps is not None
        sigmas: list[float] = torch.linspace(1.0, 1 / batch.num_inference_steps, batch.num_inference_steps).tolist()
        return sigmas

    # https://github.com/Tongyi-MAI/Z-Image/blob/c7ec13578cc27b01d547e1b3c62bc8b95bc6cb6e/src/zimage/pipeline.py#L22
    def prepare_mu(self, batch: Req) -> float | None:
        """A line through (base_image_seq_len, base_shift) and (max_image_seq_len, max_shift), at the image's tokens."""
        _, _, height, width = self.prepare_latent_shape(batch)
        return self.size_shift((height // PATCH[0]) * (width // PATCH[0]))

    def get_freqs_cis(self, batch: Req, transformer: nn.Module, device: torch.device) -> tuple[Places, ...]:
        """Where the tokens stand, of the prompts and of the negative prompts: positions follow from their lengths."""
        assert isinstance(transformer, ZImageTransformer) and batch.raw_latent_shape is not None
        height, width = batch.raw_latent_shape[2:]
        sides = [(batch.prompt_embeds, batch.prompt_masks)]
        if batch.do_classifier_free_guidance:
            sides.append((batch.negative_prompt_embeds, batch.negative_prompt_masks))
        return tuple(
            transformer.places(_lengths(tokens[0], masks[0]), height, width, device) for tokens, masks in sides
        )

    def prepare_pos_cond_kwargs(self, batch: Req, freqs_cis: Any, device: torch.device) -> dict[str, Any]:
        return {"encoder_hidden_states": batch.prompt_embeds[0], "places": freqs_cis[0]}

    def prepare_neg_cond_kwargs(self, batch: Req, freqs_cis: Any, device: torch.device) -> dict[str, Any]:
        return {"encoder_hidden_states": batch.negative_prompt_embeds[0], "places": freqs_cis[1]}

    def scale_timestep(self, timestep: Tensor, batch: Req) -> Tensor:
        """The model counts time from 0 to 1, the scheduler down from 1000."""
        return _time(timestep)

    def post_model(self, noise_pred: Tensor, batch: Req) -> Tensor:
        """The model points from noise to image, the scheduler from image to noise; in float32 from here on."""
        return -noise_pred.float()


# https://github.com/Tongyi-MAI/Z-Image/blob/c7ec13578cc27b01d547e1b3c62bc8b95bc6cb6e/src/zimage/pipeline.py#L107
class ZImageTextEncodingStage(TextEncodingStage):
    """A prompt as a user's message to Qwen3, and the states before its last layer."""

    def encode(self, texts: list[str], batch: Req, config: PipelineConfig) -> TextEmbeddings:
        """One row for each of `texts`: their own tokens from the left, behind them nothing that counts.

        Raises:
            BadInputError: the tokenizer has no chat template.
        """
        (spec,) = config.text_encoders
        encoder, tokenizer = self.encoders[spec.encoder], self.tokenizers[spec.tokenizer]
        ids, own = self._chat(tokenizer, texts, batch)  # (prompts, length) twice
        on = module_device(encoder)
        out = encoder(input_ids=ids.to(on), attention_mask=own.to(on), output_hidden_states=True)
        states = [row[mask] for row, mask in zip(out.hidden_states[-2], own.to(on), strict=True)]  # (T, X) each
        tokens = pad_sequence(states, batch_first=True)  # (prompts, T, X)
        lengths = torch.tensor([len(row) for row in states], device=on)
        mask = torch.arange(tokens.shape[1], device=on) < lengths[:, None]
        return TextEmbeddings([tokens], masks=[useful(mask)])

    def _chat(self, tokenizer: Any, texts: list[str], batch: Req) -> tuple[Tensor, Tensor]:
        """Token ids and which of them are a text's own, bool; what does not fit is dropped with a warning."""
        if not getattr(tokenizer, "chat_template", None):
            raise BadInputError(
                "the tokenizer has no chat template, which puts prompts as Z-Image knows them",
                expected="chat_template in tokenizer_config.json, or chat_template.jinja beside it",
                hint="convert the whole model again: porter convert <model> -o <port> --overwrite",
            )
        chats = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True, enable_thinking=True
            )
            for text in texts
        ]
        length = batch.max_sequence_length
        assert length is not None  # InputValidationStage filled it
        found = tokenizer(chats, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        for text, chat in zip(texts, chats, strict=True):
            count = len(tokenizer(chat, truncation=True, max_length=1 << 20).input_ids)
            if count > length:
                batch.warn(f"text_encoder reads {length} of the prompt's {count} tokens: {text[:40]!r}...")
        return found.input_ids, found.attention_mask.bool()


class ZImagePipeline(ComposedPipelineBase):
    """Text to image; Modular style: the standard stages and the callbacks above."""

    pipeline_name = "ZImagePipeline"
    native_models: ClassVar[Mapping[str, type[nn.Module]]] = {"ZImageTransformer2DModel": ZImageTransformer}
    _required_config_modules = ("scheduler", "text_encoder", "tokenizer", "transformer", "vae")

    def create_pipeline_stages(self) -> None:
        encoders = {"text_encoder": self.modules["text_encoder"]}
        tokenizers = {"tokenizer": self.modules["tokenizer"]}
        self.add_standard_t2i_stages(text_encoding=ZImageTextEncodingStage(encoders, tokenizers))


def _time(timestep: Tensor) -> Tensor:
    return (1000 - timestep) / 1000


def _norms(x: Tensor) -> Tensor:
    """Each image's own, in the order of diffusers' sum: (B, C, h, w) -> (B, 1, 1, 1)."""
    return torch.stack([torch.linalg.vector_norm(image) for image in x])[:, None, None, None]


def _lengths(tokens: Tensor, mask: Tensor | None) -> list[int]:
    """Tokens of each prompt: (B, T, X), bool (B, T) -> B numbers."""
    lengths: list[int] = [tokens.shape[1]] * len(tokens) if mask is None else mask.sum(1).tolist()
    return lengths


def _setting(batch: Req, name: str) -> float:
    """A setting of guidance that the request may bring.

    Raises:
        UsageError: it is no number from 0.
    """
    value = batch.extra[name]
    if not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
        raise UsageError(
            f"{name} is not what Z-Image takes",
            expected="a number from 0",
            found=repr(value),
            hint="porter generate --help",
        )
    return float(value)


def _is_turbo(configs: Mapping[str, dict[str, Any]]) -> bool:
    return configs.get("scheduler", {}).get("shift") == TURBO_SHIFT


EntryClass = register_pipeline(ZImagePipeline)
register_configs(
    ZImagePipeline.pipeline_name,
    sampling_param_cls=ZImageSamplingParams,
    pipeline_config_cls=ZImagePipelineConfig,
    hf_model_paths=("Tongyi-MAI/Z-Image",),
)
register_configs(
    ZImagePipeline.pipeline_name,
    sampling_param_cls=ZImageTurboSamplingParams,
    pipeline_config_cls=ZImagePipelineConfig,
    hf_model_paths=("Tongyi-MAI/Z-Image-Turbo",),
    model_detectors=(_is_turbo,),
)
