"""diffusers' classes as candidates of a component's parity: filled strictly from a port, in float32."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from parity.case import Candidate, Named
from porter.core.files import read_config

Layout = Callable[[str, tuple[int, ...], Tensor], Tensor]


def diffusers_candidate(
    class_name: str,
    passes: Mapping[str, Callable[[Any, Named], Any]],
    layout: Layout = lambda path, shape, tensor: tensor,
) -> Candidate:
    """A class of diffusers, called as `passes` say: pass name -> (module, reference's inputs) -> output."""
    return Candidate("diffusers", partial(load, "diffusers", class_name), passes, layout=layout)


def heads_and_tokens(pattern: str) -> Layout:
    """For modules whose path ends as `pattern` says: one side has (B, tokens, heads, E), the other heads first."""

    def layout(path: str, shape: tuple[int, ...], tensor: Tensor) -> Tensor:
        return tensor.transpose(1, 2) if tensor.ndim == 4 and re.search(f"(?:{pattern})$", path) else tensor

    return layout


def load(library: str, class_name: str, folder: Path) -> nn.Module:
    """`class_name` of `library` by its config in `folder`, every tensor of the folder in it and no other, float32."""
    from safetensors.torch import load_file

    cls = getattr(importlib.import_module(library), class_name)
    config = {key: value for key, value in read_config(folder / "config.json").items() if key != "_class_name"}
    module: nn.Module = cls.from_config(config) if library == "diffusers" else cls(cls.config_class(**config))
    state: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        state |= {name: tensor.float() for name, tensor in load_file(file).items()}
    module.load_state_dict(state, strict=True)
    return module.eval()
