"""The CPU stand-in of transformer_engine, against the same arithmetic written another way."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from parity import shims, shims_kernels


@pytest.fixture
def engine() -> Iterator[Any]:
    finders = list(sys.meta_path)
    assert "transformer_engine" in shims.install(["transformer_engine"])
    yield importlib.import_module("transformer_engine")
    sys.meta_path[:] = finders
    shims_kernels.CALLED.clear()
    for path in [p for p in sys.modules if p.partition(".")[0] == "transformer_engine"]:
        del sys.modules[path]


@pytest.mark.parametrize("zero_centered", [False, True])
def test_norms_count_their_weight_from_where_they_say(engine: Any, zero_centered: bool) -> None:
    x, weight = torch.randn(3, 5, 8).double(), torch.randn(8).double()
    shown = weight + 1 if zero_centered else weight
    rms = engine.pytorch.RMSNorm(8, eps=1e-3, zero_centered_gamma=zero_centered).double()
    layer = engine.pytorch.LayerNorm(8, eps=1e-3, zero_centered_gamma=zero_centered).double()
    assert torch.equal(rms(x), F.rms_norm(x, (8,), None, 1e-3))  # as it starts
    rms.weight.data, layer.weight.data = weight, weight
    assert torch.allclose(rms(x), F.rms_norm(x, (8,), shown, 1e-3), atol=1e-14)
    assert torch.allclose(layer(x), F.layer_norm(x, (8,), shown, torch.zeros(8).double(), 1e-3), atol=1e-14)
    assert rms(x.bfloat16()).dtype == torch.bfloat16
    assert "transformer_engine.pytorch.RMSNorm" in shims.used()


@pytest.mark.parametrize("kind", ["sbhd", "bshd"])
@pytest.mark.parametrize("mask", ["no_mask", "causal"])
def test_attention(engine: Any, kind: str, mask: str) -> None:
    attention = importlib.import_module("transformer_engine.pytorch.attention").DotProductAttention
    q, k, v = (torch.randn(2, 6, heads, 4).double() for heads in (4, 2, 2))  # (B, S, H, D)
    given = [t.transpose(0, 1) if kind == "sbhd" else t for t in (q, k, v)]
    op = attention(4, 4, num_gqa_groups=2, attention_dropout=0, qkv_format=kind, attn_mask_type=mask)
    out = op(*given, core_attention_bias_type="no_bias", core_attention_bias=None)
    heads = [t.transpose(1, 2) for t in (q, k.repeat_interleave(2, 2), v.repeat_interleave(2, 2))]
    expected = F.scaled_dot_product_attention(*heads, is_causal=mask == "causal").transpose(1, 2).flatten(2)
    assert torch.allclose(out.transpose(0, 1) if kind == "sbhd" else out, expected, atol=1e-14)
    for refused in ({"attention_mask": torch.ones(1)}, {"attn_mask_type": "padding"}, {"window_size": (2, 2)}):
        with pytest.raises(NotImplementedError):
            op(*given, **refused)


@pytest.mark.parametrize("kind", ["sbhd", "bshd"])
def test_rotary_positions_turn_halves_and_leave_the_rest(engine: Any, kind: str) -> None:
    rope = importlib.import_module("transformer_engine.pytorch.attention").apply_rotary_pos_emb
    x, angles = torch.randn(2, 5, 3, 8).double(), torch.randn(7, 2).double()
    given = x.transpose(0, 1) if kind == "sbhd" else x
    made = rope(given, torch.cat((angles, angles), -1)[:, None, None], tensor_format=kind, fused=True)
    turned = torch.view_as_complex(torch.stack((x[..., :2], x[..., 2:4]), -1))
    turned = turned * torch.polar(torch.ones(5, 1, 2).double(), angles[:5, None])
    expected = torch.cat((turned.real, turned.imag, x[..., 4:]), -1)
    assert torch.allclose(made.transpose(0, 1) if kind == "sbhd" else made, expected, atol=1e-14)
    with pytest.raises(ValueError, match="do not fit"):
        rope(given, angles[:3, None, None], tensor_format=kind)
