"""The original LTX-2 autoencoders of video and of sound against diffusers' classes, at tiny size.

    porter parity --case ltx2:vae --reference-repo <checkout>

The original normalises latents in its encoder and decoder, diffusers in its pipeline. What was measured is not in this
file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from parity.case import Case, Draw, Named, Side

REPOSITORY, COMMIT = "Lightricks/LTX-2", "400fd31054597515f47125691032c04b1c3ee24e"
SOURCE = "packages/ltx-core/src"  # of the checkout, where its package is

ONE = ["res_x", {"num_layers": 1}]
SHRINK = [[f"compress_{axes}_res", {"multiplier": 2}] for axes in ("space", "time", "all", "all")]
GROW = ["compress_all", {"residual": True, "multiplier": 2}]
SOUND = {"ch_mult": (1, 2, 4), "num_res_blocks": 1, "resolution": 32, "mel_bins": 16, "mid_block_add_attention": True}


class _Both(nn.Module):
    """An encoder and a decoder with one set of statistics, as a checkpoint has them."""

    def __init__(self, encoder: Any, decoder: Any) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.per_channel_statistics = encoder.per_channel_statistics = decoder.per_channel_statistics


def _original_vae(config: Mapping[str, Any]) -> nn.Module:
    from ltx_core.model.video_vae.video_vae import ConvVideoDecoder, VideoEncoder  # type: ignore[import-not-found]

    down = [ONE, *(block for shrink in SHRINK for block in (shrink, ONE))]
    up = [ONE, *[GROW, ONE] * 3]
    return _Both(
        VideoEncoder(out_channels=8, encoder_blocks=down),
        ConvVideoDecoder(in_channels=8, decoder_blocks=up, base_channels=8),
    )


def _original_sound(config: Mapping[str, Any]) -> nn.Module:
    from ltx_core.model.audio_vae.audio_vae import (  # type: ignore[import-not-found]
        AudioDecoder,
        AudioEncoder,
        CausalityAxis,
        NormType,
    )

    kind = {"norm_type": NormType.PIXEL, "causality_axis": CausalityAxis.HEIGHT, "attn_resolutions": set()}
    given = {**SOUND, **kind, "ch": 16, "z_channels": 4}
    return _Both(AudioEncoder(in_channels=2, **given), AudioDecoder(out_ch=2, **given))


def _diffusers_vae(config: Mapping[str, Any]) -> nn.Module:
    from diffusers import AutoencoderKLLTX2Video

    module: nn.Module = AutoencoderKLLTX2Video(
        latent_channels=8, block_out_channels=(16, 32, 64, 128), decoder_block_out_channels=(16, 32, 64),
        layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 4, decoder_causal=False,
    )  # fmt: skip
    return module


def _diffusers_sound(config: Mapping[str, Any]) -> nn.Module:
    from diffusers import AutoencoderKLLTX2Audio

    module: nn.Module = AutoencoderKLLTX2Audio(**SOUND, base_channels=16, latent_channels=4)
    return module


def _checkpoint(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if "coder.per_channel" not in name}


def _convert_vae(state: dict[str, Tensor]) -> dict[str, Tensor]:
    from diffusers.loaders.single_file_utils import convert_ltx2_vae_to_diffusers

    made: dict[str, Tensor] = convert_ltx2_vae_to_diffusers(_checkpoint(state))
    return made


def _convert_sound(state: dict[str, Tensor]) -> dict[str, Tensor]:
    from diffusers.loaders.single_file_utils import convert_ltx2_audio_vae_to_diffusers

    made: dict[str, Tensor] = convert_ltx2_audio_vae_to_diffusers(_checkpoint(state))
    return made


def _video(config: Mapping[str, Any], draw: Draw) -> dict[str, dict[str, Tensor]]:
    """Nine frames of 64 x 96, and latents of 2 x 2 x 3."""
    return {"encode": {"x": draw("x", 1, 3, 9, 64, 96)}, "decode": {"z": draw("z", 1, 8, 2, 2, 3)}}


def _spectra(config: Mapping[str, Any], draw: Draw) -> dict[str, dict[str, Tensor]]:
    """21 frames of 16 bands, and latents of 6 x 4."""
    return {"encode": {"x": draw("x", 1, 2, 21, 16)}, "decode": {"z": draw("z", 1, 4, 6, 4)}}


def _table(model: Any, name: str, z: Tensor) -> Any:
    """A statistic of latents `z`, to be broadcast over places: of channels, or of channels and bands of sound."""
    table = getattr(model, name)
    return table.view(z.shape[1], 1, -1) if z.ndim == 4 else table.view(-1, 1, 1, 1)


def _encoded(model: Any, x: Named) -> Any:
    z = model.encode(x["x"]).latent_dist.mean
    return (z - _table(model, "latents_mean", z)) / _table(model, "latents_std", z)


def _decoded(model: Any, x: Named) -> Any:
    z = x["z"]
    return model.decode(z * _table(model, "latents_std", z) + _table(model, "latents_mean", z), return_dict=False)[0]


ORIGINAL = {"encode": lambda m, x: m.encoder(x["x"]), "decode": lambda m, x: m.decoder(x["z"])}
DIFFUSERS = {"encode": _encoded, "decode": _decoded}
vae = Case(Side(_original_vae, ORIGINAL), Side(_diffusers_vae, DIFFUSERS), _video, _convert_vae, name="vae")
audio_vae = Case(
    Side(_original_sound, ORIGINAL, stubs=("torchaudio",)), Side(_diffusers_sound, DIFFUSERS), _spectra, _convert_sound,
    name="audio_vae",
)  # fmt: skip
