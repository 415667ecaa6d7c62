"""LoRAs of a pipeline: several at a time, each with a scale, changed without loading the model again.

    pipeline.loras.add("style.safetensors", scale=0.8)
    pipeline.generate("a cat", loras=[("style", 0.5)])   # this request alone
    pipeline.loras.clear()                               # the base model, in every bit

A LoRA runs beside the frozen weights, or, after `fuse`, merged into them. Its file may be of any form that
`porter.core.lora` reads, its names of any layout that a recipe knows.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from porter.core.checkpoint import ANY, spec
from porter.core.described import full_config
from porter.core.errors import BadInputError, CheckpointError, UsageError
from porter.core.family import Component, families, family_of_pipeline
from porter.core.lora import LoraFile, read_lora
from porter.core.loratargets import Target, changes, original_plans
from porter.core.lowrank import Delta, carry, joined, make
from porter.core.onload import compile_on_load
from porter.core.shards import cut
from porter.core.tensorplan import TensorPlan
from runtime.layers.lowrank import Span, attach, detach, takes_lora
from runtime.loader import stored_shapes

if TYPE_CHECKING:
    from runtime.pipeline import ComposedPipelineBase

Chosen = tuple[tuple[str, float], ...]  # LoRAs by name with their scales, in the order of their sums
_DENOISERS = ("unet", "prior")  # further names of what predicts, in pipelines of a library
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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


class LoraStack:
    """The LoRAs of one pipeline. Scales hold for all requests that do not bring their own."""

    def __init__(self, pipeline: ComposedPipelineBase) -> None:
        self._pipeline = pipeline
        self._loaded: dict[str, Lora] = {}
        self._scales: dict[str, float] = {}
        self._active: Chosen = ()  # what the modules have now
        self._originals: dict[tuple[str, str], Tensor] = {}  # on the CPU, of what is merged
        self.fused = False

    @property
    def scales(self) -> dict[str, float]:
        """Every loaded LoRA's scale by name, in the order of loading."""
        return dict(self._scales)

    def add(
        self, path: str | Path, name: str | None = None, scale: float = 1.0, *, component: str | None = None
    ) -> str:
        """Load a LoRA and switch it on.

        Args:
            name: default: the file's name without its ending.
            component: the denoiser that it is for, where the pipeline has two and the file does not say.

        Returns:
            The name.

        Raises:
            UsageError: the name is taken, a scale that is none, or the component must be named.
            MissingError: no such file.
            CheckpointError: a damaged file, or no safetensors file.
            BadInputError: a LoRA for another model; keys that fit nothing; factors that do not fit their weights.
        """
        file = read_lora(path)
        name = name if name is not None else file.path.stem
        if not name or name in self._loaded:
            raise UsageError(f"a LoRA {name!r} is loaded already", expected="another name", hint="give it with name=")
        _check_scale(name, scale)
        lora = self._load(file, component)
        self._loaded[name], self._scales[name] = lora, float(scale)
        self._pipeline.warnings += [note for note in lora.notes if note not in self._pipeline.warnings]
        self._apply(self._chosen())
        return name

    def set_scales(self, scales: Mapping[str, float]) -> None:
        """Give the LoRAs named in `scales` other scales; 0 switches one off. The others keep theirs.

        Raises:
            UsageError: no LoRA of this name is loaded, or a scale that is none.
        """
        for name, scale in scales.items():
            self._check(name)
            _check_scale(name, scale)
        self._scales |= {name: float(scale) for name, scale in scales.items()}
        self._apply(self._chosen())

    def remove(self, name: str) -> None:
        """Unload one. Raises UsageError where none of this name is loaded."""
        self._check(name)
        del self._scales[name]
        self._apply(self._chosen())
        del self._loaded[name]

    def clear(self) -> None:
        """Unload all: the base model is as it was, in every bit."""
        self._apply(())
        self._scales.clear()
        self._loaded.clear()
        self.fused = False

    def fuse(self) -> None:
        """Merge what is switched on into the weights, for speed. The originals are kept on the CPU; changes to the
        stack merge anew, and requests cannot bring their own."""
        self._apply(())
        self.fused = True
        self._apply(self._chosen())

    def unfuse(self) -> None:
        """Put the original weights back, in every bit, and run beside them again."""
        self._apply(())
        self.fused = False
        self._apply(self._chosen())

    @contextmanager
    def using(self, own: Sequence[tuple[str, float]] | None) -> Iterator[None]:
        """Run the body with a request's own LoRAs; None: those of the pipeline.

        Raises:
            UsageError: one that is not loaded, one named twice, a scale that is none, or the stack is fused.
        """
        if own is None:
            yield
            return
        for name, scale in own:
            self._check(name)
            _check_scale(name, scale)
        if len({name for name, _ in own}) < len(own):
            raise UsageError("a LoRA is named twice in one request", found=", ".join(name for name, _ in own))
        wanted = tuple((name, float(scale)) for name, scale in own if scale)
        if self.fused and wanted != self._active:
            raise UsageError(
                "a request cannot choose its LoRAs while they are fused", expected="no loras, or the fused ones",
                found=", ".join(f"{name}:{scale:g}" for name, scale in own) or "none", hint="pipeline.loras.unfuse()",
            )  # fmt: skip
        try:
            self._apply(wanted)
            yield
        finally:
            self._apply(self._chosen())

    def provenance(self, own: Sequence[tuple[str, float]] | None = None) -> list[dict[str, Any]]:
        """What a picture's metadata says of its LoRAs: file name, sha256 and scale of each that is switched on."""
        chosen = self._chosen() if own is None else own
        return [
            {"name": name, "file": self._loaded[name].path.name, "sha256": self._loaded[name].sha256, "scale": scale}
            for name, scale in chosen if scale
        ]  # fmt: skip

    def _chosen(self) -> Chosen:
        return tuple((name, scale) for name, scale in self._scales.items() if scale)

    def _check(self, name: str) -> None:
        if name not in self._loaded:
            raise UsageError(
                f"no LoRA {name!r} is loaded", expected=", ".join(self._loaded) or "none is", found=name,
                hint="pipeline.loras.add(path, name)",
            )  # fmt: skip

    def _apply(self, wanted: Chosen) -> None:
        """Make `wanted` what the modules have."""
        if wanted == self._active:
            return
        self._restore()
        here = {place for name, _ in self._active for place in self._loaded[name].layers}
        there = {place for name, _ in wanted for place in self._loaded[name].layers}
        for place in here - there:
            detach(self._module(place))
        for place in there:
            mine = [(layers[place], scale) for name, scale in wanted if place in (layers := self._loaded[name].layers)]
            if self.fused:
                self._merge(place, mine)
            else:
                module = self._module(place)
                device = module.weight.device
                pairs = [(layer.a.to(device), layer.b.to(device)) for layer, _ in mine]
                attach(module, pairs, [_scaled(layer.spans, scale) for layer, scale in mine])
        self._active = wanted

    def _module(self, place: tuple[str, str]) -> Any:
        component, module = place
        return self._pipeline.modules[component].get_submodule(module)

    @torch.no_grad()
    def _merge(self, place: tuple[str, str], layers: Sequence[tuple[Layer, float]]) -> None:
        """Add the LoRAs of one layer to its weight, in float32, rounded once."""
        weight = self._module(place).weight
        if isinstance(weight, DTensor):
            raise UsageError(
                "LoRAs cannot be merged into weights that ranks share", expected="one process, or no --tp",
                found=f"{place[1]} of {place[0]}", hint="leave the LoRAs beside the weights: pipeline.loras.unfuse()",
            )  # fmt: skip
        if weight.dtype not in _FLOATS:
            raise UsageError(
                f"{place[1]} of {place[0]} is quantised: nothing can be merged into it", expected="weights in float",
                found=str(weight.dtype), hint="leave the LoRAs beside the weights: pipeline.loras.unfuse()",
            )  # fmt: skip
        self._originals[place] = weight.detach().to("cpu", copy=True)
        wide = torch.promote_types(weight.dtype, torch.float32)
        merged = weight.detach().to(wide, copy=True).flatten(1)
        for layer, scale in layers:
            for rows, ranks, factor in _scaled(layer.spans, scale):
                a, b = (tensor.to(weight.device, wide) for tensor in (layer.a[ranks].flatten(1), layer.b[rows, ranks]))
                merged[rows] += (b @ a) * factor
        weight.copy_(merged.view_as(weight))

    @torch.no_grad()
    def _restore(self) -> None:
        """Put the original weights back."""
        for place, original in self._originals.items():
            self._module(place).weight.copy_(original)
        self._originals.clear()

    def _load(self, file: LoraFile, component: str | None) -> Lora:
        targets = [self._target(name) for name in self._components()]
        layers: dict[tuple[str, str], Layer] = {}
        reader = _Reader(file.path)
        for name, found in changes(file, targets, component).items():
            model = self._pipeline.modules[name]
            dtype = next((p.dtype for p in model.parameters() if p.dtype in _FLOATS), torch.float32)
            plan = self._plan(name)
            for module, change in (found if plan is None else carry(found, plan)).items():
                layer = model.get_submodule(module)
                if not takes_lora(layer):
                    raise BadInputError(
                        f"{file.path}: {change.terms[0].stem} changes {module} of {name}, which takes no LoRA",
                        expected="a linear layer, or a convolution", found=type(layer).__name__,
                        hint="merge the LoRA into the weights before the model is converted",
                    )  # fmt: skip
                layers[name, module] = _held(reader.layer(change, layer, dtype), layer, plan, module)
        return Lora(file.path, reader.sha256(), file.notes, layers)

    def _components(self) -> list[str]:
        """Components that a LoRA may change: what predicts, and what reads prompts."""
        modules = self._pipeline.modules
        names = (*self._pipeline.denoisers, *_DENOISERS, *(name for name in modules if name.startswith("text_encoder")))
        return [name for name in dict.fromkeys(names) if isinstance(modules.get(name), nn.Module)]

    def _target(self, name: str) -> Target:
        """A component as its files have it: a native module's weights under their names on disk."""
        model = self._pipeline.modules[name]
        entry = self._pipeline.config.model_index.get(name)
        class_name = entry[1] if isinstance(entry, list) and len(entry) == 2 else type(model).__name__
        config = self._config(name, class_name)
        shapes = stored_shapes(model, getattr(model, "on_load", None), config, _shapes(model))
        header = {key: spec(ANY, shape, key) for key, shape in shapes.items()}
        plans = original_plans(self._record(name, class_name), config, header)
        return Target(name, class_name, header, plans, predicts=not name.startswith("text_encoder"))

    def _config(self, name: str, class_name: str) -> dict[str, Any]:
        """A component's config, whole."""
        own = getattr(self._pipeline.modules[name], "config", None)
        known = self._pipeline.config.configs.get(name) or (dict(own) if isinstance(own, Mapping) else {})
        library = "transformers" if name.startswith("text_encoder") else "diffusers"
        return full_config(library, class_name, known)

    def _record(self, name: str, class_name: str) -> Component | None:
        """What the catalogue knows of a component; another family's knowledge where the classes are the same."""
        first = family_of_pipeline(self._pipeline.pipeline_name)
        for family in (*([first] if first else []), *families().values()):
            for part in family.components:
                if (
                    class_name in part.class_names
                    and part.layouts
                    and part.name.partition("_")[0] == name.partition("_")[0]
                ):
                    return part
        return None

    def _plan(self, name: str) -> TensorPlan | None:
        """How a component's module packs its stored weights; None where it has them as they are."""
        recipe = getattr(self._pipeline.modules[name], "on_load", None)
        if recipe is None:
            return None
        target = self._target(name)
        return compile_on_load(recipe, self._config(name, target.class_name), target.header)


