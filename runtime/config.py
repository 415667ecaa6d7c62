"""What a family tells the standard stages: sampling defaults, facts of the architecture, and callbacks.

A family subclasses `PipelineConfig` and overrides only what is special about its model.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from porter.core.errors import UsageError
from runtime.request import Req


class TaskType(enum.Enum):
    T2I = "text to image"
    T2V = "text to video"
    I2V = "image to video"
    TI2V = "text and image to video"


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
    """Defaults of one model for what a request leaves unset; None says that the architecture decides, or no one."""

    seed: int = 0
    height: int | None = None
    width: int | None = None
    num_inference_steps: int = 28
    guidance_scale: float | None = None
    true_cfg_scale: float = 1.0

    def fill(self, batch: Req) -> None:
        """Set the fields that `batch` leaves at None."""
        for name in ("seed", "height", "width", "num_inference_steps", "guidance_scale", "true_cfg_scale"):
            if getattr(batch, name) is None:
                setattr(batch, name, getattr(self, name))


@dataclass
class PipelineConfig:
    """Facts and callbacks of a pipeline; the callbacks' defaults are those of a plain latent image model."""

    task_type: TaskType = TaskType.T2I
    vae_precision: str | None = None  # a torch dtype's name; None: as the autoencoder was loaded
    vae_tiling: bool = False
    should_use_guidance: bool = False  # whether the model takes the guidance scale as an input
    enable_autocast: bool = False
    attention_backend: str = "sdpa"
    text_encoders: tuple[TextEncoderSpec, ...] = ()
    dit_config: Mapping[str, Any] = field(default_factory=dict)  # transformer/config.json
    vae_config: Mapping[str, Any] = field(default_factory=dict)  # vae/config.json
    scheduler_config: Mapping[str, Any] = field(default_factory=dict)  # scheduler/scheduler_config.json

    # sizes
    def vae_scale_factor(self) -> int:
        """Pixels per latent position: each level of the autoencoder but the last halves the picture."""
        return int(2 ** (len(self.vae_config["block_out_channels"]) - 1))

    def default_size(self) -> tuple[int, int]:
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

    # before the loop
    def prepare_latent_shape(self, batch: Req) -> tuple[int, ...]:
        """Shape of the noise for `batch`, before packing."""
        assert batch.height is not None and batch.width is not None
        factor = self.vae_scale_factor()
        return batch.batch_size, int(self.vae_config["latent_channels"]), batch.height // factor, batch.width // factor

    def maybe_pack_latents(self, latents: Tensor, batch: Req) -> Tensor:
        """(B, C, h, w) -> the model's input."""
        return latents

    def prepare_sigmas(self, batch: Req) -> list[float] | None:
        """Noise levels for the scheduler to shift; None leaves them to the scheduler."""
        return batch.sigmas

    def prepare_mu(self, batch: Req) -> float | None:
        """Shift of the schedule that depends on the picture's size, or None."""
        return None

    # in the loop
    def get_freqs_cis(self, batch: Req, transformer: nn.Module, device: torch.device) -> Any:
        """Rotary tables, computed once before the loop and given to `prepare_*_cond_kwargs`."""
        return None

    def prepare_pos_cond_kwargs(self, batch: Req, freqs_cis: Any, device: torch.device) -> dict[str, Any]:
        """The transformer's keyword arguments besides latents and timestep."""
        return {"encoder_hidden_states": batch.prompt_embeds[0]}

    def prepare_neg_cond_kwargs(self, batch: Req, freqs_cis: Any, device: torch.device) -> dict[str, Any]:
        """The same for the negative prompt."""
        return {"encoder_hidden_states": batch.negative_prompt_embeds[0]}

    def scale_timestep(self, timestep: Tensor) -> Tensor:
        """The scheduler's timestep as the transformer wants it."""
        return timestep

    # after the loop
    def post_denoising_loop(self, latents: Tensor, batch: Req) -> Tensor:
        """The loop's latents -> (B, C, h, w)."""
        return latents

    def get_decode_scale_and_shift(self) -> tuple[float, float]:
        """(scale, shift): the autoencoder decodes latents / scale + shift."""
        return float(self.vae_config["scaling_factor"]), float(self.vae_config.get("shift_factor") or 0.0)

    def post_decoding(self, image: Tensor, batch: Req) -> Tensor:
        """Decoded picture in [-1, 1] -> [0, 1], both (B, 3, H, W)."""
        return (image * 0.5 + 0.5).clamp(0, 1)
