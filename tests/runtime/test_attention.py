"""Attention against the formula, by every kernel that runs here, and the selector."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch

from porter.core.errors import UsageError
from runtime.attention import ALL_BACKENDS, attention, attention_backend, cross_attention, useful
from runtime.backends import BACKENDS

HERE = ["sdpa", "math", "flash", "flex"]  # of torch's kernels, those that a CPU has


def by_formula(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    scores = torch.einsum("bqne,bkne->bnqk", q, k) / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return torch.einsum("bnqk,bkne->bqne", scores.softmax(-1), v).flatten(2)


def heads(seed: int, tokens: int = 7) -> torch.Tensor:
    return torch.randn(2, tokens, 3, 16, generator=torch.Generator().manual_seed(seed))


PADDING = torch.tensor([[True] * 5 + [False] * 2, [True] * 7])
STRUCTURE = torch.ones(7, 7, dtype=torch.bool).tril()[None, None]


@pytest.mark.parametrize("name", HERE)
def test_equals_the_formula(name: str) -> None:
    q, k, v = heads(0), heads(1), heads(2)
    with attention_backend(name, ALL_BACKENDS):
        assert (attention(q, k, v) - by_formula(q, k, v, None)).abs().max() < 1e-6
        k, v = heads(3, 4), heads(4, 4)
        assert (cross_attention(q, k, v) - by_formula(q, k, v, None)).abs().max() < 1e-6


@pytest.mark.parametrize(
    "mask", [PADDING, STRUCTURE, STRUCTURE.expand(2, 3, 7, 7)], ids=["padding", "structure", "each"]
)
@pytest.mark.parametrize("name", [name for name in HERE if BACKENDS[name].masks])
def test_masks_equal_the_formula(name: str, mask: torch.Tensor) -> None:
    q, k, v = heads(0), heads(1), heads(2)
    dense = mask[:, None, None, :] if mask.ndim == 2 else mask
    with attention_backend(name, ALL_BACKENDS):
        assert (attention(q, k, v, mask) - by_formula(q, k, v, dense)).abs().max() < 1e-6
    assert (attention(q, k, v, mask) - attention(q, k, v)).abs().max() > 1e-3  # the mask does something


def test_a_backend_without_masks_refuses_one() -> None:
    with pytest.raises(UsageError, match=r"flash.*takes no mask") as caught, attention_backend("flash", ALL_BACKENDS):
        attention(heads(0), heads(1), heads(2), PADDING)
    assert "sdpa" in str(caught.value.hint)


def test_a_mask_that_carries_nothing_is_none() -> None:
    assert useful(None) is None
    assert useful(torch.ones(2, 5, dtype=torch.bool)) is None
    assert useful(PADDING) is PADDING


def test_the_chosen_kernel_is_the_one_that_runs() -> None:
    """On the CPU there is no cuDNN kernel: choosing it must fail rather than fall back without a word."""
    with pytest.raises(UsageError, match="cudnn"), attention_backend("cudnn", ALL_BACKENDS):
        attention(heads(0), heads(1), heads(2))


@pytest.mark.parametrize("name", ["flash_attn", "hub:kernels-community/flash-attn3"])
def test_a_missing_package_is_named(name: str) -> None:
    with pytest.raises(UsageError, match="not installed") as caught, attention_backend(name, ALL_BACKENDS):
        pass
    assert "pip install" in str(caught.value.expected)


def test_a_package_gets_tokens_before_heads_and_its_answer_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package stands in for one that needs a GPU; its layout is (B, L, N, E)."""
    shapes: list[Any] = []

    def flash_attn_func(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(q.shape))
        return torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    package = types.ModuleType("flash_attn")
    package.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    q, k, v = heads(0), heads(1), heads(2)
    with attention_backend("flash_attn", ALL_BACKENDS):
        assert (attention(q, k, v) - by_formula(q, k, v, None)).abs().max() < 1e-6
    assert shapes == [(2, 7, 3, 16)]


@pytest.mark.parametrize(
    ("name", "supported", "says"),
    [("warp", ALL_BACKENDS, "unknown"), ("hub:", ALL_BACKENDS, "unknown"), ("hub:../x", ALL_BACKENDS, "unknown"),
     ("flash", ("sdpa",), "not supported"), ("hub:a/b", ("sdpa",), "not supported")],
)  # fmt: skip
def test_an_unknown_or_unsupported_backend_is_refused_by_name(name: str, supported: tuple[str, ...], says: str) -> None:
    with pytest.raises(UsageError, match=says) as caught, attention_backend(name, supported):
        pass
    assert "sdpa" in str(caught.value.expected)


def test_the_choice_ends_with_its_block() -> None:
    with attention_backend("math", ALL_BACKENDS):
        pass
    with pytest.raises(UsageError), attention_backend("cudnn", ALL_BACKENDS):
        attention(heads(0), heads(1), heads(2))
    assert attention(heads(0), heads(1), heads(2), PADDING).isfinite().all()
