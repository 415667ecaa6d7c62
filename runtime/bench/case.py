"""What a family declares so that its denoiser can be measured: real sizes, and how each side is called."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Config = Mapping[str, Any]
Given = dict[str, Any]
# (config, sizes, draw) -> keyword arguments of diffusers' forward; draw(*shape): normal numbers of the run's dtype.
Inputs = Callable[[Config, Mapping[str, int], Callable[..., Tensor]], Given]


def same(model: nn.Module, given: Given) -> Given:
    """Both sides take the same arguments."""
    return given


@dataclass(frozen=True)
class BenchCase:
    """One denoiser at one size.

    Attributes:
        name: what people call it, with the size: `FLUX.1-dev, 1024 x 1024`.
        config: transformer/config.json of the released model.
        native: `"module:class"` of the native class.
        diffusers_class: diffusers' class.
        inputs: arguments of diffusers' forward; `native_inputs` makes the native class's of them, once before the loop.
        sizes: what `inputs` counts in: tokens, rows, columns, frames.
        passes: forwards of a step: 2 with classifier-free guidance.
        small, small_sizes: what a CPU runs instead: the same width of a block's parts, fewer and smaller of them.
    """

    name: str
    config: Config
    native: str
    diffusers_class: str
    inputs: Inputs
    sizes: Mapping[str, int]
    native_inputs: Callable[[Any, Given], Given] = same
    passes: int = 1
    small: Config = field(default_factory=dict)
    small_sizes: Mapping[str, int] = field(default_factory=dict)

    def shrunk(self) -> BenchCase:
        """The same at the size that a CPU runs."""
        return BenchCase(
            f"{self.name}, shrunk", {**self.config, **self.small}, self.native, self.diffusers_class, self.inputs,
            {**self.sizes, **self.small_sizes}, self.native_inputs, self.passes,
        )  # fmt: skip


def drawn(device: torch.device, dtype: torch.dtype, seed: int = 0) -> Callable[..., Tensor]:
    """Normal numbers on the device itself; the speed does not depend on them."""
    generator = torch.Generator(device).manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, device=device, dtype=dtype)
