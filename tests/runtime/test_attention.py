"""Attention against the formula, and the selector."""

from __future__ import annotations

import pytest
import torch

from porter.core.errors import UsageError
from runtime.attention import BACKENDS, attention, attention_backend


def by_formula(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    scores = torch.einsum("bqne,bkne->bnqk", q, k) / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return torch.einsum("bnqk,bkne->bqne", scores.softmax(-1), v).flatten(2)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("backend", ["sdpa", "math"])
def test_equals_the_formula(backend: str, masked: bool) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 7, 3, 8) for _ in range(3))
    mask = (torch.arange(7) < 5)[None, None, None, :] if masked else None
    with attention_backend(backend, BACKENDS):
        assert (attention(q, k, v, mask) - by_formula(q, k, v, mask)).abs().max() < 1e-6


def test_the_chosen_kernel_is_the_one_that_runs() -> None:
    """On the CPU there is no cuDNN kernel: choosing it must fail rather than fall back without a word."""
    q = torch.randn(1, 4, 2, 8)
    with pytest.raises(UsageError, match="cudnn"), attention_backend("cudnn", BACKENDS):
        attention(q, q, q)


@pytest.mark.parametrize(("name", "supported"), [("warp", BACKENDS), ("flash", ("sdpa",))])
def test_an_unknown_or_unsupported_backend_is_refused_by_name(name: str, supported: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match=name), attention_backend(name, supported):
        pass
