"""LoRAs of a pipeline: several at a time, each with a scale, changed without loading the model again.

    pipeline.loras.add("style.safetensors", scale=0.8)
    pipeline.generate("a cat", loras=[("style", 0.5)])   # this request alone
    pipeline.loras.clear()                               # the base model, in every bit

A LoRA runs beside the frozen weights, or, after `fuse`, merged into them. Its file may be of any form that
`porter.core.lora` reads, its names of any layout that a recipe knows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from porter.core.errors import UsageError
from porter.core.lora import read_lora
from runtime.layers.lowrank import Span, attach, detach
from runtime.lorafiles import FLOATS, Layer, Lora, load_lora
from runtime.memory import device_of

if TYPE_CHECKING:
    from runtime.pipeline import ComposedPipelineBase

Chosen = tuple[tuple[str, float], ...]  # LoRAs by name with their scales, in the order of their sums


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
        lora = load_lora(self._pipeline, file, component)
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
        if not all(isinstance(each, tuple | list) and len(each) == 2 for each in own):
            raise UsageError("loras is no list of pairs", expected="[(name, scale), …]", found=repr(own)[:80])
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
                device = device_of(self._pipeline.modules[place[0]])
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
        if weight.is_meta:
            raise UsageError(
                "LoRAs cannot be merged into weights that are offloaded: they are read anew for each use",
                expected="--offload none", found=f"{place[1]} of {place[0]}",
                hint="leave the LoRAs beside the weights: pipeline.loras.unfuse()",
            )  # fmt: skip
        if weight.dtype not in FLOATS:
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


def _scaled(spans: Sequence[Span], scale: float) -> list[Span]:
    return [(rows, ranks, own * scale) for rows, ranks, own in spans]


def _check_scale(name: str, scale: float) -> None:
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
        raise UsageError(f"the scale of {name} is no number", expected="a finite number", found=repr(scale))
