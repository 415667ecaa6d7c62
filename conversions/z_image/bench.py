"""Z-Image's benchmark: the denoiser of Z-Image-Turbo at 1024 x 1024, which runs without guidance."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from runtime.bench.case import BenchCase, Given

RELEASED: dict[str, Any] = {
    "all_patch_size": [2], "all_f_patch_size": [1], "in_channels": 16, "dim": 3840, "n_layers": 30,
    "n_refiner_layers": 2, "n_heads": 30, "n_kv_heads": 30, "norm_eps": 1e-5, "qk_norm": True, "cap_feat_dim": 2560,
    "siglip_feat_dim": None, "rope_theta": 256.0, "t_scale": 1000.0, "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512],
}  # fmt: skip


def _inputs(config: Mapping[str, Any], sizes: Mapping[str, int], draw: Callable[..., Tensor]) -> Given:
    """One picture of rows x columns latents, and a caption of `text` tokens."""
    latents = draw(config["in_channels"], 1, sizes["rows"], sizes["columns"])  # (C, F, H, W)
    return {
        "x": [latents],
        "t": torch.full((1,), 0.5, device=latents.device),
        "cap_feats": [draw(sizes["text"], config["cap_feat_dim"])],
    }


def _native(model: Any, given: Given) -> Given:
    (latents,), (caption,) = given["x"], given["cap_feats"]
    places = model.places([caption.shape[0]], *latents.shape[2:], latents.device)
    hidden = latents.transpose(0, 1)  # (1, C, H, W)
    return {
        "hidden_states": hidden, "timestep": given["t"], "encoder_hidden_states": caption[None], "places": places,
    }  # fmt: skip


CASES = (
    BenchCase(
        "Z-Image-Turbo, 1024 x 1024", RELEASED, "conversions.z_image.model:ZImageTransformer",
        "ZImageTransformer2DModel", _inputs, {"text": 64, "rows": 128, "columns": 128}, _native,
        small={"dim": 512, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 4, "n_kv_heads": 4},
        small_sizes={"text": 32, "rows": 32, "columns": 32},
    ),
)  # fmt: skip
