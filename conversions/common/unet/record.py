"""The original UNets at tiny size, for the families that use them; see `conversions.record_reference`.

Stable Diffusion 2 stands in Stability AI's later repository too (`configs/inference/sd_2_1.yaml`), with XL's code.
"""

from __future__ import annotations

import importlib
import sys
import types
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from conversions.record_reference import Original, Passes

Inputs = Mapping[str, Tensor]
CLASS = "modules.diffusionmodules.openaimodel"
FILES = ("modules/diffusionmodules/openaimodel.py", "modules/diffusionmodules/util.py", "modules/attention.py")
SAMPLES = 32  # of each module: a UNet has many
TOKENS, TEXT = 5, 24  # of the text, and its width
POOLED, SIZES, SINUSOIDS = 20, 6, 8  # XL: width of the pooled text, numbers about the picture, width of each


def latent_diffusion(name: str, config: Mapping[str, Any], **options: Any) -> Original:
    """A UNet of the first Stable Diffusion's code; `config` is what its tensors do not say."""
    return Original(
        name, "unet", "CompVis/stable-diffusion", "21f890f9da3cfbeaba8e2ac3c425ee9e998d5229",
        tuple(f"ldm/{file}" for file in FILES),
        partial(_build, "ldm", use_spatial_transformer=True, legacy=False, image_size=8, **options),
        partial(_passes, lambda draw: {}), config, absent=("omegaconf", "omegaconf.listconfig"), samples=SAMPLES,
    )  # fmt: skip


def generative_models(
    name: str, config: Mapping[str, Any], beside: Callable[[torch.Generator], Inputs] = lambda draw: {}, **options: Any
) -> Original:
    """A UNet of the code that came with XL; `beside` draws what it is told besides time and text."""
    return Original(
        name, "unet", "Stability-AI/generative-models", "0ad7de9a5cb53fd63d6d30a4f385485e72e08597",
        tuple(f"sgm/{file}" for file in FILES), partial(_build, "sgm", use_linear_in_transformer=True, **options),
        partial(_passes, beside), config, samples=SAMPLES,
    )  # fmt: skip


def pooled_and_sizes(draw: torch.Generator) -> Inputs:
    """What XL is told: the pooled text, and sizes and places in pixels."""
    return {
        "pooled": torch.randn(2, POOLED, generator=draw),
        "sizes": torch.tensor([[96.0, 64.0, 0.0, 8.0, 128.0, 80.0], [40.0, 56.0, 16.0, 4.0, 72.0, 48.0]]),
    }


def _build(package: str, **options: Any) -> nn.Module:
    """The packages' own `__init__` import all of the training code, so their modules are imported without it."""
    for name in (package, f"{package}.modules"):
        module = types.ModuleType(name)
        module.__path__ = [f"{folder}/{name.replace('.', '/')}" for folder in sys.path]
        sys.modules[name] = module
    defaults = {"model_channels": 32, "in_channels": 4, "out_channels": 4, "context_dim": TEXT}
    with warnings.catch_warnings():  # it logs by an old name
        warnings.simplefilter("ignore", DeprecationWarning)
        built: nn.Module = importlib.import_module(f"{package}.{CLASS}").UNetModel(**{**defaults, **options})
    return built


def _passes(beside: Callable[[torch.Generator], Inputs], module: Any, draw: torch.Generator) -> Passes:
    """Two different pictures, at the coarsest level of 2 x 3 positions, at two times, with two texts."""
    finest = 2 ** (len(module.channel_mult) - 1)
    inputs = {
        "x": torch.randn(2, module.in_channels, 2 * finest, 3 * finest, generator=draw),
        "timesteps": torch.tensor([937.0, 21.0]),
        "context": torch.randn(2, TOKENS, TEXT, generator=draw),
        **beside(draw),
    }
    return {"forward": (_call, inputs)}


def _call(module: Any, given: Inputs) -> Tensor:
    """Run the original; classes become integers, and XL's sizes the sinusoids that its conditioner makes of them."""
    more = {key: given[key] for key in ("y",) if key in given}
    if "classes" in given:
        more = {"y": given["classes"].long()}
    if "sizes" in given:
        sinusoids = sys.modules[type(module).__module__].Timestep(SINUSOIDS)(given["sizes"].flatten())
        more = {"y": torch.cat([given["pooled"], sinusoids.reshape(len(given["pooled"]), -1)], dim=1)}
    with warnings.catch_warnings():  # its choice of attention kernels is by an old name
        warnings.simplefilter("ignore", FutureWarning)
        out: Tensor = module(given["x"], given["timesteps"], given["context"], **more)
    return out
