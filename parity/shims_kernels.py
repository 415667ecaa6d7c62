"""What GPU-only kernels compute, in plain torch: attention, normalisation, rotary positions.

Stand-alone (torch and the standard library only). float32 is computed in float32 and float64 in float64; half precision
in float32, rounded once at the end, as the kernels accumulate.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

CALLED: set[str] = set()


def stands_for(*names: str) -> Callable[[Any], Any]:
    """Note `names` (the real functions' paths, the first one is enough) when the decorated function is called."""

    def decorate(function: Any) -> Any:
        @functools.wraps(function)
        def noted(*args: Any, **kwargs: Any) -> Any:
            CALLED.add(names[0])
            return function(*args, **kwargs)

        return noted

    return decorate


def refuse(name: str, **given: Any) -> None:
    """Raise NotImplementedError for the first option that is set: a stand-in never ignores what changes a result."""
    for option, value in given.items():
        if isinstance(value, Tensor) or value not in (None, False, 0):
            shown = f"a tensor of {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise NotImplementedError(f"{name} on the CPU (parity/shims.py) has no {option}={shown}")


def refusing(name: str) -> Callable[..., Any]:
    """A function that can be imported, and says on its call that there is no stand-in for it."""

    def absent(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"there is no stand-in for {name} on the CPU (parity/shims.py)")

    return absent


def working(dtype: torch.dtype) -> torch.dtype:
    """What kernels accumulate in."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def visible(queries: int, keys: int, window: Sequence[int | None], causal: bool, like: Tensor) -> Tensor | None:
    """Which keys a query sees, aligned to the bottom right: (queries, keys) booleans; None where it sees all.

    Args:
        window: keys to the left and to the right of a query's own place; -1 or None for all.
    """
    left, right = (-1 if side is None else side for side in window)
    right = 0 if causal else right
    if left < 0 and right < 0:
        return None
    place = torch.arange(queries, device=like.device)[:, None] + (keys - queries)
    column = torch.arange(keys, device=like.device)[None]
    seen = torch.ones(queries, keys, dtype=torch.bool, device=like.device)
    seen = seen & (column <= place + right) if right >= 0 else seen
    return seen & (column >= place - left) if left >= 0 else seen


def attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, *, seen: Tensor | None = None,
    bias: Callable[[int], Tensor] | None = None, softcap: float = 0.0,
) -> Tensor:  # fmt: skip
    """Attention, one head after the other.

    Args:
        q: (B, queries, H, D).
        k, v: (B, keys, H / n, D) and (B, keys, H / n, Dv): n heads of `q` in a row share one.
        scale: 1 / sqrt(D) for None.
        seen: (queries, keys) booleans; a query that sees nothing answers zeros.
        bias: head -> what is added to its scores, (B or 1, queries, keys).

    Returns:
        (B, queries, H, Dv) in the dtype of `q`.

    Raises:
        TypeError, ValueError: dtypes or shapes that no kernel takes.
    """
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"query, key and value have dtypes {q.dtype}, {k.dtype}, {v.dtype}; attention takes one")
    heads, shared = q.shape[2], k.shape[2]
    if heads % shared or v.shape[2] != shared or k.shape[:2] != v.shape[:2] or q.shape[0] != k.shape[0]:
        raise ValueError(f"query {tuple(q.shape)}, key {tuple(k.shape)} and value {tuple(v.shape)} do not fit")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    compute = working(q.dtype)
    out = q.new_zeros(*q.shape[:3], v.shape[-1])
    for head in range(heads):
        own = head // (heads // shared)
        a, b, c = (t.to(compute) for t in (q[:, :, head], k[:, :, own], v[:, :, own]))
        scores = torch.matmul(a, b.transpose(1, 2)) * scale
        scores = torch.tanh(scores / softcap) * softcap if softcap else scores
        scores = scores if bias is None else scores + bias(head).to(compute)
        weights = torch.softmax(scores if seen is None else scores.masked_fill(~seen, float("-inf")), -1)
        if seen is not None:
            weights = torch.where(seen.any(-1)[:, None], weights, torch.zeros_like(weights))
        out[:, :, head] = torch.matmul(weights, c).to(q.dtype)
    return out


def rms_normed(x: Tensor, weight: Tensor | None, eps: float, axes: int = 1, bias: Tensor | None = None) -> Tensor:
    """x / sqrt(mean(x²) + eps) * weight + bias over the last `axes` axes, in the kernel's accumulation dtype."""
    value = x.to(working(x.dtype))
    value = value * torch.rsqrt(value.square().mean(tuple(range(-axes, 0)), keepdim=True) + eps)
    value = value if weight is None else value * weight.to(value.dtype)
    return value if bias is None else value + bias.to(value.dtype)


def layer_normed(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, axes: int = 1) -> Tensor:
    """Layer norm over the last `axes` axes, in the kernel's accumulation dtype."""
    value = x.to(working(x.dtype))
    weight, bias = (None if t is None else t.to(value.dtype) for t in (weight, bias))
    return torch.nn.functional.layer_norm(value, tuple(x.shape[-axes:]), weight, bias, eps)


def rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, offset: int = 0) -> Tensor:
    """Rotary positions on the first 2 * R channels of x (..., S, H, D); cos, sin: (at least offset + S, R)."""
    length, half = x.shape[-3], cos.shape[-1]
    if cos.shape[0] < offset + length or 2 * half > x.shape[-1]:
        raise ValueError(f"tables {tuple(cos.shape)} are too small or too wide for {tuple(x.shape)} at {offset}")
    compute = working(x.dtype)
    c, s = (t[offset : offset + length, None].to(compute) for t in (cos, sin))
    turned, rest = x[..., : 2 * half].to(compute), x[..., 2 * half :]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        made = torch.stack((a * c - b * s, a * s + b * c), -1).flatten(-2)
    else:
        a, b = turned[..., :half], turned[..., half:]
        made = torch.cat((a * c - b * s, a * s + b * c), -1)
    return torch.cat((made.to(x.dtype), rest), -1)
