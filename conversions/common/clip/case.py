"""CLIP's text encoders under parity: transformers' classes, called as the pipelines call them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from conversions.common.candidates import load
from parity.case import Block, Candidate, ComponentCase, Named, Shapes

HIDDEN = -1e4  # in the recorded mask for -inf, which cannot be compared: a softmax gives 0 for both, in float64 too


class _Named(nn.Module):
    """A CLIPTextModel of transformers 5 under the names of its file, which begin with `text_model`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.text_model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.text_model(*args, **kwargs)


def load_encoder(class_name: str, folder: Path) -> nn.Module:
    """A text encoder in float32; its modules are called as its file's tensors."""
    model = load("transformers", class_name, folder)
    return model if hasattr(model, "text_model") else _Named(model)


def _penultimate(model: Any, given: Named) -> Tensor:
    """text (B, L) -> (B, L, h): what is left of the tower, normalised at its end."""
    states: Tensor = model(given["text"].long()).last_hidden_state
    return states


def _both(model: Any, given: Named) -> Mapping[str, Any]:
    """text (B, L) -> the last layer's input (B, L, h) and the pooled, projected text (B, p)."""
    found = model(given["text"].long(), output_hidden_states=True)
    return {"text_intermediates": [found.hidden_states[-2]], "text_features": found.text_embeds}


def _attention_in(own: Named, shapes: Shapes) -> Named:
    """The original names its one input three times. Its mask is a tensor; transformers has a flag, `is_causal`, which
    is written out here (HIDDEN: as it was recorded). What the masks do shows in the outputs.
    """
    states = own["hidden_states"]
    mask = torch.full(shapes["attn_mask"], HIDDEN, dtype=states.dtype).triu(1)
    return {"x": states, "k_x": states, "v_x": states, "attn_mask": mask}


# The original's attention holds q, k and v in one matrix and applies it itself: there is no module to compare.
_ATTENTION = Block(r"transformer\.resblocks\.\d+\.attn", inputs=_attention_in, outputs=lambda own, _: {"0": own["0"]})


def encoder_case(component: str, recipe: str, class_name: str, trace: Path) -> ComponentCase:
    """A text encoder that open_clip's tower is converted to."""
    passes = {"penultimate": _penultimate, "encode": _both}
    candidate = Candidate("transformers", partial(load_encoder, class_name), passes, (_ATTENTION,))
    return ComponentCase(component, f"conversions.common.clip.recipe:{recipe}", trace, (candidate,))
