"""The original transformer of Lumina-Image 2.0's repository, at tiny size; see `conversions.record_reference`.

In float32 the original's attention is torch's own, which it chooses itself. Its rotary tables, made with the model and
cast to complex64, would stay so in the float64 run: each run makes them again, in float32 bit for bit the original's.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from conversions.record_reference import Original, Passes

REPOSITORY, COMMIT = "Alpha-VLLM/Lumina-Image-2.0", "4a4d6f856115db07e8ae127280ebcc3d9f65004e"
FILES = ("models/__init__.py", "models/model.py", "models/components.py")
EPSILON = 1e-5  # default of apex's FusedRMSNorm, which the original takes where it is installed
CONFIG: dict[str, Any] = {
    "patch_size": 2, "norm_eps": 1e-5, "axes_dim_rope": [4, 2, 2], "axes_lens": [24, 12, 10], "multiple_of": 40,
    "ffn_dim_multiplier": 0.75,
}  # fmt: skip
NOTE = (
    f"the norms of q and k have apex's epsilon, {EPSILON}, which diffusers fixes; the code without apex takes 1e-6; "
    "the rotary tables follow the run's precision"
)


def _tables() -> list[Tensor]:
    """The rotary tables in the precision of the run: `.float()` gives float64 in the second one."""
    made = []
    for width, places in zip(CONFIG["axes_dim_rope"], CONFIG["axes_lens"], strict=True):
        steps = 1.0 / 10000.0 ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
        angles = torch.outer(torch.arange(places, dtype=torch.float64), steps).float()
        made.append(torch.polar(torch.ones_like(angles), angles))
    return made


def _build() -> nn.Module:
    """Six heads of queries, two of keys and values."""
    module: nn.Module = importlib.import_module("models.model").NextDiT(
        in_channels=3, dim=48, n_layers=2, n_refiner_layers=2, n_heads=6, n_kv_heads=2, qk_norm=True, cap_feat_dim=20,
        **{"axes_dims" if key == "axes_dim_rope" else key: value for key, value in CONFIG.items()},
    )  # fmt: skip
    for name, part in module.named_modules():
        if name.endswith((".q_norm", ".k_norm")):
            part.eps = EPSILON
    rotary: Any = module.rope_embedder
    assert all(torch.equal(own, ours) for own, ours in zip(rotary.freqs_cis, _tables(), strict=True))
    return module


def _call(model: Any, given: Mapping[str, Tensor]) -> Tensor:
    model.rope_embedder.freqs_cis = _tables()
    out: Tensor = model(given["x"], given["t"], given["caption"], given["mask"].bool())
    return out


def _passes(module: Any, draw: torch.Generator) -> Passes:
    """Two pictures of 4 x 3 patches, captions of seven and four tokens, two times."""
    inputs: dict[str, Tensor] = {
        "x": torch.randn(2, 3, 8, 6, generator=draw),
        "t": torch.tensor([0.0625, 0.79]),
        "caption": torch.randn(2, 7, 20, generator=draw),
        "mask": (torch.arange(7) < torch.tensor([[7], [4]])).float(),
    }
    return {"forward": (_call, inputs)}


ORIGINALS = (
    Original(
        "transformer", "transformer", REPOSITORY, COMMIT, FILES, _build, _passes, config=CONFIG,
        absent=("flash_attn", "flash_attn.bert_padding"), note=NOTE,
    ),
)  # fmt: skip
