"""The original MOVA tower for video against diffusers' Wan class, which it is but for the bridge, at tiny size.

    porter parity --case mova:video_dit --reference-repo <checkout>

One video: the original's last modulation takes no more. What was measured is not in this file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from parity.case import Case, Draw, Side

REPOSITORY, COMMIT = "OpenMOSS/MOVA", "595a97691123e8356a65ba9fdeee23ae81aaa471"


def _original(config: Mapping[str, Any]) -> nn.Module:
    from mova.diffusion.models.wan_video_dit import WanModel  # type: ignore[import-not-found]

    module: nn.Module = WanModel(
        dim=40, in_dim=8, ffn_dim=40, out_dim=4, text_dim=20, freq_dim=12, eps=1e-6, patch_size=(1, 2, 2), num_heads=2,
        num_layers=2, has_image_input=False, require_clip_embedding=False,
    )  # fmt: skip
    return module


def _diffusers(config: Mapping[str, Any]) -> nn.Module:
    from diffusers import WanTransformer3DModel

    module: nn.Module = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=20, in_channels=8, out_channels=4, text_dim=20,
        freq_dim=12, ffn_dim=40, num_layers=2, eps=1e-6,
    )  # fmt: skip
    return module


def _convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    made: dict[str, Tensor] = convert_wan_transformer_to_diffusers(dict(state))
    return made


def _inputs(config: Mapping[str, Any], draw: Draw) -> dict[str, Tensor]:
    """Noise and the first picture's latents in one tensor of 3 x 4 x 3 patches."""
    return {
        "x": draw("x", 1, 8, 3, 8, 6), "t": draw.uniform("t", 1, high=1000), "text": draw("text", 1, 6, 20),
    }  # fmt: skip


def _run_original(m: Any, x: Mapping[str, Tensor]) -> Any:
    return m(x["x"], x["t"], x["text"])


def _run_diffusers(m: Any, x: Mapping[str, Tensor]) -> Any:
    return m(x["x"], x["t"], x["text"], return_dict=False)[0]


video_dit = Case(
    # Its attention over several processes, which is not used; its own stand-in for that package is not complete.
    Side(_original, _run_original, stubs=("yunchang",)),
    Side(_diffusers, _run_diffusers),
    _inputs,
    _convert,
    baseline=1e-4,  # its sinusoids are of float64, those of diffusers' class of float32
    name="video_dit",
)
