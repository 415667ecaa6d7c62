"""What Qwen-Image's pipelines share: the prompt's template, packed latents, guidance that keeps each token's length.

B: images, h, w: latent positions, S = h * w / 4 image tokens, C: latent channels, T: text tokens, X: width of a token.

The order of operations is that of diffusers' QwenImagePipeline.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from conversions.qwen_image.model import QwenImageTransformer, Shape, Table
from runtime.config import PipelineConfig, SamplingParams
from runtime.layers import pack, unpack
from runtime.request import Req
from runtime.stages import TextEmbeddings, TextEncodingStage
from runtime.stages.text_encoding import module_device

MOST_TOKENS = 1024  # of a prompt, the template's beginning not counted
SIDE = 128  # latent positions of a picture whose size nobody names


@dataclass(frozen=True)
class QwenImageSamplingParams(SamplingParams):
    num_inference_steps: int = 50
    true_cfg_scale: float = 4.0
    max_sequence_length: int | None = 512


@dataclass
class QwenImagePipelineConfig(PipelineConfig):
    """Facts and callbacks of text to image; editing adds the given pictures.

    Attributes:
        template: what the language model reads, with {} for the prompt.
        dropped: how many of the template's first tokens the transformer does not see.
    """

    template: str = (
        "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
        "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    dropped: int = 34

    def verify_request(self, batch: Req) -> Iterator[tuple[str, Any, bool, str]]:
        """No more tokens than the tokenizer is asked for, and a first and a last level for a schedule between them."""
        tokens, steps, last = batch.max_sequence_length, batch.num_inference_steps, "shift_terminal"
        fits = not isinstance(tokens, int) or tokens <= MOST_TOKENS
        yield "max_sequence_length", tokens, fits, f"at most {MOST_TOKENS}"
        yield "num_inference_steps", steps, steps != 1 or not self.scheduler_config.get(last), f"2 or more with {last}"

    # sizes
    def vae_scale_factor(self) -> int:
        return int(2 ** len(self.vae_config["temperal_downsample"]))

    def size_multiple(self) -> int:
        return 2 * self.vae_scale_factor()  # latents are packed 2 x 2

    def default_size(self, batch: Req) -> tuple[int, int]:
        return SIDE * self.vae_scale_factor(), SIDE * self.vae_scale_factor()

    def prepare_latent_shape(self, batch: Req) -> tuple[int, ...]:
        assert batch.height is not None and batch.width is not None
        factor = self.vae_scale_factor()
        return batch.batch_size, self.dit_config["in_channels"] // 4, batch.height // factor, batch.width // factor

    def image_shapes(self, batch: Req) -> list[Shape]:
        """Frames, rows and columns, in tokens, of each picture that the transformer sees; the noise first."""
        _, _, height, width = self.prepare_latent_shape(batch)
        return [(1, height // 2, width // 2)]

    # guidance
    def combine_guidance(self, positive: Tensor, negative: Tensor, scale: float, batch: Req) -> Tensor:
        """Classifier-free guidance, each token scaled back to the length of its prediction for the prompt."""
        combined = negative + scale * (positive - negative)  # (B, S, 4 C)
        scaled: Tensor = combined * (positive.norm(dim=-1, keepdim=True) / combined.norm(dim=-1, keepdim=True))
        return scaled

    # before the loop
    def maybe_pack_latents(self, latents: Tensor, batch: Req) -> Tensor:
        return pack(latents)

    def prepare_sigmas(self, batch: Req) -> list[float] | None:
        """From 1 down to 1 / n in n even steps; the scheduler shifts them and adds the final 0."""
        if batch.sigmas is not None:
            return batch.sigmas
        return self.even_sigmas(batch)

    def prepare_mu(self, batch: Req) -> float | None:
        """A line through (base_image_seq_len, base_shift) and (max_image_seq_len, max_shift), at S tokens."""
        _, _, height, width = self.prepare_latent_shape(batch)
        return self.size_shift((height // 2) * (width // 2))

    # in the loop
    def get_freqs_cis(self, batch: Req, transformer: nn.Module, device: torch.device) -> dict[int, Table]:
        """Number of text tokens -> the rotary table of the joint sequence; the two prompts may differ in length."""
        assert isinstance(transformer, QwenImageTransformer)
        shapes = self.image_shapes(batch)
        texts = {embeds.shape[1] for embeds in (*batch.prompt_embeds, *batch.negative_prompt_embeds)}
        return {text: transformer.rotary(shapes, text) for text in texts}

    def prepare_pos_cond_kwargs(self, batch: Req, freqs_cis: Any, device: torch.device) -> dict[str, Any]:
        return self._conditions(batch, batch.prompt_embeds[0], batch.prompt_masks[0], freqs_cis)

    def prepare_neg_cond_kwargs(self, batch: Req, freqs_cis: Any, device: torch.device) -> dict[str, Any]:
        return self._conditions(batch, batch.negative_prompt_embeds[0], batch.negative_prompt_masks[0], freqs_cis)

    def _conditions(self, batch: Req, tokens: Tensor, mask: Tensor | None, tables: dict[int, Table]) -> dict[str, Any]:
        return {
            "encoder_hidden_states": tokens,  # (B, T, X)
            "encoder_hidden_states_mask": mask,  # bool (B, T), or None
            "img_shapes": self.image_shapes(batch),
            "rotary": tables[tokens.shape[1]],
        }

    def scale_timestep(self, timestep: Tensor, batch: Req) -> Tensor:
        """The model counts time from 1 to 0, the scheduler from 1000; rounded first, as diffusers does."""
        assert batch.latents is not None
        return timestep.to(batch.latents.dtype) / 1000

    # after the loop
    def post_denoising_loop(self, latents: Tensor, batch: Req) -> Tensor:
        """(B, S, 4 C) -> (B, C, 1, h, w): the autoencoder takes a picture for a video of one frame."""
        assert batch.raw_latent_shape is not None
        return unpack(latents, batch.raw_latent_shape).unsqueeze(2)

    def get_decode_scale_and_shift(self) -> tuple[float | Tensor, float | Tensor]:
        mean, std = self.latent_statistics()
        return 1.0 / std, mean

    def latent_statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each latent channel: (C, 1, 1, 1) each."""
        mean, std = (torch.tensor(self.vae_config[key])[:, None, None, None] for key in ("latents_mean", "latents_std"))
        return mean, std

    def post_decoding(self, image: Tensor, batch: Req) -> Tensor:
        """(B, 3, 1, H, W) in [-1, 1] -> (B, 3, H, W) in [0, 1]."""
        return super().post_decoding(image[:, :, 0], batch)


