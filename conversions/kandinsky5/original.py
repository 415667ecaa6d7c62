"""The original Kandinsky 5 transformer against diffusers' class, at tiny size.

    porter parity --case conversions/kandinsky5/original.py:transformer --reference-repo <checkout> --shims

Both round to bfloat16 after rotary embeddings, the original in more places. What was measured is not in this file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from parity.case import Case, Draw, Side

REPOSITORY, COMMIT = "ai-forever/Kandinsky-5", "873617bb09b583828acdf28d05f622a6eb68de98"

CONFIG = {
    "in_visual_dim": 4, "in_text_dim": 12, "in_text_dim2": 10, "time_dim": 16, "out_visual_dim": 4,
    "patch_size": (1, 2, 2), "model_dim": 32, "ff_dim": 48, "num_text_blocks": 1, "num_visual_blocks": 2,
    "axes_dims": (4, 6, 6), "visual_cond": True,
}  # fmt: skip
PLACES = [torch.arange(n) for n in (2, 3, 4)]  # patches of the video, by axis


def _original(config: Mapping[str, Any]) -> nn.Module:
    from kandinsky.models.dit import DiffusionTransformer3D  # type: ignore[import-not-found]

    module: nn.Module = DiffusionTransformer3D(**config)
    return module


def _diffusers(config: Mapping[str, Any]) -> nn.Module:
    from diffusers import Kandinsky5Transformer3DModel

    module: nn.Module = Kandinsky5Transformer3DModel(**config)
    return module


def _inputs(config: Mapping[str, Any], draw: Draw) -> dict[str, Tensor]:
    """One video of 2 x 3 x 4 patches with a given frame and its mask; five tokens. The original has no batch axis."""
    return {
        "x": draw("x", 2, 6, 8, 9), "text": draw("text", 5, 12), "pooled": draw("pooled", 1, 10),
        "t": draw.uniform("t", 1, high=1000),
    }  # fmt: skip


def _run_original(m: Any, x: Mapping[str, Tensor]) -> Any:
    return m(x["x"], x["text"], x["pooled"], x["t"], PLACES, torch.arange(5))


def _run_diffusers(m: Any, x: Mapping[str, Tensor]) -> Any:
    given = x["x"][None], x["text"][None], x["t"], x["pooled"]
    return m(*given, PLACES, torch.arange(5), return_dict=False)[0]


transformer = Case(
    # The packages' own imports are of pipelines.
    Side(_original, _run_original, halves=False, bare=("kandinsky", "kandinsky.models")),
    Side(_diffusers, _run_diffusers, halves=False),
    _inputs,
    config=CONFIG,
    name="transformer",
)
