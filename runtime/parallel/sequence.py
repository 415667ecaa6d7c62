"""Sequence parallelism: each rank holds a part of the tokens, and attention sees all of them.

A model calls `scatter` on what runs along the tokens once they are embedded, and `gather` before they leave; without a
group both hand back what they get.
"""

from __future__ import annotations

from torch import Tensor


def ranks() -> None:
    """The group of this run, or None."""
    return


def scatter(x: Tensor, dim: int = 1) -> Tensor:
    """This rank's part of the tokens along `dim`, padded so that all ranks hold equally many."""
    return x


def gather(x: Tensor, dim: int = 1) -> Tensor:
    """All ranks' tokens along `dim`, without the padding."""
    return x


def attend(*args: object) -> Tensor:
    raise NotImplementedError
