"""A tiny transformer of FLUX.1 Fill's form in the original code; see `conversions.record_reference`.

Fill takes the picture, the masked picture and the mask side by side, 384 channels for 64 that come out: here 20 for 6.
It is made without guidance, as schnell is: the embedded model of `conversions.flux1.record` has it.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from conversions.record_reference import Original, Passes

AXES = [4, 6, 6]


def _build() -> nn.Module:
    """The package's own `__init__` is left out: it only computes a version, and sets what torch computes with."""
    found = importlib.machinery.PathFinder.find_spec("flux")
    assert found and found.submodule_search_locations
    sys.modules["flux"] = package = ModuleType("flux")
    package.__path__, package.__spec__ = list(found.submodule_search_locations), found
    original = importlib.import_module("flux.model")
    module: nn.Module = original.Flux(original.FluxParams(
        in_channels=20, out_channels=6, vec_in_dim=10, context_in_dim=14, hidden_size=32, mlp_ratio=4.0, num_heads=2,
        depth=2, depth_single_blocks=2, axes_dim=AXES, theta=10_000, qkv_bias=True, guidance_embed=False,
    ))  # fmt: skip
    return module


def _passes(module: Any, draw: torch.Generator) -> Passes:
    """Two pictures of 4 x 3 patches, five text tokens, two times."""
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(3.0), indexing="ij")
    ids = torch.stack([torch.zeros(4, 3), rows, columns], -1).reshape(1, 12, 3).repeat(2, 1, 1)
    inputs: dict[str, Tensor] = {
        "img": torch.randn(2, 12, 20, generator=draw),
        "img_ids": ids,
        "txt": torch.randn(2, 5, 14, generator=draw),
        "txt_ids": torch.zeros(2, 5, 3),
        "timesteps": torch.tensor([0.9375, 0.21]),
        "y": torch.randn(2, 10, generator=draw),
    }
    return {"forward": (lambda m, given: m(**given), inputs)}


ORIGINALS = (
    Original(
        "transformer-fill", "transformer", "black-forest-labs/flux", "802fb4713906133fcbd0d8dc5351620ca4773036",
        ("src/flux/model.py", "src/flux/math.py", "src/flux/modules/layers.py"), _build, _passes,
        config={"axes_dims_rope": AXES}, paths=("src",),
    ),
)  # fmt: skip
