"""Wan's image-to-video pipeline on the native runtime: first frame, first and last frame.

Of 2.1 the model also sees the picture's tokens by CLIP; 2.2 A14B has none. 2.2's 5B is as in `pipeline.py`.

B: videos, z: latent channels, F, h, w: latent frames, rows and columns, t: frames of a latent frame, I: pictures,
M: tokens of a picture, V: width of such a token, (num_frames, H, W): pixels.

The order of operations is that of diffusers' WanImageToVideoPipeline. Deviations: a picture's video is encoded once,
not once for each video of a batch; CLIP's tokens are repeated for each video, not for each prompt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from conversions.wan.model import Table
from conversions.wan.pipeline import (
    NEGATIVE,
    WanPipeline,
    WanPipelineConfig,
    WanSamplingParams,
    has_many_channels,
    has_two_denoisers,
)
from porter.core.errors import BadInputError, UsageError
from runtime.config import TaskType
from runtime.registry import register_configs, register_pipeline
from runtime.request import Req
from runtime.stages.text_encoding import module_device

# https://github.com/Wan-Video/Wan2.1/blob/9737cba9c1c3c4d04b33fcad41c111989865d315/wan/configs/wan_i2v_14B.py#L11
NEGATIVE_I2V = "镜头晃动，" + NEGATIVE


@dataclass(frozen=True)
class WanI2VSamplingParams(WanSamplingParams):
    height: int | None = None  # the picture's shape decides
    width: int | None = None
    num_inference_steps: int = 40
    negative_prompt: str | None = NEGATIVE_I2V


@dataclass(frozen=True)
class WanFLF2VSamplingParams(WanI2VSamplingParams):
    num_inference_steps: int = 50


@dataclass(frozen=True)
class WanA14BI2VSamplingParams(WanI2VSamplingParams):
    guidance_scale: float | None = 3.5
    guidance_scale_2: float | None = 3.5
    negative_prompt: str | None = NEGATIVE


@dataclass(frozen=True)
class Wan5BI2VSamplingParams(WanI2VSamplingParams):
    num_frames: int | None = 121
    fps: int | None = 24
    num_inference_steps: int = 50
    negative_prompt: str | None = NEGATIVE


@dataclass
class WanI2VPipelineConfig(WanPipelineConfig):
    task_type: TaskType = TaskType.I2V
    area: int = 480 * 832  # pixels of a frame when the request does not say its size

    def __post_init__(self) -> None:
        super().__post_init__()
        self.picture_tokens = self.dit_config.get("image_dim") is not None  # CLIP's tokens
        self.picture_pairs = self.dit_config.get("pos_embed_seq_len") is not None
        # CLIP's tokens of two pictures are one row only for models with positions for both.
        self.takes_last_image = not self.expand_timesteps and (self.picture_pairs or not self.picture_tokens)

    # https://github.com/Wan-Video/Wan2.1/blob/9737cba9c1c3c4d04b33fcad41c111989865d315/wan/image2video.py#L186
    def default_size(self, batch: Req) -> tuple[int, int]:
        """The picture's shape at `area` pixels."""
        if not batch.image:
            return super().default_size(batch)
        width, height = batch.image[0].size
        multiple, ratio = self.size_multiple(), height / width
        sides = (round(math.sqrt(self.area * ratio)), round(math.sqrt(self.area / ratio)))
        high, wide = (max(multiple, side // multiple * multiple) for side in sides)
        return high, wide

    # https://github.com/Wan-Video/Wan2.1/blob/9737cba9c1c3c4d04b33fcad41c111989865d315/wan/modules/clip.py#L535
    def encode_image(self, image_encoder: Any, image_processor: Any, batch: Req) -> list[Tensor]:
        """CLIP's last hidden states but one: (B, I * M, V), of the first picture, then of the last."""
        assert batch.image
        pictures = [each.convert("RGB") for each in (batch.image[0], batch.last_image) if each is not None]
        if self.picture_pairs and len(pictures) == 1:
            raise UsageError(
                "this model makes a video between two pictures, and there is one",
                expected="the first and the last picture", hint="give the last one too: --last-image FILE",
            )  # fmt: skip
        pixels = image_processor(images=pictures, return_tensors="pt").to(module_device(image_encoder))
        hidden = image_encoder(**pixels, output_hidden_states=True).hidden_states[-2]  # (I, M, V)
        return [hidden.flatten(0, 1).expand(batch.batch_size, -1, -1)]

    def conditions(self, batch: Req, text: Tensor, table: Table) -> dict[str, Any]:
        found = super().conditions(batch, text, table)
        if self.picture_tokens and batch.image_embeds:
            pictures = 2 if self.picture_pairs else 1
            rows = batch.image_embeds[0].unflatten(1, (pictures, -1)).flatten(0, 1)  # (B * I, M, V)
            found["encoder_hidden_states_image"] = rows.to(text.dtype)
        return found

    # https://github.com/Wan-Video/Wan2.1/blob/9737cba9c1c3c4d04b33fcad41c111989865d315/wan/image2video.py#L210
    # Last frame: wan/first_last_frame2video.py#L231.
    def prepare_image_latents(self, vae: Any, batch: Req, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Which frames are given, and the latents of a video that is grey but for them: (B, t + z, F, h, w)."""
        if self.expand_timesteps:
            return super().prepare_image_latents(vae, batch, dtype, device)
        assert batch.image and batch.raw_latent_shape is not None and batch.num_frames is not None
        count, _, frames, rows, columns = batch.raw_latent_shape
        first = self.pixels(batch.image[0], batch)  # (1, 3, 1, H, W)
        video = first.new_zeros(1, 3, batch.num_frames, *first.shape[-2:])
        given = torch.zeros(1, self.vae_temporal_factor(), frames, rows, columns, device=device)
        video[:, :, :1], given[:, :, 0] = first, 1
        if batch.last_image is not None:
            if batch.num_frames == 1:
                raise UsageError(
                    "num_frames: a first and a last picture are two frames", expected="5 or more", found="1",
                    hint="--num-frames 81, or no --last-image",
                )  # fmt: skip
            video[:, :, -1:], given[:, -1, -1] = self.pixels(batch.last_image, batch), 1
        known = torch.cat((given, self.encode_video(vae, video, device)), dim=1)
        return known.expand(count, -1, -1, -1, -1)

    def prepare_model_input(self, latents: Tensor, batch: Req) -> Tensor:
        """(B, z + t + z, F, h, w)."""
        if self.expand_timesteps:
            return super().prepare_model_input(latents, batch)
        assert batch.image_latents is not None
        return torch.cat((latents, batch.image_latents), dim=1)


class WanImageToVideoPipeline(WanPipeline):
    """Text and image to video; Modular style: the standard stages and the callbacks above."""

    pipeline_name = "WanImageToVideoPipeline"
    _optional_config_modules = ("transformer_2", "image_encoder", "image_processor")

    def create_pipeline_stages(self) -> None:
        assert isinstance(self.config, WanI2VPipelineConfig)
        eyes = [name for name in ("image_encoder", "image_processor") if self.modules.get(name) is not None]
        if self.config.picture_tokens and len(eyes) < 2:
            raise BadInputError(
                f"{self.pipeline_name} lacks image_encoder or image_processor",
                expected="both, as the transformer's config.json has image_dim",
                found=", ".join(self.modules),
                hint="convert the model again: porter convert <model> -o <port> --overwrite",
            )
        if not self.config.picture_tokens:  # diffusers does not run it then either
            for name in eyes:
                del self.modules[name]
        super().create_pipeline_stages()


def has_both_positions(configs: Mapping[str, dict[str, Any]]) -> bool:
    """Whether these are component configs of a model for first and last frame."""
    return configs.get("transformer", {}).get("pos_embed_seq_len") is not None


@dataclass
class WanLargeI2VPipelineConfig(WanI2VPipelineConfig):
    area: int = 720 * 1280


@dataclass
class Wan5BI2VPipelineConfig(WanI2VPipelineConfig):
    area: int = 704 * 1280


register_pipeline(WanImageToVideoPipeline)
register_configs(
    WanImageToVideoPipeline.pipeline_name,
    sampling_param_cls=WanI2VSamplingParams,
    pipeline_config_cls=WanI2VPipelineConfig,
    hf_model_paths=("Wan-AI/Wan2.1-I2V-14B-480P-Diffusers",),
)
register_configs(
    WanImageToVideoPipeline.pipeline_name,
    sampling_param_cls=WanI2VSamplingParams,
    pipeline_config_cls=WanLargeI2VPipelineConfig,
    hf_model_paths=("Wan-AI/Wan2.1-I2V-14B-720P-Diffusers",),
)
register_configs(
    WanImageToVideoPipeline.pipeline_name,
    sampling_param_cls=WanFLF2VSamplingParams,
    pipeline_config_cls=WanLargeI2VPipelineConfig,
    hf_model_paths=("Wan-AI/Wan2.1-FLF2V-14B-720P-diffusers",),
    model_detectors=(has_both_positions,),
)
register_configs(
    WanImageToVideoPipeline.pipeline_name,
    sampling_param_cls=WanA14BI2VSamplingParams,
    pipeline_config_cls=WanLargeI2VPipelineConfig,
    hf_model_paths=("Wan-AI/Wan2.2-I2V-A14B-Diffusers",),
    model_detectors=(has_two_denoisers,),
)
register_configs(
    WanImageToVideoPipeline.pipeline_name,
    sampling_param_cls=Wan5BI2VSamplingParams,
    pipeline_config_cls=Wan5BI2VPipelineConfig,
    model_detectors=(has_many_channels,),
)
