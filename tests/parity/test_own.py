"""Cases of one's own: two implementations written apart, aligned by where the conversion puts each weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from parity.case import Side
from parity.compare import DIFFERS, OVER, ROUNDING, SKIPPED
from parity.outcome import reason_of
from parity.own import assert_parity, compare_case
from porter.core.errors import BadInputError
from tests.parity.pair import Original, Port, answer, case, convert

FaultOf = Callable[[Any], object]


def test_a_correct_port_passes_and_everything_was_compared() -> None:
    result = compare_case(case)
    assert result.status == ROUNDING, reason_of(result)
    assert result.counts["skipped"] == result.counts["missing"] == 0 and not result.faults
    modules = {tap.module for tap in result.taps}
    assert {"blocks.0.attn.qkv", "blocks.2.mlp.2", "embed", "norm"} <= modules
    assert all(tap.reset is not None and tap.reset.passed for tap in result.taps)  # each leaf stood alone


def erf(m: Any) -> None:
    m.layers[1].act = nn.GELU()


def eps(m: Any) -> None:
    m.layers[2].norm_b.eps = 1e-5


def q_norm_eps(m: Any) -> None:
    m.layers[0].attention.norm_q.eps = 1e-5


def heads(m: Any) -> None:
    m.layers[1].attention.scale *= 1.001


def swapped(m: Any) -> None:
    for p in m.layers[2].scale_shift.parameters():
        p.data = torch.cat(p.data.chunk(2)[::-1])


def one_weight(m: Any) -> None:
    m.layers[1].attention.to_v.weight.data[3, 4] *= 1 + 2**-7


def lost_bias(m: Any) -> None:
    m.layers[0].down.bias.data.zero_()


def groups(m: Any) -> None:
    m.final_norm.num_groups = 2


def transposed(m: Any) -> None:
    w = m.layers[0].attention.to_out.weight
    w.data = w.data.t().contiguous()


FAULTS: dict[FaultOf, tuple[str, str, bool]] = {
    erf: ("layers.1.down", "blocks.1.mlp.2", True),
    eps: ("layers.2.norm_b", "blocks.2.norm2", False),
    q_norm_eps: ("layers.0.attention.norm_q", "blocks.0.attn.q_norm", False),
    heads: ("layers.1.attention.to_out", "blocks.1.attn.proj", True),
    swapped: ("layers.2.scale_shift", "blocks.2.modulation", False),
    one_weight: ("layers.1.attention.{to_q,to_k,to_v}", "blocks.1.attn.qkv", False),
    lost_bias: ("layers.0.down", "blocks.0.mlp.2", False),
    groups: ("final_norm", "norm", False),
    transposed: ("layers.0.attention.to_out", "blocks.0.attn.proj", False),
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_one_fault_is_found_alone_at_its_place(fault: FaultOf) -> None:
    result = compare_case(case, edit=fault)
    assert result.status in (DIFFERS, OVER)
    (found,) = result.faults
    assert (found.candidate, found.reference, found.step) == FAULTS[fault]
    assert result.guilty is not None and found.reference.startswith(result.guilty.reference)


def test_several_faults_are_all_found() -> None:
    planted = [erf, eps, one_weight, lost_bias]
    result = compare_case(case, edit=lambda m: [fault(m) for fault in planted])
    assert {(f.candidate, f.reference, f.step) for f in result.faults} == {FAULTS[fault] for fault in planted}


def test_what_a_residual_carries_on_is_blamed_once() -> None:
    def shifted(m: Any) -> None:
        m.layers[1].register_forward_pre_hook(lambda layer, args: (args[0], args[1] + 0.1))

    (found,) = compare_case(case, edit=shifted).faults
    assert (found.candidate, found.reference, found.step) == ("layers.1.norm_a", "blocks.1.norm1", True)


def test_what_made_a_wrong_input_is_named_through_a_rearrangement() -> None:
    def shifted(m: Any) -> None:
        m.layers[2].register_forward_hook(lambda layer, args, out: out + 0.1)

    guilty = compare_case(case, edit=shifted).guilty
    assert guilty is not None and guilty.candidate == "layers.2" and "final_norm" in guilty.why
    guilty = compare_case(case, edit=erf).guilty
    assert guilty is not None and "without weights ran before it: layers.1.act" in guilty.why


def test_settings_of_the_live_modules_stand_in_the_reason() -> None:
    result = compare_case(case, edit=eps)
    assert "eps 1e-06 in the reference, 1e-05 in the candidate" in str(result.guilty and result.guilty.why)


def test_an_input_that_is_ignored_is_found() -> None:
    def deaf(m: Any, given: Any) -> Any:
        return {"0": answer(m, {**given, "mask": torch.ones_like(given["mask"])})["sample"]}

    result = compare_case(replace(case, candidate=Side(Port, deaf)))
    assert not result.passed and "forward~mask" in reason_of(result)

    class Deaf(Original):
        def forward(self, x: Tensor, t: Tensor, text: Tensor, mask: Tensor) -> Tensor:
            return super().forward(x, t, text, torch.ones_like(mask))

    both = replace(case, reference=Side(Deaf), candidate=Side(Port, deaf))
    result = compare_case(both)
    assert result.status == SKIPPED and "changing mask changes nothing" in reason_of(result)
    assert compare_case(replace(both, free=("mask",))).passed


def test_a_conversion_that_puts_weights_elsewhere_is_found() -> None:
    def wrong(state: dict[str, Tensor]) -> dict[str, Tensor]:
        made = convert(state)
        q, k = (f"layers.1.attention.to_{letter}.weight" for letter in "qk")
        made[q], made[k] = made[k], made[q]
        return made

    result = compare_case(replace(case, convert=wrong))
    assert not result.passed


def test_a_conversion_that_loses_or_leaves_weights_is_no_pass() -> None:
    lost = compare_case(replace(case, convert=lambda s: {k: v for k, v in convert(s).items() if k != "final.bias"}))
    assert lost.status == SKIPPED and "1 missing: final.bias" in lost.reason and "`keep`" in lost.reason
    left = compare_case(replace(case, convert=lambda s: {**convert(s), "more": s["out.bias"]}))
    assert left.status == SKIPPED and "1 left over: more" in left.reason
    with pytest.raises(BadInputError, match="does not take"):
        compare_case(replace(case, convert=lambda s: {"x": s["nothing"]}))
    with pytest.raises(BadInputError, match=r"KeyError: 'nothing' \(test_own.py:\d+"):
        compare_case(replace(case, convert=lambda s: {"x": s["nothing"]}))


def test_float32_only_sides_are_judged_by_the_baseline() -> None:
    class Single(Original):
        def forward(self, x: Tensor, t: Tensor, text: Tensor, mask: Tensor) -> Tensor:
            if self.out.weight.dtype == torch.float64:
                raise TypeError("this kernel takes float32 only")
            return super().forward(x, t, text, mask)

    single = replace(case, reference=Side(Single, float64=False))
    assert compare_case(single).status == SKIPPED
    assert compare_case(replace(single, baseline=1e-6)).status == ROUNDING
    assert compare_case(replace(single, baseline=1e-6), edit=lost_bias).status in (DIFFERS, OVER)


def test_assert_parity_says_what_differs() -> None:
    assert assert_parity(case).passed
    with pytest.raises(AssertionError, match=r"layers\.1\.attention.*blocks\.1\.attn\.qkv"):
        assert_parity(replace(case, candidate=replace(case.candidate, build=misbuilt)))


def misbuilt(config: Any) -> nn.Module:
    """A port that changes the weights of its second layer's q when it takes them."""

    def changed(module: Any, _: Any) -> None:
        module.weight.data.mul_(1.5)

    port = Port(config)
    layer: Any = port.layers[1]
    layer.attention.to_q.register_load_state_dict_post_hook(changed)
    return port
