"""Compiling recipes: exactly once on both sides, and errors that name the tensor and its neighbours."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from porter.core.checkpoint import ANY, TensorInfo, spec, specs
from porter.core.errors import RecipeError
from porter.core.ops import Concat, Constant, Drop, PermuteBlocks, Split
from porter.core.recipe import Recipe, Rule, compile_recipe

H, N = 4, 3


def source(dtype: str = "F32") -> dict[str, TensorInfo]:
    shapes: dict[str, tuple[int, ...]] = {"head.w": (2 * H, H), "step": ()}
    for i in range(N):
        shapes |= {f"blocks.{i}.qkv.weight": (3 * H, H), f"blocks.{i}.qkv.bias": (3 * H,), f"blocks.{i}.out": (H, H)}
    return specs(shapes, dtype)


def target(config: Mapping[str, Any] | None = None, dtype: str = ANY) -> dict[str, TensorInfo]:
    shapes: dict[str, tuple[int, ...]] = {"top.w": (2 * H, H)}
    for i in range(N):
        for k in "qkv":
            shapes |= {f"layers.{N - 1 - i}.{k}.weight": (H, H), f"layers.{N - 1 - i}.{k}.bias": (H,)}
        shapes[f"layers.{i}.proj"] = (H, H)
    return specs(shapes, dtype)


QKV = "blocks.{i:int}.qkv.{p:weight|bias}"
RECIPE = Recipe(
    "toy", "old", "new",
    (
        Rule(
            QKV, ("layers.{n-1-i}.q.{p}", "layers.{n-1-i}.k.{p}", "layers.{n-1-i}.v.{p}"), Split(("h", "h", "h")),
            "fused",
        ),
        Rule("blocks.{i:int}.out", "layers.{n-1-i}.proj"),
        Rule("head.w", "top.w", PermuteBlocks((1, 0)), "halves differ"),
        Rule("step", (), Drop("training only")),
    ),
    parameters=lambda config: {"h": H, "n": N},
    target_headers=target,
)  # fmt: skip


def compiled(recipe: Recipe = RECIPE, header: Mapping[str, TensorInfo] | None = None, **more: Any) -> Any:
    return compile_recipe(recipe, {}, source() if header is None else header, **more)


def refused(recipe: Recipe = RECIPE, header: Mapping[str, TensorInfo] | None = None, **more: Any) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        compiled(recipe, header, **more)
    assert caught.value.exit_code == 6 and caught.value.hint
    return caught.value


def test_accounts_for_every_tensor() -> None:
    plan = compiled()
    document = json.loads(json.dumps(plan.coverage.to_json()))
    assert document["totals"] == {
        "source": 11, "target": 22, "dropped": 1, "bytes_in": plan.bytes_out, "bytes_out": plan.bytes_out,
    }  # fmt: skip
    assert [(r["source_tensors"], r["target_tensors"], r["ops"]) for r in document["rules"]] == [
        (6, 18, "split [h, h, h]"), (3, 3, "rename"), (1, 1, "swap halves"), (1, 0, "drop: training only"),
    ]  # fmt: skip
    assert document["rules"][0]["why"] == "fused" and document["rules"][0]["exactness"] == "exact"
    assert document["dropped"] == [{"tensor": "step", "reason": "training only"}]
    assert plan.exactness == "needs-base"
    text = str(plan.coverage)
    assert "6 → 18" in text and "dropped step: training only" in text and "11 → 22" in text


@pytest.mark.parametrize("dtype", ["I8", "I64", "U8", "BOOL", "C64"])
def test_weights_are_floating_point_numbers(dtype: str) -> None:
    """Grouped, with the rule's line; what a rule drops may be of any dtype, and a layout may ask for integers."""
    recipe = dataclasses.replace(RECIPE, source_headers=lambda config, kind=ANY: source(kind))
    odd = {f"blocks.{i}.out": spec(dtype, (H, H)) for i in range(N)}
    what = refused(recipe, source() | odd).what
    assert "wrong dtype in the source: 3 tensors blocks.*.out, the first blocks.0.out" in what
    assert f"[4, 4] of a floating-point dtype, found [4, 4] {dtype}" in what
    assert "tests/core/test_recipe.py" in what and what.count("wrong dtype") == 1
    compiled(recipe, source() | {"step": spec(dtype, ())})
    asked = dataclasses.replace(RECIPE, source_headers=lambda config, kind=ANY: source(kind) | odd)
    compiled(asked, source() | odd)