class PromptEncodingStage(TextEncodingStage):
    """Prompts in their template through the language model: the last hidden states behind the template's beginning."""

    def __init__(self, encoder: Any, tokenizer: Any) -> None:
        super().__init__({"text_encoder": encoder}, {"tokenizer": tokenizer})
        self.encoder, self.tokenizer = encoder, tokenizer

    def encode(self, texts: list[str], batch: Req, config: PipelineConfig) -> TextEmbeddings:
        assert isinstance(config, QwenImagePipelineConfig)
        on = module_device(self.encoder)
        inputs = {name: tensor.to(on) for name, tensor in self.inputs(texts, batch, config).items()}
        # The last position alone goes on to the vocabulary: no one reads what the model would say.
        out = self.encoder(**inputs, output_hidden_states=True, use_cache=False, logits_to_keep=1)
        states = out.hidden_states[-1].to(self.encoder.dtype)  # (prompts, tokens, X)
        rows = [row[mask.bool()][config.dropped :] for row, mask in zip(states, inputs["attention_mask"], strict=True)]
        tokens = pad_sequence(rows, batch_first=True)[:, : batch.max_sequence_length]  # (prompts, T, X)
        lengths = torch.tensor([len(row) for row in rows], device=tokens.device)
        mask = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]  # (prompts, T)
        return TextEmbeddings([tokens], masks=[None if bool(mask.all()) else mask])

    def inputs(self, texts: list[str], batch: Req, config: QwenImagePipelineConfig) -> dict[str, Tensor]:
        """What the language model takes: ids and mask (prompts, tokens), and whatever belongs to pictures."""
        filled = [config.template.format(text) for text in texts]
        limit = min(batch.max_sequence_length or MOST_TOKENS, MOST_TOKENS)
        for text, whole in zip(texts, filled, strict=True):
            count = len(self.tokenizer(whole, truncation=True, max_length=1 << 20).input_ids) - config.dropped
            if count > limit:
                batch.warn(f"text_encoder reads {limit} of the prompt's {count} tokens: {text[:40]!r}...")
        most = MOST_TOKENS + config.dropped
        return dict(self.tokenizer(filled, max_length=most, padding=True, truncation=True, return_tensors="pt"))
