"""On-load recipes: the rules name what is packed, every other tensor keeps its name, and the account is exact."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from porter.core.chain import chain
from porter.core.checkpoint import ANY, TensorInfo, specs
from porter.core.errors import RecipeError
from porter.core.execute import apply
from porter.core.onload import compile_on_load, on_disk, on_load
from porter.core.ops import Concat, Offset, PermuteBlocks, Split
from porter.core.recipe import INPUTS, OUTPUTS, Recipe, Rule, compile_recipe

B, P = "blocks.{i:int}.", "blocks.{i}."
ON_LOAD = on_load(
    "toy-on-load",
    Rule((B + "to_q.{p:weight|bias}", P + "to_k.{p}"), P + "to_qk.{p}", (Concat(),), shard=OUTPUTS),
    Rule(B + "out.{p:weight|bias}", P + "out.{p}", shard=INPUTS),
    Rule("never.{i:int}.there", "nowhere.{i}", ()),
)
DISK = {
    **{f"blocks.{i}.to_{n}.weight": (4, 3) for i in range(2) for n in "qk"},
    **{f"blocks.{i}.to_{n}.bias": (4,) for i in range(2) for n in "qk"},
    **{f"blocks.{i}.out.weight": (3, 4) for i in range(2)},
    "embed.0.weight": (3, 5),
    "scale": (),
}
NATIVE = {
    **{f"blocks.{i}.to_qk.weight": (8, 3) for i in range(2)},
    **{f"blocks.{i}.to_qk.bias": (8,) for i in range(2)},
    **{f"blocks.{i}.out.weight": (3, 4) for i in range(2)},
    "embed.0.weight": (3, 5),
    "scale": (),
}


def header(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, TensorInfo]:
    return specs(shapes, ANY)


def numbered(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """A distinct value in every element."""
    start, made = 0, {}
    for name, shape in shapes.items():
        size = int(torch.tensor(shape).prod()) if shape else 1
        made[name] = torch.arange(start, start + size, dtype=torch.float32).reshape(shape)
        start += size
    return made


def test_packs_what_rules_name_and_keeps_the_rest() -> None:
    plan = compile_on_load(ON_LOAD, {}, header(DISK), header(NATIVE))
    given = numbered(DISK)
    made = apply(plan, given)
    assert made.keys() == NATIVE.keys()
    assert torch.equal(made["blocks.1.to_qk.weight"], torch.cat([given[f"blocks.1.to_{n}.weight"] for n in "qk"]))
    assert torch.equal(made["embed.0.weight"], given["embed.0.weight"]) and made["scale"].shape == ()
    back = apply(plan.inverse(), made)
    assert all(torch.equal(back[name], tensor) for name, tensor in given.items())


def test_without_a_recipe_every_name_stays() -> None:
    plan = compile_on_load(None, {}, header(DISK), header(DISK))
    assert {name: step.sources for step in plan.steps for name in (step.outputs[0].name,)} == {n: (n,) for n in DISK}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"blocks.0.to_k.weight": None}, r"blocks\.0\.to_k\.weight"),
        ({"surplus": (2,)}, "surplus"),
        ({"embed.0.weight": None}, r"embed\.0\.weight"),
        ({"blocks.1.to_q.weight": (5, 3)}, r"blocks\.1\.to_qk\.weight"),
    ],
    ids=str,
)
def test_a_tensor_that_does_not_fit_is_refused_by_name(change: dict[str, tuple[int, ...] | None], says: str) -> None:
    changed = {name: shape for name, shape in (DISK | change).items() if shape is not None}
    with pytest.raises(RecipeError, match=says):
        compile_on_load(ON_LOAD, {}, header(changed), header(NATIVE))


def test_names_on_disk_of_native_tensors() -> None:
    found = on_disk(ON_LOAD, {}, NATIVE)
    assert found["blocks.1.to_qk.bias"] == ("blocks.1.to_q.bias", "blocks.1.to_k.bias")
    assert found["embed.0.weight"] == ("embed.0.weight",)
    assert {name for names in found.values() for name in names} == set(DISK)


def test_how_ranks_share_a_rule_is_part_of_what_it_does() -> None:
    plain = Rule("a.weight", "b.weight")
    shared = Rule("a.weight", "b.weight", shard=OUTPUTS)
    assert "shard" not in plain.canonical() and plain.canonical() != shared.canonical()


FIRST = Recipe(
    "toy", "original", "diffusers",
    (
        Rule("b.{i:int}.qkv", ("blocks.{i}.q", "blocks.{i}.k", "blocks.{i}.v"), (Split((2, 2, 2)),)),
        Rule("last", "norm", (PermuteBlocks((1, 0)),)),
        Rule("plus", "minus", (Offset(1.0),)),
    ),
)  # fmt: skip
SECOND = on_load(
    "packed",
    Rule(("blocks.{i:int}.q", "blocks.{i}.k", "blocks.{i}.v"), "blocks.{i}.all", (Concat(),)),
    Rule(("norm", "minus"), "both", (Concat(),)),
)
ORIGINAL = {"b.0.qkv": (6, 3), "b.1.qkv": (6, 3), "last": (4, 2), "plus": (1, 2)}


def test_a_chain_is_both_plans_and_its_map_is_by_rows() -> None:
    first = compile_recipe(FIRST, {}, specs(ORIGINAL, "F32"))
    second = compile_on_load(SECOND, {}, first.targets)
    whole, given = chain(first, second), numbered(ORIGINAL)
    expected = apply(second, apply(first, given))
    found = apply(whole, given)
    assert found.keys() == expected.keys() == {"blocks.0.all", "blocks.1.all", "both"}
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert torch.equal(found["blocks.1.all"], given["b.1.qkv"])  # cut and joined again
    assert (whole.source_layout, whole.target_layout, whole.exactness) == ("original", "native", "lossy")


def test_a_chain_of_index_ops_maps_modules_by_rows() -> None:
    recipe = Recipe("toy", "original", "diffusers", (
        Rule("mix.weight", ("q.weight", "mlp.weight"), (Split((2, 3)),)), Rule("k.weight", "k.weight"),
    ))  # fmt: skip
    first = compile_recipe(recipe, {}, specs({"mix.weight": (5, 3), "k.weight": (2, 3)}, "F32"))
    packed = on_load("packed", Rule(("q.weight", "k.weight", "mlp.weight"), "all.weight", (Concat(),)))
    whole = chain(first, compile_on_load(packed, {}, first.targets))
    pairs = {(p.source, p.source_rows, p.target_rows) for p in whole.module_map()}
    assert pairs == {("mix", (0, 2), (0, 2)), ("k", (0, 2), (2, 4)), ("mix", (2, 5), (4, 7))}


def test_a_chain_needs_plans_that_follow_each_other() -> None:
    first = compile_recipe(FIRST, {}, specs(ORIGINAL, "F32"))
    with pytest.raises(RecipeError, match="does not follow"):
        chain(first, compile_on_load(None, {}, specs({"other": (2,)}, "F32")))