class _Reader:
    """Tensors of one LoRA's file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def layer(self, change: Delta, layer: Any, dtype: torch.dtype) -> Layer:
        """One layer's factors, on its device, in the model's dtype."""
        pair = joined(change)
        tensors = [make(matrix, self._tensor, torch).to(layer.weight.device, dtype) for matrix in (pair.a, pair.b)]
        if not all(bool(tensor.isfinite().all()) for tensor in tensors):
            raise BadInputError(
                f"{self.path}: the factors of {change.terms[0].stem} are too large for the model's numbers",
                expected=str(dtype).removeprefix("torch."), found="infinity", hint="run it with --dtype bfloat16",
            )  # fmt: skip
        spans = tuple((slice(*span.rows), slice(*span.ranks), span.scale) for span in pair.spans)
        return Layer(tensors[0].contiguous(), tensors[1].contiguous(), spans)

    def _tensor(self, name: str) -> Tensor:
        try:
            with safe_open(str(self.path), framework="pt", device="cpu") as file:
                found: Tensor = file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.path} cannot be read", found=str(error), hint="download it again") from error
        found = found if found.dtype in _FLOATS else found.float()  # float8 knows no arithmetic
        if not bool(found.isfinite().all()):
            raise BadInputError(
                f"{self.path}: {name} holds NaN or infinity", expected="finite numbers",
                found=f"{int((~found.isfinite()).sum())} of {found.numel()}", hint="download or export the file again",
            )  # fmt: skip
        return found

    def sha256(self) -> str:
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


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


def _scaled(spans: Sequence[Span], scale: float) -> list[Span]:
    return [(rows, ranks, own * scale) for rows, ranks, own in spans]


def _check_scale(name: str, scale: float) -> None:
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
        raise UsageError(f"the scale of {name} is no number", expected="a finite number", found=repr(scale))
