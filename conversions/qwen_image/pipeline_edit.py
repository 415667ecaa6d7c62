"""Qwen-Image-Edit's pipelines on the native runtime: given pictures enter through the language model and as latents.

B: images, h, w: latent positions, C: latent channels.

The order of operations is that of diffusers' QwenImageEditPipeline and QwenImageEditPlusPipeline. Deviations: the
language model gets the processor's `mm_token_type_ids`, so that the tokens of a picture stand in rows and columns, as
when the model was released; diffusers (https://github.com/huggingface/diffusers/issues/14194) leaves them out, after
which transformers 5 counts them like text. Several prompts may edit the same pictures at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn

from conversions.qwen_image.model import QwenImageTransformer, Shape
from conversions.qwen_image.pipeline_base import (
    PromptEncodingStage,
    QwenImagePipelineConfig,
    QwenImageSamplingParams,
)
from runtime.config import TaskType
from runtime.image import to_pixels
from runtime.layers import pack
from runtime.pipeline import ComposedPipelineBase
from runtime.registry import register_configs, register_pipeline
from runtime.request import Req

GRID = 32  # pixels: sides of pictures that are brought to an area are multiples of it
PLACES = ("<|image_pad|>", "<|video_pad|>")
ROOM = "<|vision_start|><|image_pad|><|vision_end|>"  # a picture's place among the prompt's tokens


@dataclass(frozen=True)
class QwenImageEditSamplingParams(QwenImageSamplingParams):
    max_sequence_length: int | None = None  # tokens of pictures count too, and none may be cut off


@dataclass
class QwenImageEditPipelineConfig(QwenImagePipelineConfig):
    """One picture, which the language model and the autoencoder see at the same size.

    Attributes:
        most_pictures: how many pictures a request may bring; None: any number.
        seen_area: pixels of a picture for the language model.
        encoded_area: pixels of a picture for the autoencoder, and of the result where no size is asked for.
        label: what stands before the prompt for each picture, with {} for its number.
    """

    task_type: TaskType = TaskType.TI2I
    template: str = (
        "<|im_start|>system\nDescribe the key features of the input image (color, shape, size, texture, objects, "
        "background), then explain how the user's text instruction should alter or modify the image. Generate a new "
        "image that meets the user's requirements while maintaining consistency with the original input where "
        "appropriate.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    )
    dropped: int = 64
    most_pictures: int | None = 1
    seen_area: int = 1024 * 1024
    encoded_area: int = 1024 * 1024
    label: str = ROOM

    def images(self) -> tuple[int, int | None]:
        return 1, self.most_pictures

    def verify_request(self, batch: Req) -> Iterator[tuple[str, Any, bool, str]]:
        """A prompt that is taken whole and holds no marks of pictures; pictures with both sides left at their area."""
        yield from super().verify_request(batch)
        tokens = batch.max_sequence_length
        yield "max_sequence_length", tokens, tokens is None, "nothing: prompt and pictures are taken whole"
        for name in ("prompt", "negative_prompt"):
            fits = not any(mark in str(getattr(batch, name)) for mark in PLACES)
            yield name, getattr(batch, name), fits, f"text without {' and '.join(PLACES)}, which stand for pictures"
        area = min(self.seen_area, self.encoded_area)
        for picture in (each for each in _pictures(batch) if isinstance(each, Image.Image)):
            expected = f"a shape nearer to a square: at {area} pixels a side is shorter than {GRID // 2}"
            yield "image", f"{picture.width} x {picture.height} pixels", min(_sides(picture, area)) > 0, expected

    def default_size(self, batch: Req) -> tuple[int, int]:
        """The last picture's shape."""
        multiple = self.size_multiple()
        height, width = _sides(_pictures(batch)[-1], self.encoded_area)
        return height // multiple * multiple, width // multiple * multiple

    def image_shapes(self, batch: Req) -> list[Shape]:
        sides = (_sides(picture, self.encoded_area) for picture in _pictures(batch))
        token = self.size_multiple()
        return [*super().image_shapes(batch), *((1, height // token, width // token) for height, width in sides)]

    def seen(self, batch: Req) -> list[Image.Image]:
        """The pictures as the language model's processor gets them."""
        return [_resized(picture, self.seen_area) for picture in _pictures(batch)]

    # https://github.com/modelscope/DiffSynth-Studio/blob/fed7b18fac2ed4cb802796eec91970e7659bccde/diffsynth/pipelines/qwen_image.py#L558
    def prepare_image_latents(self, vae: Any, batch: Req, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """The mean of each picture's latents, normalised and packed, one behind the other -> (B, tokens, 4 C)."""
        mean, std = self.latent_statistics()
        packed = []
        for picture in _pictures(batch):
            pixels = to_pixels(_resized(picture, self.encoded_area)).to(device, dtype)  # (3, H, W)
            latents = vae.encode(pixels[None, :, None].to(vae.dtype)).latent_dist.mode()  # (1, C, 1, h, w)
            latents = (latents - mean.to(latents)) / std.to(latents)
            packed.append(pack(latents[:, :, 0]))  # (1, h * w / 4, 4 C)
        return torch.cat(packed, dim=1).to(dtype).expand(batch.batch_size, -1, -1)

    def prepare_model_input(self, latents: Tensor, batch: Req) -> Tensor:
        """The noise, and behind it the given pictures."""
        assert batch.image_latents is not None
        return torch.cat((latents, batch.image_latents), dim=1)

    def post_model(self, noise_pred: Tensor, batch: Req) -> Tensor:
        """What was predicted for the noise; the rest has no meaning."""
        assert batch.latents is not None
        return noise_pred[:, : batch.latents.shape[1]]


@dataclass
class QwenImageEditPlusPipelineConfig(QwenImageEditPipelineConfig):
    """Several pictures, each with a number; the language model sees them smaller."""

    most_pictures: int | None = None
    seen_area: int = 384 * 384
    label: str = "Picture {}: " + ROOM


class EditPromptEncodingStage(PromptEncodingStage):
    """Prompt and pictures together, through the language model and its processor."""

    def inputs(self, texts: list[str], batch: Req, config: QwenImagePipelineConfig) -> dict[str, Tensor]:
        assert isinstance(config, QwenImageEditPipelineConfig)
        seen = config.seen(batch)
        labels = "".join(config.label.format(i + 1) for i in range(len(seen)))
        filled = [config.template.format(labels + text) for text in texts]
        pictures = seen * len(texts)  # one prompt's after another's
        return dict(self.tokenizer(text=filled, images=pictures, padding=True, return_tensors="pt"))


class QwenImageEditPipeline(ComposedPipelineBase):
    """Text and a picture to image; Modular style: the standard stages and the callbacks above."""

    pipeline_name = "QwenImageEditPipeline"
    native_models: ClassVar[Mapping[str, type[nn.Module]]] = {"QwenImageTransformer2DModel": QwenImageTransformer}
    _required_config_modules = ("scheduler", "text_encoder", "tokenizer", "processor", "transformer", "vae")

    def create_pipeline_stages(self) -> None:
        stage = EditPromptEncodingStage(self.modules["text_encoder"], self.modules["processor"])
        self.add_standard_ti2i_stages(text_encoding=stage)


class QwenImageEditPlusPipeline(QwenImageEditPipeline):
    """The same for several pictures."""

    pipeline_name = "QwenImageEditPlusPipeline"


def _pictures(batch: Req) -> list[Image.Image]:
    return list(batch.image or [])


def _sides(picture: Image.Image, area: int) -> tuple[int, int]:
    """Height and width near `area` pixels in the picture's shape, multiples of `GRID`."""
    ratio = picture.width / picture.height
    width = math.sqrt(area * ratio)
    height = width / ratio
    return round(height / GRID) * GRID, round(width / GRID) * GRID


def _resized(picture: Image.Image, area: int) -> Image.Image:
    height, width = _sides(picture, area)
    return picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)


register_pipeline(QwenImageEditPipeline)
register_configs(
    QwenImageEditPipeline.pipeline_name,
    sampling_param_cls=QwenImageEditSamplingParams,
    pipeline_config_cls=QwenImageEditPipelineConfig,
    hf_model_paths=("Qwen/Qwen-Image-Edit",),
)
register_pipeline(QwenImageEditPlusPipeline)
register_configs(
    QwenImageEditPlusPipeline.pipeline_name,
    sampling_param_cls=QwenImageEditSamplingParams,
    pipeline_config_cls=QwenImageEditPlusPipelineConfig,
    hf_model_paths=("Qwen/Qwen-Image-Edit-2509", "Qwen/Qwen-Image-Edit-2511"),
)
