"""Cases of one's own: two implementations written apart, aligned by where the conversion puts each weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from parity.case import Case, Draw, Side
from parity.compare import DIFFERS, OVER, PRECISION, ROUNDING, SKIPPED
from parity.outcome import Options, Outcome, reason_of
from parity.own import assert_parity, compare_case
from parity.perturb import perturbed
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
    named = result.guilty and f"{result.guilty.candidate} ↔ {result.guilty.reference}"
    assert result.guilty is not None
    assert found.by.startswith(str(named)) if found.by else found.reference.startswith(result.guilty.reference)


def test_modules_without_weights_are_named() -> None:
    bare = replace(
        case,
        reference=Side(lambda c: norms(Original(c))),
        candidate=replace(case.candidate, build=lambda c: norms(Port(c))),
    )

    def planted(m: Any) -> None:
        m.layers[0].norm_a.eps = m.layers[2].norm_b.eps = 1e-5
        m.layers[1].act = nn.GELU()

    assert compare_case(bare).passed
    result = compare_case(bare, edit=planted)
    said = "eps 1e-06 in the reference, 1e-05 in the candidate"
    assert result.guilty is not None and said in result.guilty.why
    assert (result.guilty.candidate, result.guilty.reference) == ("layers.0.norm_a", "blocks.0.norm1")
    assert [fault.by for fault in result.faults] == [
        f"layers.0.norm_a ↔ blocks.0.norm1 ({said})",
        "layers.1.act ↔ blocks.1.mlp.1 (approximate 'tanh' in the reference, 'none' in the candidate)",
        f"layers.2.norm_b ↔ blocks.2.norm2 ({said})",
    ]


def norms(m: Any) -> Any:
    """The model with norms that have no weights."""
    for block in (*getattr(m, "blocks", ()), *getattr(m, "layers", ())):
        for name in ("norm1", "norm2", "norm_a", "norm_b"):
            if hasattr(block, name):
                setattr(block, name, nn.LayerNorm(16, eps=1e-6, elementwise_affine=False))
    return m


def test_several_faults_are_all_found() -> None:
    planted = [erf, eps, one_weight, lost_bias]
    result = compare_case(case, edit=lambda m: [fault(m) for fault in planted])
    assert {(f.candidate, f.reference, f.step) for f in result.faults} == {FAULTS[fault] for fault in planted}


def test_what_a_residual_carries_on_is_blamed_once() -> None:
    def shifted(m: Any) -> None:
        m.layers[1].register_forward_pre_hook(lambda layer, args: (args[0], args[1] + 0.1))

    (found,) = compare_case(case, edit=shifted).faults
    assert (found.candidate, found.reference, found.step) == ("layers.1.norm_a", "blocks.1.norm1", True)


@pytest.mark.slow
def test_what_made_a_wrong_input_is_named_through_a_rearrangement() -> None:
    def shifted(m: Any) -> None:
        m.layers[2].register_forward_hook(lambda layer, args, out: out + 0.1)

    guilty = compare_case(case, edit=shifted).guilty
    assert guilty is not None and guilty.candidate == "layers.2" and "final_norm" in guilty.why
    guilty = compare_case(case, edit=erf).guilty
    assert guilty is not None and guilty.candidate == "layers.1.act" and "approximate 'tanh'" in guilty.why


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
    with pytest.raises(BadInputError, match=r"KeyError: 'nothing', at .*test_own.py:\d+"):
        compare_case(replace(case, convert=lambda s: {"x": s["nothing"]}))


def test_float32_only_sides_are_judged_by_the_baseline() -> None:
    class Single(Original):
        def forward(self, x: Tensor, t: Tensor, text: Tensor, mask: Tensor) -> Tensor:
            if self.out.weight.element_size() == 8:
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


class Pool(nn.Module):
    """Attention of the mean (B, 8) over tokens (B, L, 8), by a function that takes the layers' weights."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.c_proj = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        out: Tensor = nn.functional.multi_head_attention_forward(
            x.mean(0, keepdim=True), x, x, 8, 2, None,
            torch.cat([self.q_proj.bias, self.k_proj.bias, self.v_proj.bias]), None, None, False, 0.0,
            self.c_proj.weight, self.c_proj.bias, training=False, need_weights=False, use_separate_proj_weight=True,
            q_proj_weight=self.q_proj.weight, k_proj_weight=self.k_proj.weight, v_proj_weight=self.v_proj.weight,
        )[0]  # fmt: skip
        return out[0]


