"""Shared layers against their formulas in float64."""

from __future__ import annotations

import math

import torch

from runtime.layers import AdaLayerNorm, apply_rotary, apply_rotary_halves, modulate, rotary_table, sinusoid


def test_sinusoid_is_cosines_then_sines() -> None:
    found = sinusoid(torch.tensor([0.0, 731.25]), 8)
    assert found.dtype == torch.float32
    assert found[0].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    angles = [731.25 * 10000 ** (-i / 4) for i in range(4)]
    expected = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
    assert torch.allclose(found[1].double(), torch.tensor(expected, dtype=torch.float64), atol=1e-4, rtol=0)


def test_a_sinusoids_scale_multiplies_the_angles_as_diffusers_does() -> None:
    """In bfloat16 the time is rounded before it is scaled, not after."""
    from diffusers.models.embeddings import Timesteps

    theirs = Timesteps(16, flip_sin_to_cos=True, downscale_freq_shift=0, scale=1000)
    for dtype in (torch.float32, torch.bfloat16):
        t = torch.tensor([0.0, 0.731, 1.0], dtype=dtype)
        assert torch.equal(sinusoid(t, 16, scale=1000), theirs(t))


def test_rotary_turns_interleaved_pairs_by_position_axis_after_axis() -> None:
    ids = torch.tensor([[0.0, 3.0], [2.0, 5.0]])
    cos, sin = rotary_table(ids, (2, 4), 10000.0)
    angles = torch.tensor([[0, 3, 3 / 100], [2, 5, 5 / 100]], dtype=torch.float64)
    assert torch.equal(cos, angles.cos().float())
    assert torch.equal(sin, angles.sin().float())
    x = torch.randn(1, 2, 1, 6, generator=torch.Generator().manual_seed(0))
    pairs = torch.view_as_complex(x.double().reshape(1, 2, 1, 3, 2))
    expected = torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)[:, None]).reshape(x.shape)
    assert (apply_rotary(x, (cos, sin)).double() - expected).abs().max() < 1e-6


def test_split_half_rotary_turns_the_halves_as_interleaved_pairs() -> None:
    x = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    table = rotary_table(torch.tensor([[0.0], [2.0], [5.0]]), (6,), 10000.0)
    pairs = x.unflatten(-1, (2, 3)).transpose(-1, -2).flatten(-2)  # (x[i], x[i + 3]) side by side
    expected = apply_rotary(pairs, table).unflatten(-1, (3, 2)).transpose(-1, -2).flatten(-2)
    assert torch.equal(apply_rotary_halves(x, table), expected)
    assert apply_rotary_halves(x.bfloat16(), table).dtype == torch.bfloat16


def test_rotary_keeps_the_input_type_and_far_positions_exact() -> None:
    """4095 radians in float32 arithmetic would already be wrong in the fourth digit."""
    cos, _ = rotary_table(torch.tensor([[4095.0]]), (64,), 10000.0)
    exact = [math.cos(4095 * 10000 ** (-i / 64)) for i in range(0, 64, 2)]
    assert torch.equal(cos[0], torch.tensor(exact, dtype=torch.float64).float())
    assert apply_rotary(torch.ones(1, 1, 1, 64, dtype=torch.bfloat16), (cos, cos)).dtype == torch.bfloat16


def test_ada_layer_norm_orders_shift_and_scale() -> None:
    torch.manual_seed(0)
    x, vec = torch.randn(2, 3, 4), torch.randn(2, 4)
    for scale_first in (False, True):
        norm = AdaLayerNorm(4, 3, scale_first=scale_first)
        out, gate = norm(x, vec)
        first, second, third = norm.linear(torch.nn.functional.silu(vec)).chunk(3, dim=1)
        shift, scale = (second, first) if scale_first else (first, second)
        centred = x - x.mean(-1, keepdim=True)
        normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        assert torch.allclose(out, normed * (1 + scale[:, None]) + shift[:, None], atol=1e-6)
        assert torch.equal(gate, third[:, None])
    assert torch.equal(modulate(x, torch.zeros(2, 1, 4), torch.zeros(2, 1, 4)), x)
