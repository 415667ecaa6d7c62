"""Inputs that are not random: captured while a pipeline runs, or read from a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from parity.case import PipelineCase
from parity.recorder import bind
from parity.stages import Request
from porter.core.errors import CheckpointError, MissingError, UsageError


@torch.no_grad()
def captured_inputs(case: PipelineCase, port: Path, component: str, request: Request) -> dict[str, dict[str, Tensor]]:
    """What the reference pipeline's component received at its first, middle and last call -> `forward@<call>`.

    Raises:
        UsageError: the pipeline never called it, or it received no tensors.
    """
    side = case.reference(port, torch.float32)
    stage = "denoiser" if component in ("transformer", "unet") else component
    module = side.stages.get(stage)
    if module is None:
        raise UsageError(f"the pipeline's stages hold no {component}", expected=" | ".join(side.stages))
    seen: list[dict[str, Tensor]] = []

    def keep(m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = bind(m, args, kwargs)
        seen.append({name: value.detach().clone() for name, value in named.items() if isinstance(value, Tensor)})

    handle = module.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        side.run(request)
    finally:
        handle.remove()
    if not seen or not seen[0]:
        raise UsageError(f"the pipeline called {component} with no tensors", hint="--inputs random")
    calls = dict.fromkeys((0, len(seen) // 2, len(seen) - 1))
    return {f"forward@{call}": seen[call] for call in calls}


def inputs_from_file(path: Path, passes: Sequence[str]) -> Mapping[str, dict[str, Tensor]]:
    """Named inputs from a safetensors file; `pass/name` where there are several passes.

    Raises:
        MissingError: no such file.
        CheckpointError: it cannot be read, or names an unknown pass.
    """
    if not path.is_file():
        raise MissingError(
            f"no such file: {path}", expected="random | captured | a safetensors file", hint="--inputs random"
        )
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is no safetensors file", found=str(error), hint="--inputs random") from error
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, slash, rest = key.partition("/")
        name, rest = (name, rest) if slash else (passes[0], key)
        if name not in passes:
            raise CheckpointError(f"{path}: {key} is of no pass", expected=" | ".join(passes), found=name)
        found.setdefault(name, {})[rest] = tensor.float() if tensor.is_floating_point() else tensor
    return found
