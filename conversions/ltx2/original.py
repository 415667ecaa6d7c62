"""The original LTX-2 transformer (video and sound) against diffusers' class, at tiny size.

    porter parity --case ltx2:transformer --reference-repo <checkout>

`transformer` has one time for all tokens, as text to video asks; `transformer_conditioned` has a time for each token
and another noise level for the sound. What was measured is not in this file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from parity.case import Case, Draw, Named, Side

REPOSITORY, COMMIT = "Lightricks/LTX-2", "400fd31054597515f47125691032c04b1c3ee24e"
SOURCE = "packages/ltx-core/src"  # of the checkout, where its package is
# With times of their own diffusers' class modulates the tokens for sound's and video's attention to each other by the
# other's noise level, the original by each token's time.
KNOWN = {"transformer_conditioned": "transformer_blocks.0"}

VIDEO = {"num_attention_heads": 2, "attention_head_dim": 16, "cross_attention_dim": 32}
AUDIO = {"audio_num_attention_heads": 2, "audio_attention_head_dim": 8, "audio_cross_attention_dim": 16}
CHANNELS = {"in_channels": 8, "out_channels": 8, "audio_in_channels": 6, "audio_out_channels": 6}
CONFIG = {**VIDEO, **AUDIO, **CHANNELS, "num_layers": 2}
STEP = torch.tensor([8 / 25, 32, 32])[:, None]  # of a latent, in seconds and pixels


def _original(config: Mapping[str, Any]) -> nn.Module:
    from ltx_core.model.transformer.model import LTXModel  # type: ignore[import-not-found]
    from ltx_core.model.transformer.text_projection import create_caption_projection  # type: ignore[import-not-found]

    captions = {**config, "caption_channels": 20}
    module: nn.Module = LTXModel(
        **config, av_ca_timestep_scale_multiplier=1000, double_precision_rope=True,
        caption_projection=create_caption_projection(captions),
        audio_caption_projection=create_caption_projection(captions, audio=True),
    )  # fmt: skip
    return module


def _diffusers(config: Mapping[str, Any]) -> nn.Module:
    from diffusers import LTX2VideoTransformer3DModel

    module: nn.Module = LTX2VideoTransformer3DModel(**config, caption_channels=20, rope_type="split")
    return module


def _convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    from diffusers.loaders.single_file_utils import convert_ltx2_transformer_to_diffusers

    made: dict[str, Tensor] = convert_ltx2_transformer_to_diffusers(state)
    return made


def _inputs(config: Mapping[str, Any], draw: Draw) -> dict[str, Tensor]:
    """Two videos of 2 x 2 x 3 tokens, five tokens of sound, texts of seven, of which the second lacks three."""
    begin = torch.cartesian_prod(*(torch.arange(float(n)) for n in (2, 2, 3))).T * STEP
    heard = torch.arange(5.0)[None] / 25
    return {
        "x": draw("x", 2, 12, 8), "sound": draw("sound", 2, 5, 6), "text": draw("text", 2, 7, 20),
        "sound_text": draw("sound_text", 2, 7, 20), "mask": (torch.arange(7) < torch.tensor([[7], [4]])).long(),
        "sigma": draw.uniform("sigma", 2), "places": torch.stack((begin, begin + STEP), -1).expand(2, -1, -1, -1),
        "sound_places": torch.stack((heard, heard + 1 / 25), -1).expand(2, -1, -1, -1),
    }  # fmt: skip


def _own_times(config: Mapping[str, Any], draw: Draw) -> dict[str, Tensor]:
    return {
        **_inputs(config, draw), "times": draw.uniform("times", 2, 12), "sound_times": draw.uniform("heard", 2, 5),
        "sound_sigma": draw.uniform("sound_sigma", 2),
    }  # fmt: skip


def _times(x: Named) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Time of each token and noise level, of the video and of the sound."""
    level, once = x["sigma"], x["sigma"][:, None]
    return x.get("times", once), level, x.get("sound_times", once), x.get("sound_sigma", level)


def _recorded(model: Any, x: Named) -> Any:
    from ltx_core.model.transformer.modality import Modality  # type: ignore[import-not-found]

    times, sigma, sound_times, sound_sigma = _times(x)
    return model(
        Modality(x["x"], sigma, times, x["places"], x["text"], context_mask=x["mask"]),
        Modality(x["sound"], sound_sigma, sound_times, x["sound_places"], x["sound_text"], context_mask=x["mask"]),
        None,
    )  # fmt: skip


def _answer(model: Any, x: Named) -> Any:
    times, sigma, sound_times, sound_sigma = (1000 * t for t in _times(x))
    return model(
        x["x"], x["sound"], x["text"], x["sound_text"], times, sound_times, sigma=sigma, audio_sigma=sound_sigma,
        encoder_attention_mask=x["mask"], audio_encoder_attention_mask=x["mask"], video_coords=x["places"],
        audio_coords=x["sound_places"], use_cross_timestep=True, return_dict=False,
    )  # fmt: skip


transformer = Case(
    Side(_original, _recorded), Side(_diffusers, _answer), _inputs, _convert, CONFIG, name="transformer",
)  # fmt: skip
transformer_conditioned = Case(
    Side(_original, _recorded), Side(_diffusers, _answer), _own_times, _convert, CONFIG, name="transformer_conditioned",
)  # fmt: skip
