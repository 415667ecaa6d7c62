"""Wan's pipelines on the native runtime: standard stages, and what is special about Wan as callbacks.

Text to video (2.1; 2.2 A14B with a denoiser for high noise and one for low), and text and image to video of 2.2's 5B
(`expand_timesteps`: the given picture is the first latent frame, and its patches have time 0).

B: videos, z: latent channels, F, h, w: latent frames, rows and columns, S: patches, T: text tokens, (num_frames, H, W):
pixels.

The order of operations is that of diffusers' WanPipeline.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn

from conversions.wan.model import Table, TextCache, WanTransformer
from conversions.wan.prompt import UMT5, WanTextEncodingStage
from porter.core.errors import BadInputError
from runtime.config import PipelineConfig, SamplingParams, TaskType, TextEncoderSpec
from runtime.pipeline import ComposedPipelineBase
from runtime.quality import quality
from runtime.registry import register_configs, register_pipeline
from runtime.request import Req
from runtime.stages.text_encoding import module_device

# The text that the models are guided away from, word for word:
# https://github.com/Wan-Video/Wan2.1/blob/9737cba9c1c3c4d04b33fcad41c111989865d315/wan/configs/shared_config.py#L19
NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，"
    "静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)


@dataclass(frozen=True)
class WanSamplingParams(SamplingParams):
    height: int | None = 480
    width: int | None = 832
    num_frames: int | None = 81
    fps: int | None = 16
    num_inference_steps: int = 50
    guidance_scale: float | None = 5.0
    negative_prompt: str | None = NEGATIVE


@dataclass(frozen=True)
class WanA14BSamplingParams(WanSamplingParams):
    height: int | None = 720
    width: int | None = 1280
    num_inference_steps: int = 40
    guidance_scale: float | None = 4.0
    guidance_scale_2: float | None = 3.0


@dataclass(frozen=True)
class Wan5BSamplingParams(WanSamplingParams):
    height: int | None = 704
    width: int | None = 1280
    num_frames: int | None = 121
    fps: int | None = 24


@dataclass
class WanPipelineConfig(PipelineConfig):
    task_type: TaskType = TaskType.T2V
    cfg_field: str = "guidance_scale"
    cfg_without_negative: bool = True
    latents_precision: str | None = "float32"
    vae_precision: str | None = "float32"
    text_encoders: tuple[TextEncoderSpec, ...] = field(default=(UMT5,))

    def __post_init__(self) -> None:
        """Read the settings that stand in model_index.json.

        Raises:
            BadInputError: one is not what diffusers writes there.
        """
        boundary, expand = self.model_index.get("boundary_ratio"), self.model_index.get("expand_timesteps", False)
        number = isinstance(boundary, int | float) and not isinstance(boundary, bool) and 0 <= boundary <= 1
        if not isinstance(expand, bool) or not (boundary is None or number):
            raise BadInputError(
                "model_index.json: settings that are none of Wan's",
                expected="boundary_ratio null or a number from 0 to 1, expand_timesteps true or false",
                found=f"boundary_ratio {boundary!r}, expand_timesteps {expand!r}",
                hint="convert the model again: porter convert <model> -o <port> --overwrite",
            )
        self.expand_timesteps = expand
        self.boundary_ratio: float | None = boundary
        if boundary is not None:
            self.further_scales = ("guidance_scale_2",)
        if expand and self.task_type is TaskType.T2V:
            self.task_type = TaskType.TI2V

    # sizes
    def vae_scale_factor(self) -> int:
        return int(self.vae_config.get("scale_factor_spatial", 8))  # a config without it means Wan 2.1's

    def vae_temporal_factor(self) -> int:
        return int(self.vae_config.get("scale_factor_temporal", 4))

    def size_multiple(self) -> int:
        return self.vae_scale_factor() * max(self._patch()[1:])

    def prepare_latent_shape(self, batch: Req) -> tuple[int, ...]:
        """(B, z, F, h, w)."""
        assert batch.num_frames is not None and batch.height is not None and batch.width is not None
        frames, factor = (batch.num_frames - 1) // self.vae_temporal_factor() + 1, self.vae_scale_factor()
        return batch.batch_size, int(self.vae_config["z_dim"]), frames, batch.height // factor, batch.width // factor

    def _patch(self) -> tuple[int, ...]:
        return tuple(self.dit_config["patch_size"])

    # guidance, and which denoiser runs
    # https://github.com/Wan-Video/Wan2.2/blob/42bf4cfaa384bc21833865abc2f9e6c0e67233dc/wan/text2video.py#L186
    def _high_noise(self, timestep: Tensor) -> bool:
        """Whether a step's noise is the first denoiser's business."""
        if self.boundary_ratio is None:
            return True
        return bool(timestep >= self.boundary_ratio * self.scheduler_config["num_train_timesteps"])

    def select_transformer(self, transformers: Mapping[str, nn.Module], batch: Req, timestep: Tensor) -> str:
        return "transformer" if self._high_noise(timestep) else "transformer_2"

    def cfg_scale(self, batch: Req, step: int, timestep: Tensor) -> float | None:
        second = None if self._high_noise(timestep) else batch.guidance_scale_2
        return batch.guidance_scale if second is None else second

    # given pictures
    def prepare_image_latents(self, vae: Any, batch: Req, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The picture as the first latent frame (B, z, 1, h, w), float32."""
        assert batch.image
        return self.encode_video(vae, self.pixels(batch.image[0], batch), device).expand(
            batch.batch_size, -1, -1, -1, -1
        )

    def pixels(self, picture: Image.Image, batch: Req) -> Tensor:
        """A picture at the video's size -> (1, 3, 1, H, W) in [-1, 1]."""
        from diffusers.image_processor import VaeImageProcessor

        processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor())
        found: Tensor = processor.preprocess(picture.convert("RGB"), height=batch.height, width=batch.width)
        return found.unsqueeze(2)

    def encode_video(self, vae: Any, video: Tensor, device: torch.device) -> Tensor:
        """(1, 3, num_frames, H, W) -> the mode of its latents, normalised, float32."""
        latents = vae.encode(video.to(module_device(vae), vae.dtype)).latent_dist.mode().to(device, torch.float32)
        scale, shift = (part.to(latents) for part in self.get_decode_scale_and_shift())
        normalised: Tensor = (latents - shift) * scale
        return normalised

    # in the loop
    def get_freqs_cis(self, batch: Req, transformer: nn.Module, device: torch.device) -> Table:
        """The rotary table of the latents' patches."""
        assert isinstance(transformer, WanTransformer) and batch.raw_latent_shape is not None
        return transformer.rotary(batch.raw_latent_shape, device)

    def prepare_pos_cond_kwargs(self, batch: Req, freqs_cis: Any, device: torch.device) -> dict[str, Any]:
        return self.conditions(batch, batch.prompt_embeds[0], freqs_cis)

    def prepare_neg_cond_kwargs(self, batch: Req, freqs_cis: Any, device: torch.device) -> dict[str, Any]:
        return self.conditions(batch, batch.negative_prompt_embeds[0], freqs_cis)

    def conditions(self, batch: Req, text: Tensor, table: Table) -> dict[str, Any]:
        """The transformer's arguments for one of the prompts; text (B, T, X)."""
        return {"encoder_hidden_states": text, "rotary": table, "cache": TextCache()}

    # https://github.com/Wan-Video/Wan2.2/blob/42bf4cfaa384bc21833865abc2f9e6c0e67233dc/wan/textimage2video.py#L551
    def prepare_model_input(self, latents: Tensor, batch: Req) -> Tensor:
        """(B, z, F, h, w), its first frame the given picture if there is one."""
        if batch.image_latents is None:
            return latents
        return torch.cat((batch.image_latents, latents[:, :, 1:]), dim=2)

    def scale_timestep(self, timestep: Tensor, batch: Req) -> Tensor:
        """(B,), or with `expand_timesteps` (B, S): every patch's own time, 0 in a given frame.

        Without a given frame all patches have one time, and a time for each gives the same up to rounding.
        """
        if not self.expand_timesteps or (batch.image_latents is None and quality() != "exact"):
            return timestep
        assert batch.raw_latent_shape is not None
        frames, rows, columns = (n // p for n, p in zip(batch.raw_latent_shape[2:], self._patch(), strict=True))
        noisy = torch.ones(frames, rows * columns, device=timestep.device)
        if batch.image_latents is not None:
            noisy[0] = 0
        return noisy.flatten() * timestep[:, None]

    # after the loop
    def post_denoising_loop(self, latents: Tensor, batch: Req) -> Tensor:
        return WanPipelineConfig.prepare_model_input(self, latents, batch) if self.expand_timesteps else latents

    def get_decode_scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """(1 / standard deviation, mean) of each latent channel, (1, z, 1, 1, 1)."""
        mean, std = (
            torch.tensor(self.vae_config[name]).double().view(1, -1, 1, 1, 1)
            for name in ("latents_mean", "latents_std")
        )
        return 1 / std, mean


class WanPipeline(ComposedPipelineBase):
    """Text to video, of 2.2's 5B also text and image to video; Modular style: standard stages, callbacks above."""

    pipeline_name = "WanPipeline"
    native_models: ClassVar[Mapping[str, type[nn.Module]]] = {"WanTransformer3DModel": WanTransformer}
    _required_config_modules = ("scheduler", "text_encoder", "tokenizer", "transformer", "vae")
    _optional_config_modules = ("transformer_2",)

    def create_pipeline_stages(self) -> None:
        settle_denoisers(self)
        encoding = WanTextEncodingStage(
            {"text_encoder": self.modules["text_encoder"]}, {"tokenizer": self.modules["tokenizer"]}
        )
        if self.config.task_type is TaskType.T2V:
            self.add_standard_t2i_stages(text_encoding=encoding)
        else:
            self.add_standard_ti2v_stages(text_encoding=encoding)


def settle_denoisers(pipeline: ComposedPipelineBase) -> None:
    """Leave the denoisers that model_index.json's boundary_ratio means.

    Raises:
        BadInputError: there is a boundary, and no second denoiser beyond it.
    """
    assert isinstance(pipeline.config, WanPipelineConfig)
    second, boundary = pipeline.modules.get("transformer_2"), pipeline.config.boundary_ratio
    if boundary is not None and second is None:
        raise BadInputError(
            f"{pipeline.pipeline_name} lacks transformer_2",
            expected=f"the denoiser of the steps below boundary_ratio {boundary}",
            found=", ".join(pipeline.modules),
            hint="convert the model again: porter convert <model> -o <port> --overwrite",
        )
    if boundary is None and second is not None:
        pipeline.warnings.append("transformer_2 is not used: model_index.json has no boundary_ratio")
        del pipeline.modules["transformer_2"]


def has_two_denoisers(configs: Mapping[str, dict[str, Any]]) -> bool:
    """Whether these are component configs of Wan 2.2 A14B."""
    return "transformer_2" in configs


def has_many_channels(configs: Mapping[str, dict[str, Any]]) -> bool:
    """Whether these are component configs of Wan 2.2 5B, whose autoencoder has 48 latent channels."""
    return configs.get("vae", {}).get("z_dim") == 48


register_pipeline(WanPipeline)
register_configs(
    WanPipeline.pipeline_name,
    sampling_param_cls=WanSamplingParams,
    pipeline_config_cls=WanPipelineConfig,
    hf_model_paths=("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "Wan-AI/Wan2.1-T2V-14B-Diffusers"),
)
register_configs(
    WanPipeline.pipeline_name,
    sampling_param_cls=WanA14BSamplingParams,
    pipeline_config_cls=WanPipelineConfig,
    hf_model_paths=("Wan-AI/Wan2.2-T2V-A14B-Diffusers",),
    model_detectors=(has_two_denoisers,),
)
register_configs(
    WanPipeline.pipeline_name,
    sampling_param_cls=Wan5BSamplingParams,
    pipeline_config_cls=WanPipelineConfig,
    hf_model_paths=("Wan-AI/Wan2.2-TI2V-5B-Diffusers",),
    model_detectors=(has_many_channels,),
)
