"""Regional compilation: the blocks that a model repeats are compiled once each, not the whole model."""

from __future__ import annotations

import shutil

import torch
from torch import nn

from porter.core.errors import UsageError


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """The entries of module lists that hold two or more modules of one class, the outermost."""
    found: list[nn.Module] = []

    def walk(parent: nn.Module) -> None:
        for child in parent.children():
            entries = list(child) if isinstance(child, nn.ModuleList) else []
            if len(entries) > 1 and len({type(entry) for entry in entries}) == 1:
                found.extend(entries)
            else:
                walk(child)

    walk(module)
    return found


def compile_blocks(module: nn.Module) -> int:
    """Compile each of the module's blocks (the module itself where it has none); how many there are.

    The work is done when they first run. Blocks of one class and shape share their code.

    Raises:
        UsageError: a CPU without a C++ compiler, which torch needs there.
    """
    device = next(module.parameters()).device
    if device.type == "cpu" and not any(shutil.which(name) for name in ("g++", "clang++", "cl")):
        raise UsageError(
            "--compile needs a C++ compiler on a CPU", expected="g++ or clang++", found="neither",
            hint="apt-get install g++, or leave --compile out",
        )  # fmt: skip
    blocks = blocks_of(module) or [module]
    torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, 2 * len(blocks))
    for block in blocks:
        block.compile()
    return len(blocks)
