"""Text and vision encoders of transformers that are offloaded: their weights come from their files when they are used.

The class makes its own tables; its weights come by name. Names that the library changes while it reads, as those of
older files, are changed in the same way. Files that it converts in another way are left to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from porter.core.checkpoint import ANY, Header, spec
from porter.core.onload import compile_on_load
from runtime.memory.files import FileHome
from runtime.memory.options import Memory
from runtime.memory.parking import keep
from runtime.meta import parameters_on_meta


def load_encoder(
    cls: Any, folder: Path, header: Header, *, dtype: torch.dtype, device: torch.device, memory: Memory
) -> nn.Module | None:
    """A model of transformers, offloaded as `memory` says; None where its files hold other tensors than the class."""
    from transformers import GenerationConfig

    config = cls.config_class.from_pretrained(folder, local_files_only=True)
    with parameters_on_meta():
        module: Any = cls._from_config(config, dtype=dtype)
    module.tie_weights()
    every: dict[str, Tensor] = module.state_dict(keep_vars=True)
    own = {name: tensor for name, tensor in every.items() if not tensor.is_meta}  # tables that files hold too
    own |= dict(module.named_parameters())  # each once, however many names it has
    names = _own_names(module, header, every)
    stored = {mine: replace(header[name], name=mine) for name, mine in names.items() if mine is not None}
    if len(stored) != len(header) or {n: i.shape for n, i in stored.items()} != {n: t.shape for n, t in own.items()}:
        return None
    # As the library does: what a class keeps in float32 because of float16's range, and what it always keeps.
    kept = set(module._keep_in_fp32_modules or ()) if dtype == torch.float16 else set()
    if dtype in (torch.float16, torch.bfloat16):
        kept |= set(getattr(module, "_keep_in_fp32_modules_strict", None) or ())
    kinds = {
        name: torch.float32 if any(f".{word}." in f".{name}." for word in kept) else tensor.dtype
        for name, tensor in own.items()
    }
    targets = {name: spec(ANY, tuple(tensor.shape), name) for name, tensor in own.items()}
    home = FileHome(compile_on_load(None, {}, stored, targets), lambda name, _: kinds[name])
    for part in module.modules():
        for leaf, table in part._buffers.items():
            part._buffers[leaf] = None if table is None else table.to(device)
    if cls.can_generate() and (folder / "generation_config.json").is_file():
        module.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    keep(module, home, device, memory)
    found: nn.Module = module.eval()
    return found


def _own_names(module: Any, names: Iterable[str], own: Mapping[str, Tensor]) -> dict[str, str | None]:
    """What the library calls each tensor of a file; None where it makes something else of it."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:  # before version 5
        return {name: name for name in names}
    ways = get_model_conversion_mapping(module)
    renamings = [way for way in ways if isinstance(way, WeightRenaming)]
    converters = [way for way in ways if isinstance(way, WeightConverter)]
    made: dict[str, str | None] = {}
    for name in names:
        found, converted = rename_source_key(name, renamings, converters, module.base_model_prefix, own)
        if found not in own and name in own:
            found, converted = rename_source_key(name, [], [], module.base_model_prefix, own)
        made[name] = None if converted is not None else found
    return made
