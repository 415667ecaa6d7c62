"""A small recipe with every op, for tests of execution and the processes that they start: no torch, no pytest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from porter.core.checkpoint import read_header, specs
from porter.core.ops import Concat, PermuteBlocks, Split, Squeeze
from porter.core.recipe import Recipe, Rule, TensorPlan, compile_recipe

SHAPES: dict[str, tuple[int, ...]] = {
    "qkv": (9, 5),
    "head": (4, 3),
    "conv": (2, 3, 1, 1),
    "wide": (4, 6),
    "a": (3,),
    "b": (2,),
}
RECIPE = Recipe(
    "toy", "old", "new",
    (
        Rule("qkv", ("v", "q", "k"), Split((4, 2, 3))),
        Rule("head", "top", PermuteBlocks((1, 0))),
        Rule("conv", "linear", Squeeze((2, 3))),
        Rule("wide", ("left", "right"), Split((2, 4), dim=1)),
        Rule(("a", "b"), "ab", Concat()),
    ),
)  # fmt: skip
TARGETS = specs({"v": (4, 5), "q": (2, 5), "k": (3, 5), "top": (4, 3), "linear": (2, 3), "left": (4, 2),
                 "right": (4, 4), "ab": (5,)})  # fmt: skip


def plan_of(path: Path, **more: Any) -> TensorPlan:
    return compile_recipe(RECIPE, {}, read_header(path)[0], TARGETS, **more)
