"""What a family tells the standard stages: sampling defaults, facts of the architecture, and callbacks.

A family subclasses `PipelineConfig` and overrides only what is special about its model.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from porter.core.errors import UsageError
from runtime.request import Req


class TaskType(enum.Enum):
    T2I = "text to image"
    TI2I = "text and image to image"
    T2V = "text to video"
    I2V = "image to video"
    TI2V = "text, and an image if there is one, to video"

    @property
    def video(self) -> bool:
        """Whether the output has frames."""
        return self in (TaskType.T2V, TaskType.I2V, TaskType.TI2V)

    @property
    def images(self) -> tuple[int, int | None]:
        """Fewest and most pictures that a request brings; None: any number."""
        needed = {TaskType.T2I: (0, 0), TaskType.T2V: (0, 0), TaskType.TI2V: (0, 1), TaskType.I2V: (1, 1)}
        return needed.get(self, (1, None))


@dataclass(frozen=True)
class TextEncoderSpec:
    """How one text encoder is used.

    Attributes:
        encoder: component with the weights.
        tokenizer: component with the vocabulary.
        max_length: most tokens the pipeline asks for; None leaves it to the tokenizer. `Req.max_sequence_length`
            may shorten encoders that have one.
        pooled: whether the pipeline uses the pooled output.
    """

    encoder: str
    tokenizer: str
    max_length: int | None = None
    pooled: bool = False


@dataclass(frozen=True)
class SamplingParams:
    """Defaults of one model for what a request leaves unset; None says that the architecture decides, or no one.

    A family adds fields for what only its models know; requests set them in `Req.extra`, the command line with --set.
    """

    seed: int = 0
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    fps: int | None = None
    num_inference_steps: int = 28
    guidance_scale: float | None = None
    guidance_scale_2: float | None = None
    true_cfg_scale: float = 1.0
    negative_prompt: str | None = None
    max_sequence_length: int | None = None

    @property
    def extra(self) -> dict[str, Any]:
        """The fields that the family added, with their defaults."""
        common = {f.name for f in fields(SamplingParams)}
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in common}

    def fill(self, batch: Req) -> None:
        """Set the fields that `batch` leaves at None."""
        for each in fields(SamplingParams):
            if getattr(batch, each.name) is None:
                setattr(batch, each.name, getattr(self, each.name))
        batch.extra = self.extra | batch.extra


@dataclass
class PipelineConfig:
    """Facts and callbacks of a pipeline; the callbacks' defaults are those of a plain latent image model.

    Attributes:
        task_type: what the pipeline makes of what.
        should_use_guidance: whether the model takes the guidance scale as an input.
        cfg_field: the request's field that holds the scale of classifier-free guidance.
        cfg_none: up to this scale there is no such guidance.
        cfg_without_negative: whether that guidance also runs without a negative prompt, on an empty one.
        further_scales: the request's other guidance fields that the pipeline reads.
        takes_mask, takes_last_image: whether requests may bring these pictures.
        latents_precision: dtype of the loop's state; None: the transformer's.
        vae_precision: dtype of the autoencoder; None: as it was loaded.
        configs: config files of all components by name; `dit_config`, `vae_config`, `scheduler_config` are of these.
        model_index: the entries of model_index.json, some of which are settings.
    """

    task_type: TaskType = TaskType.T2I
    should_use_guidance: bool = False
    cfg_field: str = "true_cfg_scale"
    cfg_none: float = 1.0
    cfg_without_negative: bool = False
    further_scales: tuple[str, ...] = ()
    takes_mask: bool = False
    takes_last_image: bool = False
    latents_precision: str | None = None
    vae_precision: str | None = None
    vae_tiling: bool = False
    vae_slicing: bool = False
    enable_autocast: bool = False
    attention_backend: str = "sdpa"
    text_encoders: tuple[TextEncoderSpec, ...] = ()
    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    model_index: Mapping[str, Any] = field(default_factory=dict)
    dit_config: Mapping[str, Any] = field(default_factory=dict)  # transformer/config.json
    vae_config: Mapping[str, Any] = field(default_factory=dict)  # vae/config.json
    scheduler_config: Mapping[str, Any] = field(default_factory=dict)  # scheduler/scheduler_config.json

    def images(self) -> tuple[int, int | None]:
        """Fewest and most pictures that a request brings; None: any number."""
        return self.task_type.images

    # sizes
    def vae_scale_factor(self) -> int:
        """Pixels per latent position: each level of the autoencoder but the last halves the picture."""
        return int(2 ** (len(self.vae_config["block_out_channels"]) - 1))

    def vae_temporal_factor(self) -> int:
        """Frames per latent frame, after the first."""
        return 1

    def default_size(self, batch: Req) -> tuple[int, int]:
        """Height and width in pixels when the request names none.

        Raises:
            UsageError: the autoencoder's config, which may leave it out, does not say either.
        """
        side = self.vae_config.get("sample_size")
        if not isinstance(side, int) or isinstance(side, bool) or side <= 0:
            raise UsageError(
                "the model does not say how large its pictures are", expected="--height and --width",
                found=f"sample_size {side!r} in the autoencoder's config", hint="add --height 1024 --width 1024",
            )  # fmt: skip
        return side, side

    def size_multiple(self) -> int:
        """Height and width must be multiples of this many pixels."""
        return self.vae_scale_factor()

    def verify_request(self, batch: Req) -> Iterable[tuple[str, Any, bool, str]]:
        """Checks of what only this model knows, before defaults are filled: (field, value, holds, expected)."""
        return ()

    # guidance
    def guides(self, batch: Req) -> bool:
        """Whether steps also run on the negative prompt."""
        negative = batch.negative_prompt is not None or bool(batch.negative_prompt_embeds) or self.cfg_without_negative
        scale = getattr(batch, self.cfg_field)
        return negative and scale is not None and scale > self.cfg_none

    def cfg_scale(self, batch: Req, step: int, timestep: Tensor) -> float | None:
        """Scale of classifier-free guidance at one step of the loop; None: this step runs on the prompt alone."""
        scale: float = getattr(batch, self.cfg_field)
        return scale

    def combine_guidance(self, positive: Tensor, negative: Tensor, scale: float, batch: Req) -> Tensor:
        """The prediction that classifier-free guidance makes of the two."""
        return negative + scale * (positive - negative)

    def guide_further(
        self, noise_pred: Tensor, positive: Tensor, predict: Callable[..., Tensor], batch: Req, step: int
    ) -> Tensor:
        """What stands on top of classifier-free guidance; `predict` is one more prediction for the prompt, the
        transformer's further keyword arguments given."""
        return noise_pred

    # before the loop
    def encode_image(self, image_encoder: Any, image_processor: Any, batch: Req) -> list[Tensor]:
        """Embeddings (B, T, X) of the request's pictures by the vision encoder."""
        raise NotImplementedError(f"{type(self).__name__} has an image encoder, and encode_image is not written")

    def prepare_image_latents(self, vae: Any, batch: Req, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """What the model takes of the request's pictures, encoded by `vae`, in its packing."""
        raise NotImplementedError(f"{type(self).__name__} takes pictures, and prepare_image_latents is not written")

    def prepare_latent_shape(self, batch: Req) -> tuple[int, ...]:
        """Shape of the noise for `batch`, before packing: (B, C, h, w), or (B, C, f, h, w) of a video."""
        assert batch.height is not None and batch.width is not None
        factor, channels = self.vae_scale_factor(), int(self.vae_config["latent_channels"])
        sides = batch.height // factor, batch.width // factor
        if not self.task_type.video:
            return batch.batch_size, channels, *sides
        assert batch.num_frames is not None
        return batch.batch_size, channels, (batch.num_frames - 1) // self.vae_temporal_factor() + 1, *sides

    def maybe_pack_latents(self, latents: Tensor, batch: Req) -> Tensor:
        """(B, C, h, w) -> the model's input."""
        return latents

    def prepare_sigmas(self, batch: Req) -> list[float] | None:
        """Noise levels for the scheduler to shift; None leaves them to the scheduler."""
        return batch.sigmas

    def prepare_mu(self, batch: Req) -> float | None:
        """Shift of the schedule that depends on the picture's size, or None."""
        return None

    def size_shift(self, tokens: int, max_shift: float = 1.15) -> float:
        """A line through (base_image_seq_len, base_shift) and (max_image_seq_len, max_shift), at `tokens`.

        Args:
            max_shift: what a scheduler config that leaves it out means.
        """
        known = self.scheduler_config
        low, high = known.get("base_image_seq_len", 256), known.get("max_image_seq_len", 4096)
        at_low, at_high = known.get("base_shift", 0.5), known.get("max_shift", max_shift)
        slope = (at_high - at_low) / (high - low)
        return float(tokens * slope + (at_low - slope * low))

    def even_sigmas(self, batch: Req) -> list[float]:
        """From 1 down to 1 / n in n even steps; the scheduler shifts them and adds the final 0."""
        assert batch.num_inference_steps is not None
        return [float(s) for s in np.linspace(1.0, 1 / batch.num_inference_steps, batch.num_inference_steps)]

    # in the loop
    def select_transformer(self, transformers: Mapping[str, nn.Module], batch: Req, timestep: Tensor) -> str:
        """Which of the pipeline's denoisers runs at this step."""
        return "transformer"

    def get_freqs_cis(self, batch: Req, transformer: nn.Module, device: torch.device) -> Any:
        """Rotary tables, computed once before the loop and given to `prepare_*_cond_kwargs`."""
        return None

    def prepare_pos_cond_kwargs(self, batch: Req, freqs_cis: Any, device: torch.device) -> dict[str, Any]:
        """The transformer's keyword arguments besides latents and timestep."""
        return {"encoder_hidden_states": batch.prompt_embeds[0]}

    def prepare_neg_cond_kwargs(self, batch: Req, freqs_cis: Any, device: torch.device) -> dict[str, Any]:
        """The same for the negative prompt."""
        return {"encoder_hidden_states": batch.negative_prompt_embeds[0]}

    def prepare_model_input(self, latents: Tensor, batch: Req) -> Tensor:
        """The loop's state -> the transformer's input: joined with `batch.image_latents` where the model takes them."""
        return latents

    def scale_timestep(self, timestep: Tensor, batch: Req) -> Tensor:
        """The scheduler's timestep (B,) as the transformer wants it."""
        return timestep

    def post_model(self, noise_pred: Tensor, batch: Req) -> Tensor:
        """The transformer's output -> the prediction for `batch.latents`, in their shape."""
        return noise_pred

    # after the loop
    def post_denoising_loop(self, latents: Tensor, batch: Req) -> Tensor:
        """The loop's latents -> (B, C, h, w)."""
        return latents

    def get_decode_scale_and_shift(self) -> tuple[float | Tensor, float | Tensor]:
        """(scale, shift): the autoencoder decodes latents / scale + shift. Tensors broadcast to (B, C, …)."""
        return float(self.vae_config["scaling_factor"]), float(self.vae_config.get("shift_factor") or 0.0)

    def post_decoding(self, image: Tensor, batch: Req) -> Tensor:
        """What the autoencoder decoded, in [-1, 1] -> [0, 1], (B, 3, H, W) or (B, 3, F, H, W)."""
        return (image * 0.5 + 0.5).clamp(0, 1)
