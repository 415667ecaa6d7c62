"""The original DiT against diffusers' class as it is, at tiny size.

    porter parity --case dit --reference-repo <checkout>

Two real differences are to be found: the step of the sinusoids of the time, and the epsilon of the norms. `case.py`
compares the recorded original with the class whose frequencies are repaired.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from parity.case import Case, Draw, Side

REPOSITORY, COMMIT = "facebookresearch/DiT", "ed81ce2229091fd4ecc9a223645f95cf379d582b"
CONFIG = {
    "sample_size": 6, "patch_size": 2, "in_channels": 3, "out_channels": 6, "num_attention_heads": 3,
    "attention_head_dim": 8, "num_layers": 3, "num_embeds_ada_norm": 10,
}  # fmt: skip
# The first module where diffusers' class parts from the original.
KNOWN = {"transformer": "time_proj"}


def _original(config: Mapping[str, Any]) -> nn.Module:
    from models import DiT  # type: ignore[import-not-found]

    module: nn.Module = DiT(
        input_size=6, patch_size=2, in_channels=3, hidden_size=24, depth=3, num_heads=3, num_classes=10
    )
    return module


def _diffusers(config: Mapping[str, Any]) -> nn.Module:
    from diffusers import DiTTransformer2DModel

    module: nn.Module = DiTTransformer2DModel(**config)
    return module


def _inputs(config: Mapping[str, Any], draw: Draw) -> dict[str, Tensor]:
    """Two latents of 6 x 6, whole times and classes."""
    return {
        "x": draw("x", 2, 3, 6, 6), "t": draw.integers("t", 1000, 2).float(), "y": draw.integers("y", 10, 2),
    }  # fmt: skip


def _run_original(m: Any, x: Mapping[str, Tensor]) -> Any:
    return m(x["x"], x["t"], x["y"])


def _run_diffusers(m: Any, x: Mapping[str, Tensor]) -> Any:
    return m(x["x"], timestep=x["t"], class_labels=x["y"], return_dict=False)[0]


transformer = Case(
    Side(_original, _run_original), Side(_diffusers, _run_diffusers), _inputs, "conversions.dit.recipe:TRANSFORMER",
    CONFIG, keep="pos_embed", name="transformer",
)  # fmt: skip
