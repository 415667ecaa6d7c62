"""A LoRA's file → its factors as a pipeline's modules take them: names matched, packed, on the module's device."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from porter.core.checkpoint import ANY, spec
from porter.core.described import full_config
from porter.core.errors import BadInputError, CheckpointError
from porter.core.family import Component, families, family_of_pipeline
from porter.core.lora import LoraFile
from porter.core.loratargets import Target, changes, original_plans
from porter.core.lowrank import Delta, carry, joined, make
from porter.core.onload import compile_on_load
from porter.core.shards import cut
from porter.core.tensorplan import TensorPlan
from runtime.layers.lowrank import Span, takes_lora
from runtime.loader import stored_shapes

if TYPE_CHECKING:
    from runtime.pipeline import ComposedPipelineBase

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_DENOISERS = ("unet", "prior")  # further names of what predicts, in pipelines of a library
_AGAIN = "download or export the file again"


class Layer(NamedTuple):
    """A LoRA's part in one layer. a: (R, inputs, …), b: (O, R)."""

    a: Tensor
    b: Tensor
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class Lora:
    """A loaded LoRA. `layers`: (component, module) → its factors, as the pipeline's modules have them."""

    path: Path
    sha256: str
    notes: tuple[str, ...]
    layers: Mapping[tuple[str, str], Layer]


def load_lora(pipeline: ComposedPipelineBase, file: LoraFile, component: str | None) -> Lora:
    """The factors of `file` for the modules of `pipeline`.

    Raises:
        UsageError: the denoiser that it is for must be named.
        CheckpointError: the file cannot be read.
        BadInputError: keys that fit nothing, factors that do not fit their weights, numbers that are none.
    """
    parts = {name: _Part(pipeline, name) for name in _components(pipeline)}
    layers: dict[tuple[str, str], Layer] = {}
    with _Reader(file.path) as reader:
        for name, found in changes(file, [part.target for part in parts.values()], component).items():
            model, plan = parts[name].model, parts[name].plan()
            usual = Counter(p.dtype for p in model.parameters() if p.dtype in FLOATS).most_common(1)
            for module, change in (found if plan is None else carry(found, plan)).items():
                layer = model.get_submodule(module)
                if not takes_lora(layer):
                    raise BadInputError(
                        f"{file.path}: {change.terms[0].stem} changes {module} of {name}, which takes no LoRA",
                        expected="a linear layer, or a convolution", found=type(layer).__name__,
                        hint="merge the LoRA into the weights before the model is converted",
                    )  # fmt: skip
                own: Any = (
                    layer.weight.dtype
                )  # which may be wider than the model's; of quantised weights it says nothing
                dtype = own if own in FLOATS or not usual else usual[0][0]
                layers[name, module] = _held(reader.layer(change, layer, dtype), layer, plan, module)
    return Lora(file.path, _sha256(file.path), file.notes, layers)


def _components(pipeline: ComposedPipelineBase) -> list[str]:
    """Components that a LoRA may change: what predicts, and what reads prompts."""
    modules = pipeline.modules
    names = (*pipeline.denoisers, *_DENOISERS, *(name for name in modules if name.startswith("text_encoder")))
    return [name for name in dict.fromkeys(names) if isinstance(modules.get(name), nn.Module)]


class _Part:
    """A component as its files have it: a native module's weights under their names on disk."""

    def __init__(self, pipeline: ComposedPipelineBase, name: str) -> None:
        self.model: nn.Module = pipeline.modules[name]
        entry = pipeline.config.model_index.get(name)
        self.class_name = entry[1] if isinstance(entry, list) and len(entry) == 2 else type(self.model).__name__
        own = getattr(self.model, "config", None)
        known = pipeline.config.configs.get(name) or (dict(own) if isinstance(own, Mapping) else {})
        reads = name.startswith("text_encoder")
        self.config = full_config("transformers" if reads else "diffusers", self.class_name, known)
        self.recipe = getattr(self.model, "on_load", None)
        shapes = stored_shapes(self.model, self.recipe, self.config, _shapes(self.model))
        header = {key: spec(ANY, shape, key) for key, shape in shapes.items()}
        plans = original_plans(self._record(pipeline.pipeline_name, name), self.config, header)
        self.target = Target(name, self.class_name, header, plans, predicts=not reads)

    def plan(self) -> TensorPlan | None:
        """How the module packs the stored weights; None where it has them as they are."""
        return None if self.recipe is None else compile_on_load(self.recipe, self.config, self.target.header)

    def _record(self, pipeline_name: str, name: str) -> Component | None:
        """What the catalogue knows of the component; another family's knowledge where the classes are the same."""
        first = family_of_pipeline(pipeline_name)
        kind = name.partition("_")[0]
        for family in (*([first] if first else []), *families().values()):
            for part in family.components:
                if self.class_name in part.class_names and part.layouts and part.name.partition("_")[0] == kind:
                    return part
        return None


class _Reader:
    """Tensors of one LoRA's file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stack = ExitStack()
        self._opened: Any = None

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def layer(self, change: Delta, layer: Any, dtype: torch.dtype) -> Layer:
        """One layer's factors, on its device (in main memory where its weights are offloaded), in the model's dtype."""
        pair, device = joined(change), "cpu" if layer.weight.is_meta else layer.weight.device
        tensors = [make(matrix, self._tensor, torch).to(device, dtype) for matrix in (pair.a, pair.b)]
        if not all(bool(tensor.isfinite().all()) for tensor in tensors):
            raise BadInputError(
                f"{self.path}: the factors of {change.terms[0].stem} are too large for the model's numbers",
                expected=str(dtype).removeprefix("torch."), found="infinity", hint="run it with --dtype bfloat16",
            )  # fmt: skip
        spans = tuple((slice(*span.rows), slice(*span.ranks), span.scale) for span in pair.spans)
        return Layer(tensors[0].contiguous(), tensors[1].contiguous(), spans)

    def _tensor(self, name: str) -> Tensor:
        try:
            if self._opened is None:
                self._opened = self._stack.enter_context(safe_open(str(self.path), framework="pt", device="cpu"))
            found: Tensor = self._opened.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.path} cannot be read", found=str(error), hint=_AGAIN) from error
        found = found if found.dtype in FLOATS else found.float()  # float8 knows no arithmetic
        if not bool(found.isfinite().all()):
            raise BadInputError(
                f"{self.path}: {name} holds NaN or infinity", expected="finite numbers",
                found=f"{int((~found.isfinite()).sum())} of {found.numel()}", hint=_AGAIN,
            )  # fmt: skip
        return found


def _held(layer: Layer, module: Any, plan: TensorPlan | None, name: str) -> Layer:
    """A rank's part of a layer's factors, where tensor-parallel ranks share its weight."""
    weight = module.weight
    if not isinstance(weight, DTensor) or plan is None:
        return layer
    step, output = next(made for made in plan.outputs() if made[1].name == f"{name}.weight")
    held = cut(plan, step, output, weight.device_mesh.get_local_rank(), weight.device_mesh.size())
    if held is None:
        return layer
    whole = layer.a if held.dim else layer.b
    part = torch.cat([whole.narrow(held.dim, begin, end - begin) for begin, end in held.ranges], dim=held.dim)
    return layer._replace(a=part) if held.dim else layer._replace(b=part)


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """A module's tensors; of a linear layer whose weight is stored otherwise the shape that it stands for."""
    found = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            found[f"{name}.weight"] = (layer.out_features, layer.in_features)
    return found


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