def test_a_module_whose_weights_another_uses_took_part() -> None:
    pool = replace(
        case, reference=Side(Pool), candidate=Side(Pool), inputs=lambda c, d: {"x": d("x", 2, 5, 8)}, convert=None
    )
    assert compare_case(pool, level="component").passed
    unused = Side(lambda c: nn.ModuleDict({"pool": Pool(c), "more": nn.Linear(2, 2)}), lambda m, x: m["pool"](**x))
    assert not compare_case(replace(pool, reference=unused, candidate=unused), level="component").passed


def test_casts_that_a_kernel_forces_can_be_left_out() -> None:
    class Forced(Original):
        def forward(self, x: Tensor, t: Tensor, text: Tensor, mask: Tensor) -> Tensor:
            return super().forward(x, t, text.to(torch.bfloat16).type_as(text).half().to(text.dtype), mask)

    forced = compare_case(replace(case, reference=Side(Forced)))
    assert not forced.passed and any("halves=False" in note for note in forced.notes)
    left_out = compare_case(replace(case, reference=Side(Forced, halves=False)))
    assert left_out.status == ROUNDING and "casts of the reference to half precision were left out" in left_out.notes
    assert compare_case(replace(case, reference=Side(Forced, halves=False)), dtype="bfloat16").passed


