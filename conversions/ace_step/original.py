"""DiffSynth-Studio's ACE-Step 1.5 transformer against diffusers' class, at tiny size.

    porter parity --case ace_step:transformer --reference-repo <checkout>

The authors load their class from the folder of weights; this is that code in a repository of others, with its own
attention. What was measured is not in this file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from parity.case import Case, Draw, Side

REPOSITORY, COMMIT = "modelscope/DiffSynth-Studio", "fed7b18fac2ed4cb802796eec91970e7659bccde"
CONFIG = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 12, "in_channels": 24, "audio_acoustic_hidden_dim": 8, "sliding_window": 3,
    "encoder_hidden_size": 20,
}  # fmt: skip
RENAMED = (
    ("proj_in.1.", "proj_in_conv."), ("proj_out.1.", "proj_out_conv."), (".q_proj.", ".to_q."), (".k_proj.", ".to_k."),
    (".v_proj.", ".to_v."), (".o_proj.", ".to_out.0."), (".q_norm.", ".norm_q."), (".k_norm.", ".norm_k."),
)  # fmt: skip


def _original(config: Mapping[str, Any]) -> nn.Module:
    from diffsynth.models.ace_step_dit import AceStepDiTModel  # type: ignore[import-not-found]

    module: nn.Module = AceStepDiTModel(**config)
    return module


def _diffusers(config: Mapping[str, Any]) -> nn.Module:
    from diffusers import AceStepTransformer1DModel

    module: nn.Module = AceStepTransformer1DModel(**config)
    return module


def _convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The renaming that diffusers' conversion script does."""
    made = {}
    for name, tensor in state.items():
        for old, new in RENAMED:
            name = name.replace(old, new)
        made[name] = tensor
    return made


def _inputs(config: Mapping[str, Any], draw: Draw) -> dict[str, Tensor]:
    """Two sounds of 23 frames, so that one is added to fill the last patch, and texts of seven."""
    return {
        "x": draw("x", 2, 23, 8), "context": draw("context", 2, 23, 16), "text": draw("text", 2, 7, 20),
        "t": draw.uniform("t", 2), "r": draw.uniform("r", 2),
    }  # fmt: skip


def _run_original(m: Any, x: Mapping[str, Tensor]) -> Any:
    """Its times are of a thousand, where diffusers' class multiplies."""
    return m(x["x"], x["t"] * 1000, x["r"] * 1000, None, x["text"], None, x["context"])[0]


def _run_diffusers(m: Any, x: Mapping[str, Tensor]) -> Any:
    return m(x["x"], x["t"], x["r"], x["text"], x["context"], return_dict=False)[0]


transformer = Case(
    Side(_original, _run_original, stubs=("torchvision", "imageio", "pandas", "modelscope"), bare=("diffsynth",)),
    Side(_diffusers, _run_diffusers),
    _inputs,
    _convert,
    CONFIG,
    name="transformer",
)
