"""Code that runs Qwen-Image's weights without diffusers, at tiny size; see `conversions.record_reference`.

Qwen-Image was released as diffusers' classes. The transformer is DiffSynth-Studio's own implementation: its class has
the released widths in its code, so it is made without blocks or memory, and its layers are replaced by the same classes
at smaller widths; its `forward` and all that it calls are run as they are, but for one function. It takes one picture
at a time. The function is the GELU: DiffSynth-Studio has x·σ(1.702·x) there, while the released class, and ComfyUI's,
have the approximation by tanh (the two differ by up to 0.02). The trace is recorded with the latter.

The autoencoder is the code that it was trained with, Wan 2.1's, on a video of five frames: a picture alone would never
run the convolutions over time. The package is imported without its `__init__`, which needs more than the model.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import Any

import torch
from torch import Tensor, nn

from conversions.record_reference import Original, Passes

DIFFSYNTH = "modelscope/DiffSynth-Studio", "fed7b18fac2ed4cb802796eec91970e7659bccde"
WAN = "Wan-Video/Wan2.1", "9737cba9c1c3c4d04b33fcad41c111989865d315"
FILES = ("diffsynth/models/qwen_image_dit.py", "diffsynth/models/general_modules.py")
WIDTH, HEAD, TEXT, AXES = 32, 16, 20, [4, 6, 6]
CONFIG = {"axes_dims_rope": AXES, "zero_cond_t": False, "use_layer3d_rope": False}
STATISTICS = {"latents_mean": [0.5, -0.25, 0.125], "latents_std": [1.5, 0.75, 2.0]}  # exact in float32


class GELU(nn.Module):
    """A linear layer and the GELU of the released class."""

    def __init__(self, proj: nn.Linear) -> None:
        super().__init__()
        self.proj = proj

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.gelu(self.proj(x), approximate="tanh")


def _transformer() -> nn.Module:
    original, parts = (importlib.import_module(f"models.{name}") for name in ("qwen_image_dit", "general_modules"))
    with torch.device("meta"):
        module: nn.Module = original.QwenImageDiT(num_layers=0)
    module.pos_embed = original.QwenEmbedRope(theta=10_000, axes_dim=AXES, scale_rope=True)
    module.time_text_embed = parts.TimestepEmbeddings(256, WIDTH, diffusers_compatible_format=True, scale=1000)
    module.txt_norm = parts.RMSNorm(TEXT, eps=1e-6)
    module.img_in, module.txt_in = nn.Linear(12, WIDTH), nn.Linear(TEXT, WIDTH)
    module.transformer_blocks = nn.ModuleList(
        original.QwenImageTransformerBlock(dim=WIDTH, num_attention_heads=2, attention_head_dim=HEAD) for _ in range(2)
    )
    for block in module.transformer_blocks:
        for layers in (block.img_mlp.net, block.txt_mlp.net):
            layers[0] = GELU(layers[0].proj)
    module.norm_out, module.proj_out = parts.AdaLayerNorm(WIDTH, single=True), nn.Linear(WIDTH, 20)
    return module


def _forward(model: Any, given: dict[str, Tensor]) -> Tensor:
    """Latents (1, C, H, W) -> patches (1, tokens, 4 * C'); the size is given in pixels, 8 for each latent."""
    height, width = (8 * size for size in given["latents"].shape[-2:])
    mask = torch.ones(given["text"].shape[:2], dtype=torch.long)
    out: Tensor = model(given["latents"], given["t"], given["text"], mask, height, width)
    return out


def _pictures(module: Any, draw: torch.Generator) -> Passes:
    """Two pictures of 4 x 3 and 2 x 5 patches, with texts of 7 and 4 tokens."""
    return {
        name: (_forward, {
            "latents": torch.randn(1, 3, height, width, generator=draw),
            "t": torch.tensor([time]),
            "text": torch.randn(1, tokens, TEXT, generator=draw),
        })
        for name, height, width, time, tokens in (("first", 8, 6, 0.9375, 7), ("second", 4, 10, 0.21, 4))
    }  # fmt: skip


def _autoencoder() -> nn.Module:
    for package in ("wan", "wan.modules"):
        found = importlib.util.find_spec(package)
        assert found and found.submodule_search_locations
        sys.modules[package] = importlib.util.module_from_spec(found)
    module: nn.Module = importlib.import_module("wan.modules.vae").WanVAE_(
        dim=8, z_dim=3, dim_mult=[1, 2, 2], num_res_blocks=1, attn_scales=[], temperal_downsample=[False, True]
    )
    return module


def _encode(model: Any, given: dict[str, Tensor]) -> Tensor:
    latents: Tensor = model.encode(given["x"], [given["mean"], 1 / given["std"]])
    return latents


def _decode(model: Any, given: dict[str, Tensor]) -> Tensor:
    """With the clamp that the original's pipeline puts behind it."""
    video: Tensor = model.decode(given["z"], [given["mean"], 1 / given["std"]]).clamp(-1, 1)
    return video


def _video(module: Any, draw: torch.Generator) -> Passes:
    """Two videos (B, C, F, H, W) of five frames, and latents of two; both sides run them in pieces of 1 and 4."""
    statistics = {key[8:]: torch.tensor(value) for key, value in STATISTICS.items()}
    pixels = torch.rand(2, 3, 5, 8, 12, generator=draw) * 2 - 1
    latents = torch.randn(2, 3, 2, 3, 2, generator=draw)
    return {"encode": (_encode, {"x": pixels, **statistics}), "decode": (_decode, {"z": latents, **statistics})}


ORIGINALS = (
    Original(
        "transformer", "transformer", *DIFFSYNTH, FILES, _transformer, _pictures, config=CONFIG, paths=("diffsynth",),
        note="the layers have smaller widths than the class's own; the GELU is the released one, not this code's",
    ),
    Original(
        "vae", "vae", *WAN, ("wan/modules/vae.py",), _autoencoder, _video, config=STATISTICS,
        note="the package's __init__ is not run",
    ),
)  # fmt: skip
