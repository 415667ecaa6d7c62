"""Where Z-Image's tokens stand: rotary tables and masks of a batch, made once before the loop.

B: images, T: caption tokens, filled to a multiple of 32, S: image tokens, filled likewise, E: head width,
P: rows of tables, 1 where all captions are filled to one length, else B.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from porter.core.errors import UsageError

MULTIPLE = 32  # captions and images are each filled up to a multiple of so many tokens
Table = tuple[Tensor, Tensor]  # cosines and sines, (P, tokens, E / 2) each


class Places(NamedTuple):
    """The same at every step."""

    text: Table  # (P, T, E / 2)
    image: Table  # (P, S, E / 2)
    source: Tensor  # (B, T): of each token the caption's, of the filling the last
    own: Tensor  # bool (B, T): tokens of the caption; the others are the learned filling
    seen: Tensor | None  # bool (B, T): what is no padding of the batch; None where there is none

    def to(self, device: torch.device) -> Places:
        """The same on a device."""
        text, image = ((cos.to(device), sin.to(device)) for cos, sin in (self.text, self.image))
        seen = None if self.seen is None else self.seen.to(device)
        return Places(text, image, self.source.to(device), self.own.to(device), seen)


@dataclass(frozen=True)
class Order:
    """The joint sequence: text first, or the image first as in the original."""

    text: int
    picture: int
    image_first: bool

    @property
    def shared(self) -> int:
        """How many of the first tokens all ranks have."""
        return 0 if self.image_first else self.text

    def join(self, txt: Tensor, img: Tensor) -> Tensor:
        """Along the tokens, axis 1."""
        return torch.cat((img, txt) if self.image_first else (txt, img), dim=1)

    def image(self, x: Tensor) -> Tensor:
        """The image's part of (B, L, …)."""
        return x[:, : self.picture] if self.image_first else x[:, self.text :]


def filled(count: int) -> int:
    """So many tokens once the learned filling stands behind them."""
    return -(-count // MULTIPLE) * MULTIPLE


# https://github.com/Tongyi-MAI/Z-Image/blob/c7ec13578cc27b01d547e1b3c62bc8b95bc6cb6e/src/zimage/transformer.py#L341
def places(
    lengths: Sequence[int], rows: int, columns: int, *, dims: Sequence[int], lens: Sequence[int], theta: float
) -> Places:
    """Tables and masks for captions of `lengths` tokens and images of `rows` x `columns` patches, on the CPU.

    A caption counts from 1, its filling with it; its image stands one behind that and counts rows and columns. The
    image's own filling stands at the origin.

    Raises:
        UsageError: a caption is longer, or an image larger, than the model has positions (`lens`) for.
    """
    whole = [filled(length) for length in lengths]
    longest = max(whole)
    if any(size > limit for size, limit in zip((longest + 2, rows, columns), lens, strict=True)):
        raise UsageError(
            "the model has no positions for a prompt or a picture of this size",
            expected=f"at most {(lens[0] - 2) // MULTIPLE * MULTIPLE} tokens and {lens[1]} x {lens[2]} patches",
            found=f"{max(lengths)} tokens and {rows} x {columns} patches",
            hint="a shorter prompt, or smaller --height and --width",
        )
    count = torch.arange(longest)
    own, seen = (count < torch.tensor(ends)[:, None] for ends in (lengths, whole))  # (B, T)
    source = torch.minimum(count, torch.tensor(lengths)[:, None] - 1).clamp(min=0)  # (B, T)
    even = bool(seen.all())
    tables = whole[:1] if even else whole  # (P,)
    text = F.pad(count[:, None] + 1, (0, 2)).expand(len(tables), -1, -1)  # (P, T, 3)
    grid = torch.cartesian_prod(torch.zeros(1).long(), torch.arange(rows), torch.arange(columns))
    grid = grid + F.pad(torch.tensor(tables)[:, None] + 1, (0, 2))[:, None]  # (P, rows * columns, 3)
    image = F.pad(grid, (0, 0, 0, filled(grid.shape[1]) - grid.shape[1]))  # (P, S, 3)
    return Places(_table(text, dims, theta), _table(image, dims, theta), source, own, None if even else seen)


# https://github.com/Tongyi-MAI/Z-Image/blob/c7ec13578cc27b01d547e1b3c62bc8b95bc6cb6e/src/zimage/transformer.py#L200
def _table(ids: Tensor, dims: Sequence[int], theta: float) -> Table:
    """(P, tokens, 3) -> (P, tokens, E / 2) twice.

    Angles in float64, rounded to float32 before they are turned into cosines: the original's numbers, on every device.
    They are constants that it makes once, and stay float32 where all around is computed in float64: hence numpy.
    """
    angles = []
    for axis, width in enumerate(dims):
        exponent = torch.arange(0, width, 2, dtype=torch.float64) / width  # (width / 2,)
        angles.append(ids[..., axis, None].double() * (1.0 / theta**exponent))
    angle = torch.from_numpy(torch.cat(angles, dim=-1).numpy().astype(np.float32))  # (P, tokens, E / 2)
    turned = torch.polar(torch.ones_like(angle), angle)
    return turned.real.contiguous(), turned.imag.contiguous()
