"""Sequence parallelism: each rank holds a part of the tokens, and attention sees all of them.

A model calls `scatter` on what runs along the tokens once they are embedded, and `gather` before they leave; without a
group both hand back what they get. Attention is Ulysses (each rank trades its part of the tokens, with all heads, for
more tokens with a part of the heads) times ring (`runtime.parallel.ring`): rank = ring index * ulysses size + ulysses
index, in the order of the tokens.

B: batch, T: tokens that every rank has whole, S: the shared sequence, s: a rank's part of it, L = T + s, N: heads,
n: heads of a Ulysses rank, E: head width, U, R: Ulysses and ring ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from porter.core.errors import UsageError
from runtime.parallel import ring
from runtime.parallel.mesh import Run

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


@dataclass
class Ranks:
    """The group that shares the tokens of one forward pass, and what it has shared so far.

    Parts are padded at the end to equal lengths. A part's length says which sequence it is of: sequences of different
    lengths whose parts would be equally long get parts of different lengths.
    """

    run: Run
    parts: dict[int, int] = field(default_factory=dict)  # S -> s
    wholes: dict[int, int] = field(default_factory=dict)  # s -> S
    masks: dict[tuple[int, int], tuple[Tensor, list[Tensor | None]]] = field(default_factory=dict)

    @property
    def count(self) -> int:
        return self.run.size("ring") * self.run.size("ulysses")

    @property
    def index(self) -> int:
        return self.run.index("ring") * self.run.size("ulysses") + self.run.index("ulysses")

    def part(self, whole: int) -> int:
        """Length of each rank's part of a sequence of length `whole`."""
        if whole not in self.parts:
            length = -(-whole // self.count)
            while length in self.wholes:
                length += 1
            self.parts[whole], self.wholes[length] = length, whole
        return self.parts[whole]

    def whole(self, part: int) -> int:
        """Length of the sequence that parts of this length are of.

        Raises:
            ValueError: the model has not shared such a sequence.
        """
        if part not in self.wholes:
            raise ValueError(
                f"{part} tokens are no rank's part of a sequence: call sequence.scatter on them, or name tokens that "
                f"every rank has whole with shared=; parts here: {self.wholes}"
            )
        return self.wholes[part]

    def all(self, x: Tensor) -> Tensor:
        """Every rank's `x`, in order: (…) -> (R * U, …)."""
        for dim in ("ulysses", "ring"):
            x = torch.stack(self.run.all(x, dim))
        return x.flatten(0, 1)


_active: Ranks | None = None


@contextmanager
def sharing(run: Run | None) -> Iterator[None]:
    """One forward pass of a model whose tokens the ranks of `run` share.

    Raises:
        UsageError: the model shared none: every rank did all of the work.
    """
    global _active
    if run is None or run.size("ring") * run.size("ulysses") == 1:
        yield
        return
    before, _active = _active, Ranks(run)
    try:
        yield
        if not _active.parts:
            raise UsageError(
                "this model does not share its tokens among ranks", expected="a native transformer",
                found=str(run.settings), hint="leave out --ulysses and --ring",
            )  # fmt: skip
    finally:
        _active = before


def ranks() -> Ranks | None:
    """The group of this forward pass, or None."""
    return _active


def scatter(x: Tensor, dim: int = 1) -> Tensor:
    """This rank's part of the tokens along `dim`, padded with zeros so that all ranks hold equally many."""
    if _active is None:
        return x
    dim %= x.ndim
    whole = x.shape[dim]
    part = _active.part(whole)
    begin = min(_active.index * part, whole)
    end = min(begin + part, whole)
    return F.pad(x.narrow(dim, begin, end - begin), (0, 0) * (x.ndim - 1 - dim) + (0, part - (end - begin)))


def gather(x: Tensor, dim: int = 1) -> Tensor:
    """All ranks' tokens along `dim`, without the padding."""
    if _active is None:
        return x
    dim %= x.ndim
    whole = _active.whole(x.shape[dim])
    return _active.all(x).movedim(0, dim).flatten(dim, dim + 1).narrow(dim, 0, whole)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, shared: int, here: Ranks, kernel: Kernel) -> Tensor:
    """Self-attention of the whole sequence, of which q, k and v are this rank's part: (B, L, N, E) -> (B, L, N * E).

    Args:
        mask: None or bool (B, T + s) or (B, T + S), True for tokens that are no padding.
        shared: T. Each rank answers these queries for its heads; their keys count once.
        kernel: attention on this device alone, as `runtime.attention.kernel`.

    Raises:
        UsageError: the heads cannot be shared, or the mask says more than which tokens are padding.
    """
    part = q.shape[1] - shared
    if not part:
        return kernel(q, k, v, mask)
    whole, ulysses, rings = here.whole(part), here.run.size("ulysses"), here.run.size("ring")
    heads = q.shape[2]
    if heads % ulysses:
        raise UsageError(
            f"{heads} attention heads cannot be shared by {ulysses} ulysses ranks",
            expected=f"a multiple of {ulysses}, after --tp", found=f"{heads}", hint="share the tokens with --ring",
        )  # fmt: skip
    mine = slice(here.run.index("ulysses") * (heads // ulysses), (here.run.index("ulysses") + 1) * (heads // ulysses))
    text_q, text_k, text_v = (x[:, :shared, mine] for x in (q, k, v))  # (B, T, n, E)
    q, k, v = _to_heads(here, *(x[:, shared:] for x in (q, k, v)))  # (B, U * s, n, E)
    masks = _key_masks(here, mask, shared, part)
    q = torch.cat((text_q, q), dim=1)
    if rings == 1:
        k, v = torch.cat((text_k, k[:, :whole]), dim=1), torch.cat((text_v, v[:, :whole]), dim=1)
        x = kernel(q, k, v, masks[0]).unflatten(-1, (heads // ulysses, -1))  # (B, T + U * s, n, E)
    else:
        real = [min(max(whole - block * part * ulysses, 0), part * ulysses) for block in range(rings)]
        group, index = here.run.group("ring"), here.run.index("ring")
        x = ring.attend(q, (text_k, text_v), (k, v), masks, real, group, index)
    return _to_tokens(here, x, shared)


def _to_heads(here: Ranks, *tensors: Tensor) -> tuple[Tensor, ...]:
    """All heads of this rank's tokens -> all the Ulysses group's tokens of this rank's heads, in one exchange.

    (B, s, N, E) -> (B, U * s, n, E), for each tensor.
    """
    size = here.run.size("ulysses")
    if size == 1:
        return tensors
    sent = torch.stack([x.unflatten(2, (size, -1)) for x in tensors])  # (3, B, s, U, n, E)
    sent = sent.permute(3, 0, 1, 2, 4, 5).contiguous()  # (U, 3, B, s, n, E)
    got = torch.empty_like(sent)
    dist.all_to_all_single(got, sent, group=here.run.group("ulysses"))
    return got.permute(1, 2, 0, 3, 4, 5).flatten(2, 3).unbind(0)


def _to_tokens(here: Ranks, x: Tensor, shared: int) -> Tensor:
    """The way back, the text's heads with it: (B, T + U * s, n, E) -> (B, T + s, N * E)."""
    size = here.run.size("ulysses")
    if size == 1:
        return x.flatten(2)
    parts = x[:, shared:].unflatten(1, (size, -1))  # (B, U, s, n, E)
    text = x[:, None, :shared].expand(-1, size, -1, -1, -1)  # (B, U, T, n, E)
    sent = torch.cat((text, parts), dim=2).transpose(0, 1).contiguous()  # (U, B, T + s, n, E)
    got = torch.empty_like(sent)
    dist.all_to_all_single(got, sent, group=here.run.group("ulysses"))
    return got.permute(1, 2, 0, 3, 4).flatten(2)


def _key_masks(here: Ranks, mask: Tensor | None, shared: int, part: int) -> list[Tensor | None]:
    """For each ring rank's block of keys its mask, (B, keys) or None: this rank's own block with the text's before it.

    The same mask comes in every layer: it is looked at once in a forward pass.
    """
    count, index = here.run.size("ring"), here.run.index("ring")
    if mask is None:
        return [None] * count
    whole = here.whole(part)
    if mask.ndim != 2 or mask.shape[1] not in (shared + part, shared + whole):
        raise UsageError(
            "this attention mask cannot be shared among ranks", expected=f"(B, {shared + whole}), True for real tokens",
            found=f"{tuple(mask.shape)}", hint="leave out --ulysses and --ring",
        )  # fmt: skip
    known = here.masks.get((id(mask), shared))
    if known is None:
        tokens = mask[:, shared:]  # (B, s) or (B, S)
        if mask.shape[1] == shared + part:
            tokens = here.all(tokens).transpose(0, 1).flatten(1)[:, :whole]
        blocks = list(tokens.split(part * here.run.size("ulysses"), dim=1))
        blocks += [tokens[:, :0]] * (count - len(blocks))  # of ranks that hold padding alone
        blocks[index] = torch.cat((mask[:, :shared], blocks[index]), dim=1)
        # The mask is kept, so that its id stays its own.
        known = here.masks[id(mask), shared] = (mask, [None if bool(block.all()) else block for block in blocks])
    return known[1]
