"""Planted faults: parity must fail, name the module, and not blame the ones behind it. The honest port must pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import conversions.flux1.model as model
from conversions.flux1.case import AUTOENCODER, DIFFUSERS, NATIVE
from parity.compare import DIFFERS, ROUNDING

Edit = Callable[[Any], object]


def final_swap(m: Any) -> None:
    for p in m.norm_out.linear.parameters():
        p.data = torch.cat(p.data.chunk(2)[::-1])


def rows(m: Any, block: str, name: str) -> list[Tensor]:
    """Weight and bias of one projection of a block's input, as views: the native model packs them into one layer."""
    held = m.get_submodule(block)
    packed = getattr(held, "to_qkv_mlp", None) or getattr(held.attn, "to_qkv", None)
    if packed is None:
        layer = held.get_submodule(name)
        return [layer.weight.data, layer.bias.data]
    place = ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"].index(name)
    return [torch.split(p.data, packed.sizes(len(p)))[place] for p in (packed.weight, packed.bias)]


def exchanged(m: Any, block: str, first: str, second: str) -> None:
    for a, b in zip(rows(m, block, first), rows(m, block, second), strict=True):
        kept = a.clone()
        a.copy_(b)
        b.copy_(kept)


def swapped_qk(m: Any) -> None:
    exchanged(m, "transformer_blocks.1", "attn.to_q", "attn.to_k")


def layer_norm_eps(m: Any) -> None:
    for norm in m.modules():
        if isinstance(norm, nn.LayerNorm):
            norm.eps = 1e-5


def erf_gelu(m: Any) -> None:
    for layer in m.modules():
        if getattr(layer, "approximate", None) == "tanh":
            layer.approximate = "none"


def qk_norm_eps(m: Any) -> None:
    m.single_transformer_blocks[1].attn.norm_k.eps = 1e-5


def no_q_bias(m: Any) -> None:
    rows(m, "transformer_blocks.1", "attn.to_q")[1].zero_()


def one_rounded_weight(m: Any) -> None:
    """One bit less than the stored bfloat16."""
    weight = rows(m, "single_transformer_blocks.2", "proj_mlp")[0]
    mantissa, exponent = torch.frexp(weight)
    weight.copy_(torch.ldexp((mantissa * 128).round() / 128, exponent))


def half_of_linear1_misordered(m: Any) -> None:
    exchanged(m, "single_transformer_blocks.0", "attn.to_k", "attn.to_v")


def single_gate_lost(m: Any) -> None:
    """The modulation's thirds in another order: shift, gate, scale."""
    for p in m.single_transformer_blocks[3].norm.linear.parameters():
        shift, scale, gate = p.data.chunk(3)
        p.data = torch.cat([shift, gate, scale])


def norm_left_at_init(m: Any) -> None:
    m.transformer_blocks[0].attn.norm_added_k.weight.data.fill_(1.0)


WEIGHTS = {
    final_swap: ("norm_out.linear", "final_layer.adaLN_modulation.1"),
    swapped_qk: ("transformer_blocks.1.attn.to_q, transformer_blocks.1.attn.to_k", "double_blocks.1.img_attn.qkv"),
    no_q_bias: ("transformer_blocks.1.attn.to_q", "double_blocks.1.img_attn.qkv"),
    one_rounded_weight: ("single_transformer_blocks.2.proj_mlp", "single_blocks.2.linear1"),
    half_of_linear1_misordered: (
        "single_transformer_blocks.0.attn.to_k, single_transformer_blocks.0.attn.to_v",
        "single_blocks.0.linear1",
    ),
    single_gate_lost: ("single_transformer_blocks.3.norm.linear", "single_blocks.3.modulation.lin"),
    norm_left_at_init: ("transformer_blocks.0.attn.norm_added_k", "double_blocks.0.txt_attn.norm.key_norm"),
}


