"""The original LTX-Video autoencoders of 0.9.0 and 0.9.1 against diffusers' class, at tiny size.

    porter parity --case conversions/ltx/original_vae.py:vae_090 --reference-repo <checkout>

What was measured is not in this file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from parity.case import Case, Draw, Side

REPOSITORY, COMMIT = "Lightricks/LTX-Video", "5260738e171955b66c0827f9af7e84d68fd1d919"

VIDEO = (1, 3, 9, 64, 64)
# The released order of blocks, each with one layer and an eighth of the channels.
BLOCKS = [
    ["res_x", 1], ["compress_all", 1], ["res_x_y", 1], ["res_x", 1], ["compress_all", 1], ["res_x_y", 1], ["res_x", 1],
    ["compress_all", 1], ["res_x", 1], ["res_x", 1],
]  # fmt: skip


def _up(noise: bool) -> list[list[Any]]:
    """A residual block and the upsampler behind it, as 0.9.1 has them."""
    return [["compress_all", {"residual": True, "multiplier": 2}], ["res_x", {"num_layers": 1, "inject_noise": noise}]]


BLOCKS_091 = [["res_x", {"num_layers": 2, "inject_noise": True}], *_up(True), *_up(True), *_up(False)]
COMMON = {
    "_class_name": "CausalVideoAutoencoder", "dims": 3, "in_channels": 3, "out_channels": 3, "latent_channels": 8,
    "patch_size": 4, "norm_layer": "pixel_norm", "latent_log_var": "uniform", "use_quant_conv": False,
    "causal_decoder": False, "encoder_base_channels": 16, "decoder_base_channels": 16,
}  # fmt: skip
PORT = {
    "in_channels": 3, "out_channels": 3, "latent_channels": 8, "block_out_channels": (16, 32, 64, 64),
    "layers_per_block": (1, 1, 1, 1, 1),
}  # fmt: skip
CONFIG_090 = {
    "original": {**COMMON, "blocks": BLOCKS},
    "diffusers": {
        **PORT, "decoder_block_out_channels": (16, 32, 64, 64), "decoder_layers_per_block": (1, 1, 1, 1, 1),
        "upsample_residual": (False,) * 4, "upsample_factor": (1,) * 4,
    },
}  # fmt: skip
CONFIG_091 = {
    "original": {
        **COMMON, "encoder_blocks": BLOCKS, "decoder_blocks": BLOCKS_091, "timestep_conditioning": True,
    },
    "diffusers": {
        **PORT, "decoder_block_out_channels": (32, 64, 128), "decoder_layers_per_block": (2, 1, 1, 1),
        "decoder_spatio_temporal_scaling": (True,) * 3, "decoder_inject_noise": (True, True, True, False),
        "upsample_residual": (True,) * 3, "upsample_factor": (2,) * 3, "timestep_conditioning": True,
    },
}  # fmt: skip


def _original_vae(config: Mapping[str, Any]) -> nn.Module:
    from ltx_video.models.autoencoders.causal_video_autoencoder import (  # type: ignore[import-not-found]
        CausalVideoAutoencoder,
    )

    module: nn.Module = CausalVideoAutoencoder.from_config(dict(config["original"]))
    return module


def _diffusers_vae(config: Mapping[str, Any]) -> nn.Module:
    from diffusers import AutoencoderKLLTXVideo

    module: nn.Module = AutoencoderKLLTXVideo(**config["diffusers"])
    return module


def _convert_vae(state: dict[str, Tensor]) -> dict[str, Tensor]:
    from diffusers.loaders.single_file_utils import convert_ltx_vae_checkpoint_to_diffusers

    made: dict[str, Tensor] = convert_ltx_vae_checkpoint_to_diffusers({f"vae.{n}": t for n, t in state.items()})
    return made


def _videos(config: Mapping[str, Any], draw: Draw) -> dict[str, dict[str, Tensor]]:
    """Nine frames of 64 x 64, and latents of as many; with a time where the decoder takes one."""
    time = {"t": draw.uniform("t", 1)} if config["original"].get("timestep_conditioning") else {}
    return {"encode": {"video": draw("video", *VIDEO)}, "decode": {"z": draw("z", 1, 8, 2, 2, 2), **time}}


def _encode(m: Any, x: Mapping[str, Tensor]) -> Any:
    return m.encode(x["video"]).latent_dist.parameters


def _decode_original(m: Any, x: Mapping[str, Tensor]) -> Any:
    return m.decode(x["z"], target_shape=VIDEO, timestep=x.get("t"), return_dict=False)[0]


def _decode_diffusers(m: Any, x: Mapping[str, Tensor]) -> Any:
    return m.decode(x["z"], x.get("t"), return_dict=False)[0]


# The statistics of latents are no part of the original's module; they come from a file of their own.
vae_090 = Case(
    Side(_original_vae, {"encode": _encode, "decode": _decode_original}),
    Side(_diffusers_vae, {"encode": _encode, "decode": _decode_diffusers}),
    _videos, _convert_vae, CONFIG_090, keep="latents_(mean|std)", name="vae_090",
)  # fmt: skip
vae_091 = replace(vae_090, config=CONFIG_091, name="vae_091")
