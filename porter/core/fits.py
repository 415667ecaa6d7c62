"""Whether a pipeline fits a device, in which of the ways to run it, and the figures that say so."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from porter.core.units import human_bytes

if TYPE_CHECKING:
    from porter.core.memory import PartMemory, StageMemory

Fits = Literal["yes", "with component offload", "with layer offload", "no", "unknown"]


def verdict(
    parts: Sequence[PartMemory],
    stages: Sequence[StageMemory],
    device_memory: int | None,
    guessed: Sequence[str],
    absent: Sequence[str],
    reserve: int,
    least: Callable[[Sequence[PartMemory]], int],
) -> tuple[Fits, str]:
    """The first way that fits, and a line with its figures and those of the ways that do not.

    Args:
        reserve: bytes of the device that stay free.
        least: bytes that some components need at the least, whichever way they run.
    """
    if device_memory is None:
        return "unknown", "no device memory was given"
    room = device_memory - reserve
    said, found = [], "no"
    for way, peak in _ways(stages):
        stage = max(stages, key=peak)
        need = peak(stage)
        name = "all on the device" if way == "yes" else way
        too_much = "" if need <= room else ", too much"
        said.append(f"{name}: {stage.stage} needs {human_bytes(need)}{too_much}")
        if need <= room:
            found = way
            break
    text = f"{'; '.join(said)}; of {human_bytes(device_memory)}, less {human_bytes(reserve)} for the device's own"
    if found == "no" and stage.stage == "decoding":
        text += "; an autoencoder in tiles needs less, which is not estimated"
    out = [part for part in parts if part.activations is None]
    if out:
        text += f"; leaves out the activations of {', '.join(part.name for part in out)}"
    if absent:
        text += f"; leaves out {', '.join(absent)}, whose weights are not here"
    if found != "no" and (absent or any(part.stage in ("denoising", "decoding") for part in out)):
        found = "unknown"  # what is left out there may be more than all the rest
    if blind := [part.name for part in parts if part.missing == "config" and part.blocks == 1 and part.weights > room]:
        text += f"; the blocks of {', '.join(blind)} are not known, so layer offload may need less"
    if guessed:
        text += f"; {' and '.join(guessed)}: only guessed, say {' '.join(f'--{name} N' for name in guessed)}"
    floor = least([replace(part, activations=0) for part in parts if part.name not in blind])
    if (guessed or blind) and (found != "no" or floor <= room):
        found = "unknown"  # only what no size changes can be refused
    return found, text  # type: ignore[return-value]


def _ways(stages: Sequence[StageMemory]) -> Iterator[tuple[Fits, Callable[[StageMemory], int]]]:
    yield "yes", lambda stage: stage.resident
    yield "with component offload", lambda stage: stage.component_offload
    yield "with layer offload", lambda stage: stage.layer_offload