PACKED = {  # where the native model has these weights
    swapped_qk: "transformer_blocks.1.attn.to_qkv",
    no_q_bias: "transformer_blocks.1.attn.to_qkv",
    one_rounded_weight: "single_transformer_blocks.2.to_qkv_mlp",
    half_of_linear1_misordered: "single_transformer_blocks.0.to_qkv_mlp",
}


@pytest.mark.parametrize("candidate", [NATIVE, DIFFUSERS], ids=lambda c: c.name)
def test_an_honest_port_passes(transformer: Any, candidate: Any) -> None:
    result = transformer.compare(candidate)
    assert result.passed and result.status == ROUNDING and result.guilty is None
    assert result.counts["compared"] > 140 and result.counts["skipped"] == result.counts["missing"] == 0
    assert result.headline.max_abs < 1e-5 and result.headline.max_abs64 < 1e-11
    assert sum(tap.reset is not None for tap in result.taps) > 100


@pytest.mark.parametrize("candidate", [NATIVE, DIFFUSERS], ids=lambda c: c.name)
@pytest.mark.parametrize("fault", WEIGHTS, ids=lambda f: f.__name__)
def test_wrong_weights_are_named_with_their_rule(transformer: Any, candidate: Any, fault: Edit) -> None:
    result = transformer.compare(candidate, fault)
    assert not result.passed and result.guilty is not None
    named, reference = WEIGHTS[fault]  # type: ignore[index]
    if candidate is NATIVE:
        named = PACKED.get(fault, named)  # type: ignore[call-overload]
    assert (result.guilty.candidate, result.guilty.reference) == (named, reference)
    assert result.guilty.rule and not result.guilty.code
    assert not result.guilty.others  # with their inputs reset, the blocks behind are innocent


CODE = {
    layer_norm_eps: "transformer_blocks.0.norm1",
    erf_gelu: "transformer_blocks.0.ff.net.0",
    qk_norm_eps: "single_transformer_blocks.1.attn.norm_k",
}


@pytest.mark.parametrize("candidate", [NATIVE, DIFFUSERS], ids=lambda c: c.name)
@pytest.mark.parametrize("fault", CODE, ids=lambda f: f.__name__)
def test_faults_far_under_the_gate_still_differ(transformer: Any, candidate: Any, fault: Edit) -> None:
    result = transformer.compare(candidate, fault)
    assert result.headline.status == DIFFERS and result.headline.scaled < 1e-3
    assert result.headline.cosine > 0.999  # what a similarity would have said
    assert result.guilty.candidate.startswith(CODE[fault])


