"""CFG parallelism: the passes of a guided step run side by side, and every rank gets all predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from porter.core.errors import UsageError
from runtime.parallel import mesh, sequence


def predict(model: nn.Module, passes: Sequence[Mapping[str, Any]]) -> list[Tensor]:
    """`model`'s prediction for each set of keyword arguments, all of one shape.

    In a job of several processes each half of the CFG group runs one of the passes (or both run the only one), and
    sequence parallelism holds within it.

    Raises:
        UsageError: another number of passes than the groups can share, or a model that does not share its tokens.
    """
    run = mesh.current()
    if run is None:
        return [model(**given) for given in passes]
    size, index = run.size("cfg"), run.index("cfg")
    alone = size == 1 or len(passes) == 1
    if not alone and len(passes) % size:
        raise UsageError(
            f"{len(passes)} passes a step cannot run side by side in {size} groups", expected="the prompt's pass and "
            "the negative prompt's", found=f"{len(passes)} passes", hint="leave out --cfg-parallel",
        )  # fmt: skip
    predictions = []
    for given in passes if alone else passes[index::size]:
        with sequence.sharing(run):
            predictions.append(model(**given))
    if alone:
        return predictions
    found: list[Tensor] = []
    for mine in predictions:
        found += run.all(mine, "cfg")
    return found
