"""The original CogVideoX autoencoder against diffusers' class, at tiny size.

    porter parity --case cogvideox:vae --reference-repo <checkout>

What was measured is not in this file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from parity.case import Case, Draw, Side

REPOSITORY, COMMIT = "THUDM/CogVideo", "e519eced782c08db81f45e5eb40baa45958087ae"
SOURCE = "sat"  # of the checkout, where its modules are
LATENTS = 4


class _Halves(nn.Module):
    """Encoder and decoder, as the engine holds them that reads the file of weights."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder


def _one_process() -> None:
    """Its convolutions split the frames over a group of processes; here of one."""
    from sgm import util  # type: ignore[import-not-found]
    from torch import distributed

    if not distributed.is_initialized():
        store = distributed.HashStore()  # type: ignore[attr-defined]
        distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        util.initialize_context_parallel(1)


def _original(config: Mapping[str, Any]) -> nn.Module:
    from vae_modules.cp_enc_dec import (  # type: ignore[import-not-found]
        ContextParallelDecoder3D,
        ContextParallelEncoder3D,
    )

    _one_process()
    own: dict[str, Any] = {
        "double_z": True, "z_channels": LATENTS, "resolution": 16, "in_channels": 3, "out_ch": 3, "ch": 32,
        "ch_mult": [1, 2, 2, 2], "num_res_blocks": 1, "attn_resolutions": [], "gather_norm": False,
    }  # fmt: skip
    return _Halves(ContextParallelEncoder3D(**own), ContextParallelDecoder3D(**own))


def _diffusers(config: Mapping[str, Any]) -> nn.Module:
    from diffusers import AutoencoderKLCogVideoX

    module: nn.Module = AutoencoderKLCogVideoX(
        block_out_channels=(32, 64, 64, 64), latent_channels=LATENTS, layers_per_block=1
    )
    return module


RENAMED = (
    ("block.", "resnets."), ("down.", "down_blocks."), ("downsample", "downsamplers.0"), ("upsample", "upsamplers.0"),
    ("nin_shortcut", "conv_shortcut"), ("mid.block_1", "mid_block.resnets.0"), ("mid.block_2", "mid_block.resnets.1"),
)  # fmt: skip


def _port_name(name: str) -> str:
    for old, new in RENAMED:
        name = name.replace(old, new)
    return re.sub(r"\bup\.(\d)", lambda found: f"up_blocks.{3 - int(found[1])}", name)


def _convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The renaming that diffusers' conversion script does."""
    return {_port_name(name): tensor for name, tensor in state.items()}


def _videos(config: Mapping[str, Any], draw: Draw) -> dict[str, dict[str, Tensor]]:
    """Five frames of 16 x 24, and three of latents: diffusers takes two of them as the middle of a longer video."""
    return {"encode": {"x": draw("x", 1, 3, 5, 16, 24)}, "decode": {"z": draw("z", 1, LATENTS, 3, 2, 3)}}


vae = Case(
    Side(
        _original, {"encode": lambda m, x: m.encoder(x["x"]), "decode": lambda m, x: m.decoder(x["z"])},
        stubs=("beartype",), bare=("sgm",),
    ),
    Side(
        _diffusers,
        {
            "encode": lambda m, x: m.encode(x["x"]).latent_dist.parameters,
            "decode": lambda m, x: m.decode(x["z"]).sample,
        },
    ),
    _videos, _convert, name="vae",
)  # fmt: skip
