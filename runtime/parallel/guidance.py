"""CFG parallelism: the passes of a guided step run side by side, and every rank gets all predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from runtime.parallel import mesh, sequence


def predict(model: nn.Module, passes: Sequence[Mapping[str, Any]]) -> list[Tensor]:
    """`model`'s prediction for each set of keyword arguments, all of one shape.

    In a job of several processes each half of the CFG group runs one of the passes (or both run the only one), and
    sequence parallelism holds within it.
    """
    run = mesh.current()
    if run is None:
        return [model(**given) for given in passes]
    size, index = run.size("cfg"), run.index("cfg")
    alone = size == 1 or len(passes) == 1
    predictions = []
    for given in passes if alone else passes[index::size]:
        with sequence.sharing(run):
            predictions.append(model(**given))
    if alone:
        return predictions
    if len(passes) % size:
        raise ValueError(f"{len(passes)} passes a step cannot run side by side in {size} groups")
    found: list[Tensor] = []
    for mine in predictions:
        found += run.all(mine, "cfg")
    return found
