"""How much device memory a pipeline takes, by arithmetic on configs: weights, activations, and whether it fits.

An estimate counts tensors. The activations of a component are the bytes at the peak of one call of it that are neither
parameters nor buffers: inputs, temporaries and outputs, in inference, without gradients, in eager execution with fused
attention. Each class has its own formula, a function of config and workload, in `conversions/*/*memory.py`; a class
without one is named as not estimated. docs/memory.md says what is left out, and how far formulas and tracker lie apart.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Protocol

from porter.core.described import Described, full_config, is_autoencoder
from porter.core.fits import Fits, verdict
from porter.core.formulas import Formula, facts_of, formula_of, kept_of
from porter.core.records import check_keys
from porter.core.workload import ELEMENT, Workload

__all__ = ["Fits", "Formula", "Memory", "PartMemory", "Sized", "StageMemory", "Workload", "estimate", "formula_of"]

Stage = Literal["text encoding", "image encoding", "denoising", "decoding"]
STAGES: tuple[Stage, ...] = ("text encoding", "image encoding", "denoising", "decoding")
# Of a device's memory, kept free in the verdict: the CUDA context, libraries' workspaces, the allocator's fragments.
RESERVE = 10**9
# Blocks on the device under layer offload: the one that runs, and the one that is fetched meanwhile.
_BLOCKS_AT_ONCE = 2
_DEPTHS = (
    "num_layers", "num_single_layers", "num_refiner_layers", "num_mmdit_layers", "num_single_dit_layers", "n_layers",
    "n_refiner_layers", "num_hidden_layers", "num_text_blocks", "num_visual_blocks", "depth",
)  # fmt: skip


class Sized(Described, Protocol):
    """A component with the size of its weights; `ComponentPlan` is one."""

    @property
    def parameters(self) -> int | None: ...
    @property
    def dtypes(self) -> Mapping[str, int]: ...
    @property
    def bytes(self) -> int: ...


@dataclass(frozen=True)
class PartMemory:
    """One component that holds weights.

    Attributes:
        weights: bytes on the device, in the workload's dtype; quantised numbers stay as they are stored.
        activations: bytes at the peak of one call beside the weights; None where they are not estimated.
        blocks: repeated blocks that its config names; 1 where it names none.
        note: what was assumed or left out.
        missing: what an estimate of the activations lacks: a `formula`, or a `config` that is here and says enough.
    """

    name: str
    class_name: str
    stage: Stage
    weights: int
    activations: int | None
    blocks: int
    note: str = ""
    missing: Literal["", "formula", "config"] = ""


@dataclass(frozen=True)
class StageMemory:
    """Peak of one stage, in bytes; activations without a formula count as nothing.

    Attributes:
        resident: with every component of the pipeline on the device.
        component_offload: with the running component alone on the device.
        layer_offload: with two blocks of the running component on the device.
    """

    stage: Stage
    resident: int
    component_offload: int
    layer_offload: int


@dataclass(frozen=True)
class Memory:
    """The whole estimate; `to_json` and `from_json` keep all of it.

    Attributes:
        weights: bytes of all components together.
        reserve: bytes of the device that the verdict leaves free.
        reason: the verdict's figures, and what it leaves out, in one line.
        assumed: lines on what nobody said: default sizes, guidance, and so on.
        left_out: names of components whose activations are not estimated.
        absent: names of components whose weights are not here, and whose size nothing says: they count as nothing.
    """

    workload: Workload
    device_memory: int | None
    weights: int
    reserve: int
    components: tuple[PartMemory, ...]
    stages: tuple[StageMemory, ...]
    fits: Fits
    reason: str
    assumed: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dict(json.loads(json.dumps(asdict(self))))

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Memory:
        """The inverse of `to_json`.

        Raises:
            BadInputError: a missing or an unknown key.
        """
        parts, stages = document.get("components", ()), document.get("stages", ())
        pairs: list[tuple[type, Any]] = [(cls, document), (Workload, document.get("workload", {}))]
        pairs += [(PartMemory, part) for part in parts] + [(StageMemory, stage) for stage in stages]
        check_keys(pairs, "memory estimate", "porter plan")
        return cls(**{
            **document,
            "workload": Workload(**{**document["workload"], "guessed": tuple(document["workload"]["guessed"])}),
            "components": tuple(PartMemory(**part) for part in parts),
            "stages": tuple(StageMemory(**stage) for stage in stages),
            "assumed": tuple(document["assumed"]),
            "left_out": tuple(document["left_out"]),
            "absent": tuple(document["absent"]),
        })  # fmt: skip


def estimate(
    components: Sequence[Sized],
    workload: Workload,
    device_memory: int | None = None,
    assumed: Sequence[str] = (),
    *,
    absent: Sequence[str] = (),
    nothing: str = "no component with weights is known",
) -> Memory:
    """Memory of a pipeline made of `components` for one call.

    Args:
        device_memory: bytes of the device; without it nothing is said about fitting.
        assumed: what `default_workload` assumed; what plays no part in the estimate is left out.
        absent: components of the pipeline whose size nobody knows.
        nothing: the reason that is given where there are no components.
    """
    parts = tuple(_part(each, workload) for each in components if each.bytes > 0 or each.parameters)
    total = sum(part.weights for part in parts)
    stages = tuple(found for stage in STAGES if (found := _stage(stage, parts, total)))
    left_out = tuple(part.name for part in parts if part.activations is None)
    counted = {part.stage for part in parts if part.activations is not None}
    if not counted - {"text encoding"}:  # the size of a picture plays no part
        workload = replace(workload, guessed=())
        assumed = [line for line in assumed if counted and "text tokens" in line]
    fits: Fits = "unknown"
    reason = nothing
    if stages:
        fits, reason = verdict(parts, stages, device_memory, workload.guessed, absent, RESERVE, _least)
    return Memory(
        workload, device_memory, total, RESERVE, parts, stages, fits, reason, tuple(assumed), left_out, tuple(absent)
    )


def _part(part: Sized, work: Workload) -> PartMemory:
    stage, notes = _stage_of(part), []
    name = part.class_name or ""
    config = full_config(part.library, name, part.config) if part.config else {}
    if stage == "decoding" and work.dtype == "F16" and config.get("force_upcast") and work.upcasts:
        work = replace(work, dtype="F32")
        notes.append("force_upcast: computed in float32")
    work = work.denoised if stage == "denoising" else work.asked(part.name)
    longest = config.get("max_position_embeddings")
    if stage == "text encoding" and isinstance(longest, int) and 0 < longest < work.text_tokens:
        work = replace(work, text_tokens=longest)  # a prompt is cut to what the encoder has positions for
    weights, activations = _weights(part, work), None
    missing: Literal["", "formula", "config"] = ""
    try:
        formula, facts, kept = formula_of(name), facts_of(config), kept_of(name) if config else None
        if kept is not None and work.element < ELEMENT["F32"] and (more := kept(facts, work)):
            weights += more * (ELEMENT["F32"] - work.element)
            notes.append(f"{more / 1e6:.0f} million parameters stay in float32")
        if formula is None:
            missing = "formula"
            notes.append(f"activations not estimated: no formula for {name or 'a component without a class'}")
        elif not config:  # its class's defaults need not be this model's
            missing = "config"
            notes.append("activations not estimated: its config is not here")
        elif (found := int(formula(facts, work))) < 0:
            raise ValueError("a negative size")
        else:
            activations = found
    except (KeyError, TypeError, ValueError, IndexError, ArithmeticError, AttributeError) as error:
        missing = "config"
        notes.append(f"activations not estimated: its config does not say ({type(error).__name__}: {error})")
    if not config:
        notes.append("its blocks are not known: layer offload is counted with all of it on the device")
    return PartMemory(part.name, name, stage, weights, activations, _blocks(config), "; ".join(notes), missing)


def _weights(part: Sized, work: Workload) -> int:
    """Bytes after loading: floating numbers take the workload's dtype, all others stay."""
    if not part.dtypes:
        return part.parameters * work.element if part.parameters else part.bytes
    return sum(size // ELEMENT[code] * work.element if code in ELEMENT else size for code, size in part.dtypes.items())


def _stage_of(part: Sized) -> Stage:
    """The stage that a component works in, by the names that pipelines give."""
    name, class_name = part.name, part.class_name or ""
    if is_autoencoder(part) or name in ("vocoder", "safety_checker", "watermark", "latent_upsampler"):
        return "decoding"
    if name.startswith(("image_encoder", "feature_extractor", "vision")) or "Vision" in class_name:
        return "image encoding"
    if name.startswith(("text", "tokenizer", "prompt", "byt5")) or part.library == "transformers":
        return "text encoding"
    return "denoising"


def _blocks(config: Mapping[str, Any]) -> int:
    """Repeated blocks by the config's own depths: of the transformer, or of the text model inside."""
    inner = config.get("text_config")
    if not any(key in config for key in _DEPTHS) and isinstance(inner, Mapping):
        config = inner
    depths = [config.get(key) for key in _DEPTHS]
    return max(1, sum(depth for depth in depths if isinstance(depth, int) and 0 < depth < 1000))


def _stage(stage: Stage, parts: Sequence[PartMemory], total: int) -> StageMemory | None:
    own = [part for part in parts if part.stage == stage]
    if not own:
        return None
    return StageMemory(
        stage,
        total + max(part.activations or 0 for part in own),
        max(part.weights + (part.activations or 0) for part in own),
        max(min(part.weights, _BLOCKS_AT_ONCE * part.weights // part.blocks) + (part.activations or 0) for part in own),
    )


def _least(parts: Sequence[PartMemory]) -> int:
    """Bytes at the peak of the stage that needs most, with layer offload."""
    return max((one.layer_offload for stage in STAGES if (one := _stage(stage, parts, 0))), default=0)