def test_a_name_without_end_is_cut_in_the_message() -> None:
    what = refused(header=source() | {"a." * 20000: spec("F32", (1,))}).what
    assert "(40000 characters)" in what and len(what) < 2000


def test_unclaimed_source_is_named_with_the_nearest_rule() -> None:
    error = refused(
        header=source() | {"blocks.0.qkv.scale": spec("F32", (1,)), "blocks.1.qkv.scale": spec("F32", (1,))}
    )
    assert "no rule claims the source tensor: 2 tensors blocks.*.qkv.scale, the first blocks.0.qkv.scale" in error.what
    assert QKV in error.what


def test_missing_source_leaves_its_targets_unmade() -> None:
    header = source()
    del header["blocks.1.qkv.bias"]
    error = refused(header=header)
    assert "nothing makes the target tensor: layers.1.q.bias" in error.what


def test_missing_source_is_named_where_the_layout_is_known() -> None:
    header = source()
    del header["blocks.1.qkv.bias"]
    known = dataclasses.replace(RECIPE, source_headers=lambda config, dtype: source(dtype))
    error = refused(known, header)
    assert "missing from the source: blocks.1.qkv.bias" in error.what
    header = source() | {"head.w": spec("F32", (2 * H, H + 1))}
    assert "wrong shape in the source: head.w (expected [8, 4], found [8, 5] F32)" in refused(known, header).what


def test_a_problem_stands_with_the_line_of_its_rule() -> None:
    def line(start: str) -> str:
        lines = Path(__file__).read_text().splitlines()
        return f"test_recipe.py:{next(n for n, text in enumerate(lines, 1) if text.strip().startswith(start))}: "

    known = dataclasses.replace(RECIPE, source_headers=lambda config, dtype: source(dtype))
    error = refused(known, source() | {"head.w": spec("F32", (2 * H, H + 1))})
    assert line('Rule("head.w"') + "head.w → top.w (swap halves)" in error.what
    error = refused(target={**target(), "layers.7.q.bias": spec(ANY, (1,))})  # its kin are made by this rule
    assert line("Rule(") + QKV in error.what
    switched = RECIPE.replace_rule("head.w", when="with_head", line="own.py:3")
    recipe = dataclasses.replace(switched, parameters=lambda config: {"n": 3, "h": H, "with_head": 0})
    assert "own.py:3: head.w → top.w (swap halves), off for this config: with_head is 0" in refused(recipe).what


def test_a_name_cannot_add_lines_to_an_error() -> None:
    error = refused(header=source() | {"x\n  next: rm -rf": spec("F32", (1,))})
    assert "no rule claims the source tensor: x\\n  next: rm -rf" in error.what


def test_a_renamed_source_is_suggested() -> None:
    header = source()
    header["head.weight"] = header.pop("head.w")
    error = refused(header=header)
    assert "the rule matches no tensor: head.w (nearest: head.weight" in error.what


def test_target_left_over() -> None:
    error = refused(target={**target(), "layers.0.q.scale": spec(ANY, (1,))})
    assert "nothing makes the target tensor: layers.0.q.scale" in error.what


def test_made_but_not_wanted() -> None:
    lacking = target()
    del lacking["top.w"]
    assert "made, but the target has no such tensor: top.w" in refused(target=lacking).what


def test_two_claims_and_two_makers() -> None:
    twice = dataclasses.replace(RECIPE, rules=(*RECIPE.rules, Rule("head.{p:w}", "top.{p}")))
    error = refused(twice)
    assert "claimed by several rules: head.w" in error.what and "made by several rules: top.w" in error.what