class Waves(Original):
    """Its time is a sinusoid of float64, its table is made when it is built."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.table = (torch.arange(4, dtype=torch.float64) * 0.7).sin()

    def forward(self, x: Tensor, t: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        wave = (t.double() * 900).sin().to(t.dtype)
        return super().forward(x * self.table.to(x.dtype)[:, None], wave, text, mask)


class PortOfWaves(Port):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.table = (torch.arange(4, dtype=torch.float64) * 0.7).sin().float()


def waves(dtype: torch.dtype) -> Any:
    def call(m: Any, x: Any) -> Any:
        wave = (x["t"].to(dtype) * 900).sin().to(x["t"].dtype)
        return {"0": answer(m, {**x, "t": wave, "x": x["x"] * m.table[:, None]})["sample"]}

    return replace(case, reference=Side(Waves), candidate=Side(PortOfWaves, call))


def test_tables_that_are_rounded_when_they_are_made_are_rounding() -> None:
    result = compare_case(waves(torch.float64))
    assert result.status == ROUNDING and (result.headline and result.headline.max_abs64 < 1e-13)


def test_code_in_lower_precision_is_found_where_it_is_and_can_be_accepted() -> None:
    result = compare_case(waves(torch.float32))
    assert result.status == PRECISION
    assert [str(fault) for fault in result.faults] == ["the code before time_embed ↔ time, call 0"]
    assert compare_case(replace(waves(torch.float32), baseline=1e-4)).status == ROUNDING
    assert compare_case(replace(waves(torch.float32), baseline=1e-9)).status == PRECISION


def test_compiled_code_runs_as_it_is_written() -> None:
    def compiled(of: Callable[[Any], Any]) -> Callable[[Any], nn.Module]:
        def build(config: Any) -> nn.Module:
            made: nn.Module = of(config)
            for name in ("blocks", "layers"):
                for block in getattr(made, name, ()):
                    block.forward = torch.compile(block.forward, backend=refuses)
            return made

        return build

    def refuses(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("compiled")

    both = replace(case, reference=Side(compiled(Original)), candidate=replace(case.candidate, build=compiled(Port)))
    assert compare_case(both).passed


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (
            torch.tensor([[[0.0, 1], [0, 2]]] * 2),
            torch.tensor([[[0.0, 1], [0, 1]]] * 2),
        ),  # places, as all of a batch have
        (torch.tensor([937.0, 21.0]), torch.tensor([21.0, 937.0])),
        (torch.tensor([[3, 3], [5, 5]]), torch.tensor([[5, 5], [3, 3]])),
        (torch.tensor([[4, 5], [4, 6]]), torch.tensor([[4, 4], [4, 4]])),  # other means as well
        (torch.tensor(7), torch.tensor(6)),
        (torch.tensor([[True, True], [True, True]]), torch.tensor([[True, False], [True, False]])),
        (torch.tensor([[1, 1], [1, 0]]), torch.tensor([[1, 0], [1, 0]])),  # a row that shows nothing gives NaN
        (torch.tensor([[0, 1], [1, 0]]), torch.tensor([[0, 1], [1, 1]])),
        (torch.tensor([1.0, 1, 0]), torch.tensor([1.0, 0, 0])),
        (torch.tensor(True), torch.tensor(False)),
        (torch.zeros(2, 1, 2), torch.tensor([[[0.0, 1]]] * 2)),
        (torch.zeros(0, 3), None),
    ],
)
def test_an_input_changes_as_its_kind_allows(given: Tensor, wanted: Tensor | None) -> None:
    changed = perturbed("x", given, 0)
    assert (changed is None and wanted is None) or torch.equal(changed, wanted)  # type: ignore[arg-type]
    real = perturbed("x", torch.tensor([[0.5, 1.5]] * 2), 0)
    assert real is not None and torch.equal(real[0], real[1]) and not torch.equal(real[0], torch.tensor([0.5, 1.5]))


def test_a_fault_in_an_embedding_is_not_handed_on() -> None:
    class Kinds(nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.kind, self.a, self.b = nn.Embedding(3, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor, kinds: Tensor) -> Tensor:
            made: Tensor = self.b(self.a(x + self.kind(kinds)) + self.kind(torch.ones_like(kinds)))
            return made

    def given(config: Any, draw: Draw) -> dict[str, Tensor]:
        return {"x": draw("x", 2, 3, 8), "kinds": torch.tensor([[0, 2, 2], [2, 0, 2]])}

    def spoil(m: Any) -> None:
        m.kind.weight.data[1] *= 1.01

    own = Case(Side(Kinds), Side(Kinds), given)
    assert compare_case(own).passed
    assert [str(fault) for fault in compare_case(own, edit=spoil).faults] == ["kind ↔ kind, call 1"]


def test_samples_that_the_reference_takes_one_by_one() -> None:
    class OneByOne(nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.embed, self.out = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            made: Tensor = self.out(torch.cat([self.embed(row) for row in x.split(2)]).sin())
            return made

    class AtOnce(OneByOne):
        def forward(self, x: Tensor) -> Tensor:
            made: Tensor = self.out(self.embed(x).sin())
            return made

    def spoil(m: Any) -> None:
        m.embed.bias.data[2] += 1e-3

    own = Case(Side(OneByOne), Side(AtOnce), lambda config, draw: {"x": draw("x", 6, 3, 8)})
    result = compare_case(own)
    assert result.passed and result.counts["skipped"] == 0 and len(result.taps) == 8
    wrong = compare_case(own, edit=spoil)
    assert not wrong.passed and wrong.guilty and wrong.guilty.candidate == "embed"
    assert [str(fault) for fault in wrong.faults] == [f"embed ↔ embed, call {call}" for call in range(3)]


def test_what_differs_is_named_before_what_cannot_be_compared() -> None:
    class Pair(nn.Module):
        flat = False

        def __init__(self, config: Any) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            t = self.a(t if self.flat else t[:, None].expand(-1, 3, -1))
            made: Tensor = self.b(x + (t[:, None] if self.flat else t))
            return made

    class Flat(Pair):
        flat = True

    def spoil(m: Any) -> None:
        m.b.weight.data[1] *= 1.01

    own = Case(Side(Pair), Side(Flat), lambda config, draw: {"x": draw("x", 2, 3, 8), "t": draw("t", 2, 8)})
    plain = compare_case(own)
    assert plain.status == SKIPPED and plain.guilty and plain.guilty.reference == "a"
    wrong = compare_case(own, edit=spoil)
    assert wrong.guilty and wrong.guilty.reference == "b"


@pytest.mark.parametrize(
    "fields",
    [
        {"baseline": float("inf")}, {"baseline": -1.0}, {"baseline": "1"}, {"free": "mask"}, {"free": None},
        {"skip": "("}, {"modules": ["a"]}, {"blocks": ("a",)}, {"name": None}, {"name": ""}, {"keep": None},
    ],
)  # fmt: skip
def test_a_field_that_would_have_another_effect_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError), match=next(iter(fields))):
        replace(case, **fields)


@pytest.mark.parametrize("fields", [{"stubs": "wandb"}, {"bare": ("torch",)}, {"bare": "os"}, {"asserts": "no"}])
def test_a_side_s_field_that_would_have_another_effect_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(TypeError):
        Side(Original, **fields)


def test_a_name_is_no_path() -> None:
    assert Outcome(None, "../../evil", Options()).folder == Path("parity-.._.._evil")


def test_a_conversion_may_import_what_it_does_not_use() -> None:
    def from_a_script(state: dict[str, Tensor]) -> dict[str, Tensor]:
        from nowhere_at_all import tool  # type: ignore[import-not-found]

        return convert(state) if tool else {}

    with pytest.raises(BadInputError, match="nowhere_at_all") as caught:
        compare_case(replace(case, convert=from_a_script))
    assert "stubs=('nowhere_at_all',) of the candidate's Side" in str(caught.value.hint)
    result = compare_case(
        replace(case, convert=from_a_script, candidate=replace(case.candidate, stubs=("nowhere_at_all",)))
    )
    assert result.passed, reason_of(result)
