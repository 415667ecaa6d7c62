"""FLUX.1 Fill's pipeline on the native runtime: a picture and a mask, which the model gets beside the noise's channels.

B: images, H, W: pixels, h, w: latent positions, F: pixels of one along a side, S: image tokens, C: latent channels.

The order of operations is that of diffusers' FluxFillPipeline at full strength. Deviations: the latents of the masked
picture are drawn for each image of the batch by its own generator, as diffusers does for one image, or for a batch with
the picture given once for each: so an image does not depend on its batch. A negative prompt guides as in FluxPipeline,
where diffusers takes none. Pictures that are not RGB are made so, where diffusers fails.
The original keeps the mask's shades; here, as in diffusers, it is black or white.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from conversions.flux1.pipeline import FluxPipeline, FluxPipelineConfig, FluxSamplingParams
from porter.core.errors import BadInputError
from runtime.config import PipelineConfig, TaskType
from runtime.image import to_pixels
from runtime.registry import register_configs, register_pipeline
from runtime.request import Req
from runtime.stages import LatentPreparationStage
from runtime.stages.text_encoding import module_dtype


@dataclass(frozen=True)
class FluxFillSamplingParams(FluxSamplingParams):
    num_inference_steps: int = 50
    guidance_scale: float | None = 30.0


@dataclass
class FluxFillPipelineConfig(FluxPipelineConfig):
    task_type: TaskType = TaskType.TI2I
    takes_mask: bool = True

    def images(self) -> tuple[int, int | None]:
        return 1, 1

    def verify_request(self, batch: Req) -> Iterator[tuple[str, Any, bool, str]]:
        yield "mask_image", batch.mask_image, batch.mask_image is not None, "a picture, white where to paint"
        noise_only = not batch.sigmas or batch.sigmas[0] == 1
        yield "sigmas", batch.sigmas, noise_only, "1 as the first: the loop begins with noise alone"

    # https://github.com/black-forest-labs/flux/blob/802fb4713906133fcbd0d8dc5351620ca4773036/src/flux/sampling.py#L107
    def prepare_image_latents(self, vae: Any, batch: Req, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """What is kept of the picture, and where: (B, S, 4 C + 4 F F), of each token the latents, then the mask."""
        assert batch.height is not None and batch.width is not None and batch.generator is not None  # verified
        (picture,), mask = batch.image or [], batch.mask_image
        assert mask is not None  # verified
        size, how = (batch.width, batch.height), Image.Resampling.LANCZOS
        painted = torch.from_numpy(np.asarray(mask.resize(size, how).convert("L")) >= 128)[None].float()  # (1, H, W)
        kept = to_pixels(picture.convert("RGB").resize(size, how)) * (1 - painted)  # (3, H, W); 0 is grey
        found = self.encode(vae, kept, device)
        drawn = torch.cat([found.sample(generator) for generator in batch.generator])  # (B, C, h, w)
        latents = self.maybe_pack_latents(self.normalise(drawn), batch)  # (B, S, 4 C)
        pixels = torch.pixel_unshuffle(painted, self.vae_scale_factor())[None]  # (1, F F, h, w)
        places = self.maybe_pack_latents(pixels, batch).expand(len(latents), -1, -1)  # (B, S, 4 F F)
        return torch.cat((latents.to(dtype), places.to(device, dtype)), dim=-1)

    def prepare_model_input(self, latents: Tensor, batch: Req) -> Tensor:
        """(B, S, 4 C) -> (B, S, 8 C + 4 F F)."""
        assert batch.image_latents is not None
        return torch.cat((latents, batch.image_latents), dim=-1)


class FillLatentPreparationStage(LatentPreparationStage):
    """Noise, as diffusers draws it: behind a sample of the picture's latents, of which full strength keeps nothing."""

    def forward(self, batch: Req, config: PipelineConfig) -> Req:
        if batch.latents is None:
            assert batch.generator is not None  # verified
            shape, dtype = (1, *config.prepare_latent_shape(batch)[1:]), module_dtype(self.transformer)
            for generator in batch.generator:
                torch.randn(shape, generator=generator, device=generator.device, dtype=dtype)
        return super().forward(batch, config)


class FluxFillPipeline(FluxPipeline):
    """Text, a picture and a mask to image; Modular style: the standard stages, the noise drawn a little later."""

    pipeline_name = "FluxFillPipeline"

    def create_pipeline_stages(self) -> None:
        self._check_width()
        self.add_standard_ti2i_stages(latent_preparation=FillLatentPreparationStage(self.modules["transformer"]))

    def _check_width(self) -> None:
        """Refuse a transformer that takes no picture and mask."""
        channels, pixels = self.config.vae_config["latent_channels"], self.config.vae_scale_factor() ** 2
        expected, found = 4 * (2 * channels + pixels), self.config.dit_config["in_channels"]
        if found != expected:
            raise BadInputError(
                f"{self.pipeline_name} runs on a transformer that also takes a picture and a mask",
                expected=f"in_channels {expected}: 4 x ({channels} + {channels} channels + {pixels} of the mask)",
                found=f"in_channels {found}",
                hint="name the pipeline that the transformer is of in model_index.json: _class_name",
            )


register_pipeline(FluxFillPipeline)
register_configs(
    FluxFillPipeline.pipeline_name,
    sampling_param_cls=FluxFillSamplingParams,
    pipeline_config_cls=FluxFillPipelineConfig,
    hf_model_paths=("black-forest-labs/FLUX.1-Fill-dev",),
)