def test_wrong_shape_and_dtype() -> None:
    error = refused(target=target() | {"top.w": spec(ANY, (2 * H, 7))})
    assert "wrong shape: top.w (expected [8, 7], found [8, 4] F32 from head.w)" in error.what
    assert "wrong dtype" in refused(target=target(dtype="BF16")).what
    error = refused(header=source() | {"blocks.2.qkv.weight": spec("F32", (11, H))})
    assert "split [h, h, h]" in error.what and "blocks.2.qkv.weight" in error.what and "found 11" in error.what


def test_op_count_must_match_the_targets() -> None:
    error = refused(RECIPE.replace_rule(QKV, ops=(Split(("h", "2*h")),)))
    assert "gives 2 tensors" in error.what


def test_concat_of_several_sources() -> None:
    back = Recipe(
        "toy-fused", "new", "old",
        (Rule(("a.{i:int}.q", "a.{i}.k"), "b.{i}.qk", Concat()), Rule("c", "c")),
        target_headers=lambda config, dtype: specs({"b.0.qk": (3,), "c": (1,)}),
    )  # fmt: skip
    header = specs({"a.0.q": (1,), "a.0.k": (2,), "c": (1,)}, "F32")
    plan = compiled(back, header)
    assert [o.name for _, o in plan.inverse().outputs()] == ["a.0.q", "a.0.k", "c"]
    del header["a.0.k"]
    assert "missing from the source: a.0.k" in refused(back, header).what


def test_conditional_rules() -> None:
    for present in (0, 1):
        recipe = Recipe(
            "toy-if", "a", "b", (Rule("x", "y"), Rule("g", "g", when="guided")),
            parameters=lambda config: {"guided": config["guided"]},
            target_headers=lambda config, dtype: specs({"y": (1,)} | ({"g": (1,)} if config["guided"] else {})),
        )  # fmt: skip
        both = specs({"x": (1,), "g": (1,)}, "F32")
        if present:
            compile_recipe(recipe, {"guided": 1}, both)
        else:
            with pytest.raises(RecipeError, match="no rule claims the source tensor: g"):
                compile_recipe(recipe, {"guided": 0}, both)
            with pytest.raises(RecipeError, match="the rule matches no tensor: g"):
                compile_recipe(recipe, {"guided": 1}, {"x": both["x"]})


def test_inverse_is_derived_and_undone_twice_is_the_same() -> None:
    with pytest.raises(RecipeError, match="it drops step") as caught:
        compiled().inverse()
    assert caught.value.found == "training only"
    kept = source()
    del kept["step"]
    plan = compiled(RECIPE.without_rule("step"), kept)
    back = plan.inverse()
    assert {n: t.shape for n, t in back.targets.items()} == {n: t.shape for n, t in kept.items()}
    assert back.source_layout == "new" and back.digest != plan.digest and "undo split" in str(back.coverage)
    again = back.inverse()
    assert again.coverage == plan.coverage and list(again.targets) == list(plan.targets)
    assert {o.name: o.runs for _, o in again.outputs()} == {o.name: o.runs for _, o in plan.outputs()}


def test_what_was_dropped_and_what_was_made_up_go_back_with_the_original_at_hand() -> None:
    recipe = Recipe(
        "toy-base", "a", "b", (Rule("x", "y"), Rule("step", (), Drop("training only")), Rule((), "z", Constant(1.0))),
        target_headers=lambda config, dtype: specs({"y": (1,), "z": ()}),
    )  # fmt: skip
    header = specs({"x": (1,), "step": ()}, "F32")
    back = compiled(recipe, header).inverse(header)
    assert list(back.targets) == list(header) and "step (base)" in back.sources
    assert "undo drop: training only" in str(back.coverage) and "undo constant 1" in str(back.coverage)


