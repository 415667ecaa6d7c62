"""What parity must know about GLM-Image: how diffusers' pipeline and the native one are asked for the same pictures.

Its weights were published in diffusers' layout, so there is no component to compare with other original code.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from parity.case import FamilyCases, PipelineCase, PipelineSide
from parity.stages import Request
from runtime.image import to_pil
from runtime.loader import quiet_libraries
from runtime.registry import load
from runtime.request import Req

# Both prompts quote texts of one length: in a batch diffusers shows the model the padding of shorter ones.
PROMPT = 'a large red sign that says "OPEN", on a white background'
OTHER = 'a small blue door, and above it "SHUT"'


def diffusers_pipeline(port: Path, dtype: torch.dtype) -> PipelineSide:
    """diffusers.GlmImagePipeline of a port on the CPU."""
    with quiet_libraries():
        from diffusers import GlmImagePipeline
        from diffusers.image_processor import VaeImageProcessor

        pipe: Any = GlmImagePipeline.from_pretrained(port, dtype=dtype, low_cpu_mem_usage=False, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)

    def run(request: Request) -> Tensor:
        height, width = _size(request, pipe.vae.config.sample_size)
        generators = [torch.Generator().manual_seed(request.seed + i) for i in range(len(request.prompts))]
        with quiet_libraries(), torch.no_grad():
            # A whole batch's tokens would follow the first seed; each picture's are to follow its own.
            prior = [
                pipe.generate_prior_tokens(prompt, height, width, device=pipe.device, generator=generator)[0]
                for prompt, generator in zip(request.prompts, generators, strict=True)
            ]
            image: Tensor = pipe(
                request.prompts,
                prior_token_ids=torch.cat(prior),
                height=height,
                width=width,
                num_inference_steps=request.steps,
                guidance_scale=request.guidance,
                generator=generators,
                output_type="pt",
            ).images
        return image

    def save(image: Tensor) -> Tensor:
        return _levels(VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(image)))

    return _side({name: getattr(pipe, name) for name in _PARTS}, run=run, save=save)


def native_pipeline(port: Path, dtype: torch.dtype) -> PipelineSide:
    """The native pipeline of a port on the CPU."""
    pipe = load(port, dtype=dtype, device="cpu")

    def run(request: Request) -> Tensor:
        height, width = _size(request, pipe.config.default_size(Req())[0])
        answer = pipe.generate(
            request.prompts, height=height, width=width, seed=request.seed, num_inference_steps=request.steps,
            guidance_scale=request.guidance,
        )  # fmt: skip
        assert answer.output is not None  # the last stage verified it
        return answer.output

    return _side({name: pipe.modules[name] for name in _PARTS}, run=run, save=lambda image: _levels(to_pil(image)))


_PARTS = ("text_encoder", "vision_language_encoder", "transformer", "vae", "scheduler")


def _size(request: Request, side: int) -> tuple[int, int]:
    height, width = (max(32, int(part * side) // 32 * 32) for part in request.part)
    return height, width


def _levels(pictures: list[Any]) -> Tensor:
    """PIL pictures -> uint8 (B, 3, H, W)."""
    return torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1) for p in pictures])


def _side(parts: dict[str, Any], *, run: Any, save: Any) -> PipelineSide:
    glyphs, language, transformer, vae, scheduler = (parts[name] for name in _PARTS)
    # The language model runs once a token; of its calls the last layer shows what each token was drawn from.
    stages = {
        "vision_language_encoder": language.lm_head, "text_encoder": glyphs, "denoiser": transformer,
        "decoder": vae.decoder,
    }  # fmt: skip
    return PipelineSide(stages, (glyphs, language, transformer, vae), scheduler, run, save)


CASES = FamilyCases(
    components=(),
    pipelines={
        "GlmImagePipeline": PipelineCase(
            diffusers_pipeline, native_pipeline, PROMPT, 8, 1.5, other_prompt=OTHER, own=("rotary",), part=(0.5, 1.0)
        )
    },
    code=("conversions.glm_image", "runtime", "porter.core"),
)
