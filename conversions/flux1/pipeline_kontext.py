"""FLUX.1 Kontext's pipeline on the native runtime: a picture to edit, whose tokens follow those of the noise.

B: images, h, w: latent positions, S: tokens of the noise, R: tokens of the given picture, C: latent channels.

The order of operations is that of diffusers' FluxKontextPipeline. Deviations: a height and a width that are asked for
are kept, where diffusers makes another pair of them with `max_area` pixels; one picture serves all prompts of a batch,
where diffusers also takes one for each; pictures that are not RGB are made so, where diffusers fails.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from conversions.flux1.pipeline import FluxPipeline, FluxPipelineConfig, FluxSamplingParams, grid
from runtime.config import TaskType
from runtime.image import to_pixels
from runtime.registry import register_configs, register_pipeline
from runtime.request import Req
from runtime.stages.input_validation import MAX_SIDE

# (width, height) that the model was trained with
# https://github.com/black-forest-labs/flux/blob/802fb4713906133fcbd0d8dc5351620ca4773036/src/flux/util.py#L616
_UPRIGHT = (
    (672, 1568),
    (688, 1504),
    (720, 1456),
    (752, 1392),
    (800, 1328),
    (832, 1248),
    (880, 1184),
    (944, 1104),
)
PREFERRED = (*_UPRIGHT, (1024, 1024), *((width, height) for height, width in _UPRIGHT))


@dataclass(frozen=True)
class FluxKontextSamplingParams(FluxSamplingParams):
    """Defaults.

    Attributes:
        max_area: pixels of a result whose height or width nobody names; it is square.
        auto_resize: whether the given picture is brought to the nearest size of `PREFERRED`, or keeps its own.
    """

    max_area: int = 1024 * 1024
    auto_resize: bool = True


@dataclass
class FluxKontextPipelineConfig(FluxPipelineConfig):
    task_type: TaskType = TaskType.TI2I

    def images(self) -> tuple[int, int | None]:
        return 0, 1  # without one it is text to image

    def default_size(self, batch: Req) -> tuple[int, int]:
        multiple = self.size_multiple()
        side = round(batch.extra["max_area"] ** 0.5) // multiple * multiple
        return side, side

    def verify_request(self, batch: Req) -> Iterator[tuple[str, Any, bool, str]]:
        multiple, given = self.size_multiple(), batch.extra
        if "max_area" in given:
            area = given["max_area"]
            whole = isinstance(area, int) and not isinstance(area, bool) and multiple**2 <= area <= MAX_SIDE**2
            yield "max_area", area, whole, f"a whole number of pixels from {multiple**2} to {MAX_SIDE**2}"
        if "auto_resize" in given:
            yield "auto_resize", given["auto_resize"], isinstance(given["auto_resize"], bool), "true or false"
        sizes = [each.size for each in batch.image or [] if isinstance(each, Image.Image)]
        yield "image", sizes, all(min(size) >= multiple for size in sizes), f"{multiple} pixels on each side, or more"
        latents = batch.image_latents
        yield "image_latents", latents, latents is None or bool(batch.image), "beside the picture whose they are"

    # https://github.com/black-forest-labs/flux/blob/802fb4713906133fcbd0d8dc5351620ca4773036/src/flux/sampling.py#L210
    def picture_size(self, batch: Req) -> tuple[int, int]:
        """Height and width in pixels that the given picture is encoded at."""
        (picture,), multiple = batch.image or [], self.size_multiple()
        width, height = (side // multiple * multiple for side in picture.size)
        if batch.extra["auto_resize"]:
            shape = width / height
            width, height = min(PREFERRED, key=lambda size: (abs(shape - size[0] / size[1]), size))
        return height // multiple * multiple, width // multiple * multiple

    def prepare_image_latents(self, vae: Any, batch: Req, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """The mean of the picture's latents, packed: (B, R, 4 C)."""
        (picture,), (height, width) = batch.image or [], self.picture_size(batch)
        pixels = to_pixels(picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS))  # (3, H, W)
        mean = self.encode(vae, pixels, device).mode()  # (1, C, h, w)
        packed = self.maybe_pack_latents(self.normalise(mean), batch)  # (1, R, 4 C)
        return packed.to(dtype).expand(batch.batch_size, -1, -1)

    def _ids(self, batch: Req, device: torch.device) -> tuple[Tensor, Tensor]:
        """Positions: text (T, 3) all zero; noise (S, 3) as (0, row, column), the picture (R, 3) as (1, row, column)."""
        text, noise = super()._ids(batch, device)
        if not batch.image:
            return text, noise
        height, width = (side // self.vae_scale_factor() for side in self.picture_size(batch))
        return text, torch.cat((noise, grid(1, height, width).to(device)))

    def prepare_model_input(self, latents: Tensor, batch: Req) -> Tensor:
        """(B, S, 4 C) -> (B, S + R, 4 C): the noise, and behind it the picture."""
        return latents if batch.image_latents is None else torch.cat((latents, batch.image_latents), dim=1)

    def post_model(self, noise_pred: Tensor, batch: Req) -> Tensor:
        """(B, S + R, 4 C) -> (B, S, 4 C): what is predicted for the picture has no meaning."""
        assert batch.latents is not None
        return noise_pred[:, : batch.latents.shape[1]]


class FluxKontextPipeline(FluxPipeline):
    """Text and a picture to image; Modular style: the standard stages and the callbacks above."""

    pipeline_name = "FluxKontextPipeline"

    def create_pipeline_stages(self) -> None:
        self.add_standard_ti2i_stages()


register_pipeline(FluxKontextPipeline)
register_configs(
    FluxKontextPipeline.pipeline_name,
    sampling_param_cls=FluxKontextSamplingParams,
    pipeline_config_cls=FluxKontextPipelineConfig,
    hf_model_paths=("black-forest-labs/FLUX.1-Kontext-dev",),
)
