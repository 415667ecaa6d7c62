"""Scaled dot-product attention behind one selector.

Models call `attention` and `cross_attention`; which kernel answers is chosen around the loop with `attention_backend`.

Rules for masks: None when a mask carries nothing (`useful`, once before the loop); bool (B, L) for padding; dense only
where a structure asks for it. A backend that takes no mask refuses one, by name.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from torch import Tensor

from porter.core.errors import UsageError
from runtime.backends import BACKENDS, HUB, Kernel, backend, sdpa
from runtime.parallel import sequence

ALL_BACKENDS = (*BACKENDS, "hub")
_kernel: Kernel = sdpa  # plain globals: torch.compile guards on them
_name, _masks = "sdpa", True


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, shared: int = 0) -> Tensor:
    """Self-attention, softmax at scale 1/sqrt(E): (B, L, N, E) three times -> (B, L, N * E).

    Args:
        mask: None when it carries nothing; bool (B, L), True for tokens that are no padding; bool (B, 1 or N, L, L)
            where only a structure can say which token sees which.
        shared: how many of the first tokens (the text) every rank of a sequence-parallel group has whole; all, where
            the text attends to itself. The others are this rank's part of the sequence, and see the other ranks'
            parts too. The mask then covers the text and this rank's part (`sequence.scatter`), or the whole sequence.
    """
    if (ranks := sequence.ranks()) is not None:
        if ranks.run.size("ring") > 1 and _kernel is not sdpa:
            raise UsageError(
                f"attention backend {_name!r} does not run in a ring: it does not return the log-sum-exp",
                expected="sdpa | flash | efficient | math", found=_name,
                hint="--attention sdpa, or share the tokens with --ulysses alone",
            )  # fmt: skip
        return sequence.attend(q, k, v, mask, shared, ranks, kernel)
    return kernel(q, k, v, mask)


def cross_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention to another sequence, which every rank has whole: (B, L, N, E), (B, M, N, E) twice -> (B, L, N * E).

    mask: None, bool (B, M), or bool (B, 1 or N, L, M).
    """
    return kernel(q, k, v, mask)


def kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention on this device alone, by the backend that is chosen: (B, L, N, E) … -> (B, L, N * E)."""
    if mask is not None:
        if not _masks:
            raise UsageError(
                f"attention backend {_name!r} takes no mask, and these prompts need one",
                expected="prompts of one length, or a backend with masks", found=f"a mask {tuple(mask.shape)}",
                hint="--batch-size 1, or --attention sdpa",
            )  # fmt: skip
        mask = mask[:, None, None, :] if mask.ndim == 2 else mask  # (B, 1, 1, M)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, N, L, E)
    return _kernel(q, k, v, mask).transpose(1, 2).flatten(2)


def useful(mask: Tensor | None) -> Tensor | None:
    """The mask, or None where every token counts. It reads the tensor: call it before the loop, not inside."""
    return None if mask is None or bool(mask.all()) else mask


@contextmanager
def attention_backend(name: str, supported: Collection[str]) -> Iterator[None]:
    """Run the body with one backend of `runtime.backends`.

    Args:
        supported: names that the model declares; `hub` stands for all of the hub's packages.

    Raises:
        UsageError: the name is unknown, the model does not declare it, its package is missing, or it does not run on
            this device, type and shape.
    """
    global _kernel, _name, _masks
    known = backend(name)
    if name not in supported and not (name.startswith(HUB) and "hub" in supported):
        raise UsageError(
            f"attention backend {name!r} is not supported by this model",
            expected=" | ".join(each for each in (*BACKENDS, "hub") if each in supported), found=name,
            hint="leave it at the default: sdpa",
        )  # fmt: skip
    before = _kernel, _name, _masks
    try:
        with known.around():
            _kernel, _name, _masks = known.kernel(), name, known.masks
            yield
    except (ImportError, AttributeError) as error:
        if _name == name:  # chosen already: the error is the model's
            raise
        raise UsageError(
            f"attention backend {name!r} is not installed", expected=known.needs or "a torch that has it",
            found=f"{type(error).__name__}: {error}"[:200], hint="leave it at the default: sdpa",
        ) from error  # fmt: skip
    except RuntimeError as error:
        if not any(words in str(error) for words in ("No viable backend", "No available kernel", "only support")):
            raise
        raise UsageError(
            f"attention backend {name!r} does not run this model on this device", expected=known.needs or None,
            found=str(error).splitlines()[0], hint="leave it at the default: sdpa",
        ) from error  # fmt: skip
    finally:
        _kernel, _name, _masks = before