def test_rebind_takes_only_the_plans_own_tensors() -> None:
    plan = compiled()
    made = {name: spec(t.dtype, t.shape, name) for name, t in plan.targets.items()}
    plan.rebind(made)
    for bad in (
        {**made, "extra": spec("F32", (1,))},
        {name: t for name, t in made.items() if name != "top.w"},
        {**made, "top.w": spec("F32", (1,))},
        {**made, "top.w": spec("BF16", (2 * H, H))},
    ):
        with pytest.raises(RecipeError, match=r"top\.w|extra"):
            plan.rebind(bad)


def test_dtype_policy() -> None:
    plan = compiled(dtype="bfloat16")
    assert {t.dtype for t in plan.targets.values()} == {"BF16"} and plan.exactness == "needs-base"
    assert plan.bytes_out * 2 == compiled().bytes_out
    assert "cast to BF16" in str(plan.coverage)
    kept = dataclasses.replace(RECIPE, keep_dtype=("layers.{i:int}.{k:q|k}.bias",))
    targets = compiled(kept, dtype="BF16").targets
    assert {name for name, t in targets.items() if t.dtype == "F32"} == {
        f"layers.{i}.{k}.bias" for i in range(N) for k in "qk"
    }
    ints = compiled(header=source("I64"), dtype="BF16")
    assert {t.dtype for t in ints.targets.values()} == {"I64"}
    assert compiled(dtype="F32").exactness == compiled().exactness
    assert compiled(header=source("BF16"), dtype="F32").steps[0].exactness == "exact"
    assert compiled(dtype="BF16").steps[0].exactness == "lossy"


def test_digests_tell_recipes_apart() -> None:
    changed = RECIPE.replace_rule("head.w", ops=())
    assert changed.digest != RECIPE.digest
    assert RECIPE.replace_rule("head.w", why="another reason").digest == RECIPE.digest
    assert compiled(changed).digest != compiled().digest != compiled(dtype="BF16").digest
    # The digest is of the recipe and its settings, not of a particular file.
    assert compiled().digest == compiled(header=source("BF16")).digest
    with pytest.raises(RecipeError, match="0 rules for 'head'") as caught:
        RECIPE.replace_rule("head")
    assert caught.value.found == "head.w"


def test_rules_without_targets_need_a_reason() -> None:
    with pytest.raises(RecipeError, match="incomplete"):
        Rule("x", ())
    with pytest.raises(RecipeError, match="incomplete"):
        Rule("x", "y", Drop("why"))


def test_module_map() -> None:
    plan = compiled()
    pairs = {(p.source, p.target): (p.source_rows, p.target_rows) for p in plan.module_map() if p.source != "head"}
    assert pairs["blocks.0.qkv", "layers.2.k"] == ((H, 2 * H), (0, H))
    assert pairs["blocks.0", "layers.2"] == (None, None)  # `blocks.0.out` is a tensor of the block itself
    halves = [(p.source_rows, p.target_rows) for p in plan.module_map() if p.source == "head"]
    assert halves == [((H, 2 * H), (0, H)), ((0, H), (H, 2 * H))]
    rule = next(p.rule for p in plan.module_map() if p.source == "blocks.0.qkv")
    assert "split [h, h, h]" in rule and QKV in rule


@pytest.mark.parametrize("first", ["weight", "bias"])
def test_module_map_sees_an_op_forgotten_on_the_weight_alone(first: str) -> None:
    added = [Rule("head.w", "top.w"), Rule("head.b", "top.b", PermuteBlocks((1, 0)))]
    rules = (*RECIPE.without_rule("head.w").rules, *(added if first == "weight" else added[::-1]))
    header, wanted = source() | specs({"head.b": (2 * H,)}, "F32"), target() | specs({"top.b": (2 * H,)})
    plan = compiled(dataclasses.replace(RECIPE, rules=rules), header, target=wanted)
    (pair,) = [p for p in plan.module_map() if p.source == "head"]
    assert pair.source_rows is None and "rename" in pair.rule
