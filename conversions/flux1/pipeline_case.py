"""How parity runs FLUX.1's pipelines, diffusers' and the native ones, on the same port.

Kontext's and Fill's pictures are drawn here, in another size than the result's; nothing in them is symmetric.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from parity.case import PipelineCase, PipelineSide
from parity.stages import Request
from runtime.image import to_pil
from runtime.loader import quiet_libraries, read_index
from runtime.registry import load

PROMPT = "a large red circle left of a small blue square, on a white background"
NEGATIVE = "a green triangle", 2.5
TEXT, KONTEXT, FILL = "FluxPipeline", "FluxKontextPipeline", "FluxFillPipeline"


def diffusers_pipeline(port: Path, dtype: torch.dtype) -> PipelineSide:
    """diffusers' pipeline of a port on the CPU."""
    name = read_index(port)["_class_name"]
    with quiet_libraries():
        import diffusers
        from diffusers.image_processor import VaeImageProcessor

        pipe: Any = getattr(diffusers, name).from_pretrained(
            port, dtype=dtype, low_cpu_mem_usage=False, use_safetensors=True
        )
    pipe.set_progress_bar_config(disable=True)

    def run(request: Request) -> Tensor:
        count = len(request.prompts)
        height, width = _size(request, pipe.vae.config.sample_size, 2 * pipe.vae_scale_factor)
        image, mask = _pictures(height, width)
        given: dict[str, Any] = {}
        if request.negative:
            given |= {"negative_prompt": [request.negative[0]] * count, "true_cfg_scale": request.negative[1]}
        if name == KONTEXT:
            given |= {"image": image, "max_area": height * width, "_auto_resize": False}
        if name == FILL:
            given |= {"image": [image] * count, "mask_image": [mask] * count}  # each is drawn with its own generator
        pictures: Tensor = pipe(
            prompt=request.prompts,
            height=height,
            width=width,
            num_inference_steps=request.steps,
            guidance_scale=request.guidance,
            generator=[torch.Generator().manual_seed(request.seed + i) for i in range(count)],
            max_sequence_length=min(512, pipe.tokenizer_2.model_max_length),
            output_type="pt",
            **given,
        ).images
        return pictures

    def save(image: Tensor) -> Tensor:
        return _levels(VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(image)))

    return _side(pipe.components, run=run, save=save)


def native_pipeline(port: Path, dtype: torch.dtype) -> PipelineSide:
    """The native pipeline of a port on the CPU."""
    pipe = load(port, dtype=dtype, device="cpu", executor="native")

    def run(request: Request) -> Tensor:
        height, width = _size(request, pipe.config.vae_config["sample_size"], pipe.config.size_multiple())
        negative, scale = request.negative or (None, None)
        image, mask = _pictures(height, width)
        given: dict[str, Any] = {}
        if pipe.pipeline_name == KONTEXT:
            given = {"image": [image], "extra": {"auto_resize": False}}
        if pipe.pipeline_name == FILL:
            given = {"image": [image], "mask_image": mask}
        answer = pipe.generate(
            request.prompts, negative_prompt=negative, true_cfg_scale=scale, height=height, width=width,
            seed=request.seed, num_inference_steps=request.steps, guidance_scale=request.guidance, **given,
        )  # fmt: skip
        assert answer.output is not None  # the last stage verified it
        return answer.output

    return _side(pipe.modules, run=run, save=lambda image: _levels(to_pil(image)))


def _size(request: Request, side: int, multiple: int) -> tuple[int, int]:
    height, width = (max(multiple, int(part * side) // multiple * multiple) for part in request.part)
    return height, width


def _pictures(height: int, width: int) -> tuple[Image.Image, Image.Image]:
    """A picture to edit, and a mask, for a result of `height` x `width` pixels."""
    down, across = height * 3 // 4 + 5, width * 5 // 4 + 3
    image, mask = Image.new("RGB", (across, down), (200, 180, 40)), Image.new("L", (across, down))
    draw = ImageDraw.Draw(image)
    draw.ellipse((across // 8, down // 6, across // 2, down // 2), (20, 60, 220))
    draw.line((0, down, across, down // 3), (240, 240, 240), 3)
    ImageDraw.Draw(mask).rectangle((across // 3, down // 4, across * 4 // 5, down), 255)
    return image, mask


def _levels(pictures: list[Any]) -> Tensor:
    """PIL pictures -> uint8 (B, 3, H, W)."""
    return torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1) for p in pictures])


def _side(modules: Mapping[str, Any], *, run: Any, save: Any) -> PipelineSide:
    clip, t5, transformer, vae = (modules[n] for n in ("text_encoder", "text_encoder_2", "transformer", "vae"))
    stages: dict[str, nn.Module] = {"text_encoder": clip, "text_encoder_2": t5, "denoiser": transformer}
    return PipelineSide(
        stages | {"decoder": vae.decoder}, (clip, t5, transformer, vae), modules["scheduler"], run, save
    )


_CASE = PipelineCase(diffusers_pipeline, native_pipeline, PROMPT, 8, 3.5, own=("rotary",), negative=NEGATIVE)
PIPELINES = {
    TEXT: _CASE,
    KONTEXT: replace(_CASE, guidance=2.5),
    FILL: replace(_CASE, guidance=30.0, negative=None),  # diffusers' takes no negative prompt
}
