"""The original FLUX.2 transformer against diffusers' class, at small width.

    porter parity --case conversions/flux2/original.py:transformer --reference-repo <checkout>/src

What was measured is not in this file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from parity.case import Case, Draw, Named, Side

REPOSITORY, COMMIT = "black-forest-labs/flux2", "ab7cca68018ad3ceadcace9d6ecb1bc1f6f46b4e"
SOURCE = "src"  # of the checkout, where its packages are

CONFIG = {
    "in_channels": 8, "context_in_dim": 20, "hidden_size": 32, "num_heads": 2, "depth": 2, "depth_single_blocks": 2,
    "axes_dim": [4, 4, 4, 4], "theta": 2000, "mlp_ratio": 3.0,
}  # fmt: skip


def _original(config: Mapping[str, Any]) -> nn.Module:
    from flux2.model import Flux2, Flux2Params  # type: ignore[import-not-found]

    module: nn.Module = Flux2(Flux2Params(**config))
    return module


def _diffusers(config: Mapping[str, Any]) -> nn.Module:
    from diffusers import Flux2Transformer2DModel

    module: nn.Module = Flux2Transformer2DModel(
        in_channels=config["in_channels"], num_layers=config["depth"], num_single_layers=config["depth_single_blocks"],
        attention_head_dim=config["hidden_size"] // config["num_heads"], num_attention_heads=config["num_heads"],
        joint_attention_dim=config["context_in_dim"], mlp_ratio=config["mlp_ratio"],
        axes_dims_rope=tuple(config["axes_dim"]), rope_theta=config["theta"],
    )  # fmt: skip
    return module


def _convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers

    made: dict[str, Tensor] = convert_flux2_transformer_checkpoint_to_diffusers(state)
    return made


def _places(t: int, h: int, w: int, tokens: int) -> Tensor:
    """Positions (2, t * h * w * tokens, 4), the same for both pictures: diffusers' class takes those of one."""
    axes = [torch.arange(float(n)) for n in (t, h, w, tokens)]
    return torch.cartesian_prod(*axes)[None].repeat(2, 1, 1)


def _inputs(config: Mapping[str, Any], draw: Draw) -> dict[str, Tensor]:
    """Two pictures of 4 x 3 tokens, texts of five."""
    return {
        "x": draw("x", 2, 12, config["in_channels"]),
        "x_ids": _places(1, 4, 3, 1),
        "timesteps": draw.uniform("t", 2),
        "ctx": draw("ctx", 2, 5, config["context_in_dim"]),
        "ctx_ids": _places(1, 1, 1, 5),
        "guidance": torch.tensor([3.5, 2.0]),
    }


def _answer(model: Any, x: Named) -> Any:
    return model(
        x["x"], x["ctx"], x["timesteps"], x["x_ids"][0], x["ctx_ids"][0], x["guidance"], return_dict=False
    )[0]  # fmt: skip


transformer = Case(
    Side(_original), Side(_diffusers, _answer), _inputs, _convert, config=CONFIG, name="transformer",
)  # fmt: skip
