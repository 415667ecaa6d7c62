"""diffusers' classes as candidates of a component's parity: filled strictly from a port, in float32."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from parity.case import Candidate, Named
from porter.core.errors import CheckpointError
from porter.core.files import read_config
from runtime.loader import quiet_libraries

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
    if library == "transformers":
        return _pretrained(cls, folder)
    config = {key: value for key, value in read_config(folder / "config.json").items() if key != "_class_name"}
    module: nn.Module = cls.from_config(config)
    state: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        state |= {name: tensor.float() for name, tensor in load_file(file).items()}
    module.load_state_dict(state, strict=True)
    return module.eval()


def _pretrained(cls: Any, folder: Path) -> nn.Module:
    """As transformers itself reads it, with nothing missing or left over: its names in memory are not the file's."""
    with quiet_libraries():
        module, told = cls.from_pretrained(folder, dtype=torch.float32, local_files_only=True, output_loading_info=True)
    if odd := {kind: sorted(names) for kind, names in told.items() if names}:
        raise CheckpointError(f"{folder} does not fill {cls.__name__}", found=str(odd)[:200])
    loaded: nn.Module = module
    return loaded.eval()
