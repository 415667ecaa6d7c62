"""The original AuraFlow transformer (its training repository) against diffusers' class, at small width.

    porter parity --case conversions/auraflow/original.py:transformer --reference-repo <checkout>/advanced

What was measured is not in this file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from parity.case import Case, Draw, Named, Side

REPOSITORY, COMMIT = "cloneofsimo/minRF", "4fc10e0cc8ba976152c7936a1af9717209f03e18"
SOURCE = "advanced"  # of the checkout, where its modules are

WIDTH, TEXT = 32, 20


def _original(config: Mapping[str, Any]) -> nn.Module:
    from mmdit import MMDiT  # type: ignore[import-not-found]

    module: nn.Module = MMDiT(
        in_channels=4, out_channels=4, patch_size=2, dim=WIDTH, n_layers=4, n_double_layers=2, n_heads=2,
        global_conddim=WIDTH, cond_seq_dim=TEXT, max_seq=16,
    )  # fmt: skip
    return module


def _diffusers(config: Mapping[str, Any]) -> nn.Module:
    from diffusers import AuraFlowTransformer2DModel

    module: nn.Module = AuraFlowTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_mmdit_layers=2, num_single_dit_layers=2,
        attention_head_dim=WIDTH // 2, num_attention_heads=2, joint_attention_dim=TEXT, caption_projection_dim=WIDTH,
        out_channels=4, pos_embed_max_size=16,
    )  # fmt: skip
    return module


def _convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    from diffusers.loaders.single_file_utils import convert_auraflow_transformer_checkpoint_to_diffusers

    made: dict[str, Tensor] = convert_auraflow_transformer_checkpoint_to_diffusers(state)
    return made


def _inputs(config: Mapping[str, Any], draw: Draw) -> dict[str, Tensor]:
    """Two square pictures, as the original takes its places from the first of the table; texts of five tokens."""
    return {"x": draw("x", 2, 4, 8, 8), "t": draw.uniform("t", 2), "text": draw("text", 2, 5, TEXT)}


def _answer(model: Any, x: Named) -> Any:
    return model(x["x"], encoder_hidden_states=x["text"], timestep=x["t"], return_dict=False)[0]


transformer = Case(
    Side(_original, lambda m, x: m(x["x"], x["t"], {"c_seq": x["text"]})), Side(_diffusers, _answer), _inputs, _convert,
    name="transformer",
)  # fmt: skip
