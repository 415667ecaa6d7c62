"""The original Chroma transformer (its training repository) against diffusers' class, at tiny size.

    porter parity --case chroma:transformer --reference-repo <checkout>

One picture: the original joins the masks of all texts of a batch. What was measured is not in this file.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from parity.case import Case, Draw, Named, Side

REPOSITORY, COMMIT = "lodestone-rock/flow", "bb5274c8e00f1bcc667a9caf44f9732adfc25940"
# diffusers' norms of the modulation have no epsilon of the original's, but the smallest step of the dtype.
KNOWN = {"transformer": "distilled_guidance_layer.norms.0"}

WIDTH, AXES = 32, [4, 6, 6]


def _any_fields(cls: type) -> type:
    """A class that takes whatever it is given."""
    cls.__init__ = lambda self, **given: vars(self).update(given)  # type: ignore[misc]
    return cls


def _original(config: Mapping[str, Any]) -> nn.Module:
    with patch.object(dataclasses, "dataclass", _any_fields):  # at this commit its own defaults do not fit its class
        from src.models.chroma.model import Chroma, ChromaParams  # type: ignore[import-not-found]

    params = ChromaParams(
        in_channels=8, context_in_dim=20, hidden_size=WIDTH, mlp_ratio=4.0, num_heads=2, depth=2,
        depth_single_blocks=2, axes_dim=AXES, theta=10000, qkv_bias=True, guidance_embed=True,
        approximator_in_dim=16, approximator_depth=2, approximator_hidden_size=24, _use_compiled=False, use_x0=False,
    )  # fmt: skip
    module: nn.Module = Chroma(params)
    return module


def _diffusers(config: Mapping[str, Any]) -> nn.Module:
    from diffusers import ChromaTransformer2DModel

    module: nn.Module = ChromaTransformer2DModel(
        in_channels=8, num_layers=2, num_single_layers=2, attention_head_dim=WIDTH // 2, num_attention_heads=2,
        joint_attention_dim=20, axes_dims_rope=tuple(AXES), approximator_num_channels=16, approximator_hidden_dim=24,
        approximator_layers=2,
    )  # fmt: skip
    return module


def _convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' conversion, whose text has the released width in it, for this one."""
    from diffusers.loaders import single_file_utils

    text = inspect.getsource(single_file_utils.convert_chroma_transformer_checkpoint_to_diffusers)
    space: dict[str, Any] = dict(vars(single_file_utils))
    exec(text.replace("inner_dim = 3072", f"inner_dim = {WIDTH}"), space)
    made: dict[str, Tensor] = space["convert_chroma_transformer_checkpoint_to_diffusers"](state)
    return made


def _inputs(config: Mapping[str, Any], draw: Draw) -> dict[str, Tensor]:
    """A picture of 4 x 3 tokens and a text of seven, of which four are shown."""
    places = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(3.0))
    return {
        "img": draw("img", 1, 12, 8), "img_ids": places[None], "txt": draw("txt", 1, 7, 20),
        "mask": (torch.arange(7) < 4)[None].long(), "timesteps": draw.uniform("t", 1),
    }  # fmt: skip


def _recorded(model: Any, x: Named) -> Any:
    given = {name: x[name] for name in ("img", "img_ids", "txt", "timesteps")}
    return model(**given, txt_ids=torch.zeros(1, 7, 3), txt_mask=x["mask"], guidance=torch.zeros(1))


def _answer(model: Any, x: Named) -> Any:
    """With the mask as diffusers' pipeline makes it: one token more than the text, and the picture."""
    shown = torch.arange(7) < x["mask"].sum() + 1
    return model(
        x["img"], x["txt"], x["timesteps"], x["img_ids"][0], torch.zeros(7, 3),
        attention_mask=torch.cat((shown, torch.ones(12, dtype=torch.bool)))[None], return_dict=False,
    )[0]  # fmt: skip


transformer = Case(
    Side(_original, _recorded), Side(_diffusers, _answer), _inputs, _convert, name="transformer",
)  # fmt: skip