def test_half_split_rope(transformer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def half_split(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
        cos, sin = (part[:, None, :] for part in table)
        a, b = x.float().chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)

    monkeypatch.setattr(model, "apply_rotary", half_split)
    result = transformer.compare(NATIVE)
    assert not result.passed and result.guilty.code
    assert result.guilty.candidate == "transformer_blocks.0.attn" and result.guilty.reference == "double_blocks.0"


def test_rope_axes_exchanged(transformer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    table = model.rotary_table
    monkeypatch.setattr(model, "rotary_table", lambda ids, widths, theta: table(ids[:, [0, 2, 1]], widths, theta))
    result = transformer.compare(NATIVE)
    assert not result.passed and "pe" in result.guilty.why


def test_guidance_ignored(transformer: Any) -> None:
    def always_one(m: Any) -> None:
        forward = m.forward
        m.forward = lambda guidance, **rest: forward(guidance=torch.ones_like(guidance), **rest)

    result = transformer.compare(NATIVE, always_one)
    assert not result.passed and result.guilty.candidate.startswith("time_text_embed")
    assert "guidance_in" in result.guilty.reference


def test_a_module_that_never_runs_is_not_a_pass(transformer: Any) -> None:
    def drop_guidance(m: Any) -> None:
        embed = m.time_text_embed

        def forward(timestep: Tensor, guidance: Tensor, pooled: Tensor) -> Tensor:
            time: Tensor = embed.timestep_embedder(model.sinusoid(timestep * 1000, model.FREQUENCIES))
            return time + embed.text_embedder(pooled)

        embed.forward = forward

    result = transformer.compare(NATIVE, drop_guidance)
    assert not result.passed and result.counts["skipped"] > 0
    assert result.unused == [f"time_text_embed.guidance_embedder.linear_{i}" for i in (1, 2)]
    assert "never ran" in result.guilty.why


def test_a_candidate_that_crashes_is_not_a_pass(transformer: Any) -> None:
    def narrow(m: Any) -> None:
        m.proj_out = nn.Linear(3, 3)

    result = transformer.compare(NATIVE, narrow)
    assert not result.passed and "did not run" in result.reason and not result.counts["compared"]


def test_two_faults_are_both_found(transformer: Any) -> None:
    def both(m: Any) -> None:
        swapped_qk(m)
        single_gate_lost(m)

    result = transformer.compare(NATIVE, both)
    assert result.guilty.within.startswith("transformer_blocks.1 ")
    assert result.guilty.others == ("single_transformer_blocks.3 ↔ single_blocks.3",)


def test_lost_precision_is_not_rounding(transformer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """RoPE's angles rounded to bfloat16: float64 does not forgive a bfloat16 step."""
    table = model.rotary_table
    monkeypatch.setattr(
        model, "rotary_table", lambda *given: tuple(t.to(torch.bfloat16).to(t.dtype) for t in table(*given))
    )
    result = transformer.compare(NATIVE)
    assert not result.passed and "pe" in result.guilty.why


def test_constant_parameters_are_reported(transformer: Any) -> None:
    def blank(m: Any) -> None:
        m.transformer_blocks[0].norm1.linear.bias.data.zero_()

    result = transformer.compare(NATIVE, blank)
    assert any("transformer_blocks.0.norm1.linear.bias" in text for text in result.warnings)


# --- the autoencoder -------------------------------------------------------------------------------------------------


def test_an_honest_autoencoder_passes(vae: Any) -> None:
    result = vae.compare(AUTOENCODER)
    assert result.passed and result.guilty is None and result.counts["skipped"] == result.counts["missing"] == 0
    assert [v.name for v in result.outputs] == ["encode", "decode"] and result.headline.max_abs64 < 1e-11
    assert {t.module for t in result.taps if t.reset} >= {"encoder.mid.attn_1", "decoder.up.2.block.0"}


@pytest.mark.parametrize("factor", ["scaling_factor", "shift_factor"])
def test_wrong_latent_normalisation(vae: Any, factor: str) -> None:
    result = vae.compare(AUTOENCODER, lambda m: m.register_to_config(**{factor: m.config[factor] * 1.01 + 1e-3}))
    assert not result.passed and "scaling_factor, shift_factor" in str(result.guilty)


def test_group_norm_eps(vae: Any) -> None:
    def eps(m: Any) -> None:
        for norm in m.modules():
            if isinstance(norm, nn.GroupNorm):
                norm.eps = 2e-6

    result = vae.compare(AUTOENCODER, eps)
    assert not result.passed and result.headline.scaled < 1e-3
    assert result.guilty.candidate == "encoder.down_blocks.0.resnets.0.norm1"


def test_up_blocks_in_the_wrong_order(vae: Any) -> None:
    def exchange(m: Any) -> None:
        first, second = (m.decoder.up_blocks[i].resnets[1] for i in (0, 1))
        state = first.state_dict()
        first.load_state_dict({k: v.clone() for k, v in second.state_dict().items()})
        second.load_state_dict(state)

    result = vae.compare(AUTOENCODER, exchange)
    assert not result.passed and result.guilty.candidate.startswith("decoder.up_blocks.0.resnets.1")
    assert result.guilty.reference.startswith("decoder.up.2.block.1")
