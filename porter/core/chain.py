"""Two plans one after the other, as one: original → diffusers, then diffusers → what a native module holds.

A step of the second plan reads tensors that the first makes; the chained step begins at the first plan's sources, and
its runs still say which of their elements stand where.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from porter.core.errors import RecipeError
from porter.core.ops import Compute, Exactness, Op
from porter.core.tensorplan import Step, TensorPlan, digest_of, make_step, weakest
from porter.core.views import View


def chain(first: TensorPlan, second: TensorPlan) -> TensorPlan:
    """`first`, then `second` on what it made. The rules in the account are the first plan's.

    Raises:
        RecipeError: `second` takes other tensors than `first` makes.
    """
    if odd := sorted(first.targets.keys() ^ second.sources.keys()):
        raise RecipeError(
            f"{second.recipe} does not follow {first.recipe}: {odd[0]}", expected="the same tensors between both",
            found=f"{len(first.targets)} made, {len(second.sources)} taken, {len(odd)} of them on one side only",
        )  # fmt: skip
    makers = {output.name: step for step, output in first.outputs()}
    steps = [step for step in first.steps if not step.outputs]  # what is dropped, or only checked
    for step in second.steps:
        before = list({id(makers[name]): makers[name] for name in step.sources}.values())
        sources = tuple(dict.fromkeys(name for each in before for name in each.sources))
        infos = [replace(first.sources[name], name=name) for name in sources]
        kind = _Computed if any(each.computed for each in before) else _Before
        ops = (kind(tuple(before), sources, step.sources), *step.ops)
        steps.append(make_step(before[0].rule, infos, ops, [output.name for output in step.outputs], {}))
    return replace(
        first, recipe=f"{first.recipe}, {second.recipe}", target_layout=second.target_layout, targets=second.targets,
        steps=tuple(steps), digest=digest_of(["chain", first.digest, second.digest]),
    )  # fmt: skip


@dataclass(frozen=True)
class _Before(Op):
    """The steps that make what the next ops read: `sources` in, `wanted` out."""

    steps: tuple[Step, ...]
    sources: tuple[str, ...]
    wanted: tuple[str, ...]

    @property
    def exactness(self) -> Exactness:
        return weakest(step.exactness for step in self.steps)

    def bind(self, views: Sequence[View], parameters: Mapping[str, int]) -> _Before:
        return self

    def move(self, views: Sequence[View]) -> list[View]:
        return self._made(views, lambda op, values: op.move(values))

    def compute(self, tensors: list[Any], torch: Any) -> list[Any]:
        return self._made(tensors, lambda op, values: op.compute(values, torch))

    def _made(self, values: Sequence[Any], run: Any) -> list[Any]:
        known = dict(zip(self.sources, values, strict=True))
        made: dict[str, Any] = {}
        for step in self.steps:
            found = [known[name] for name in step.sources]
            for op in step.ops:
                found = run(op, found)
            made.update(zip((output.name for output in step.outputs), found, strict=True))
        return [made[name] for name in self.wanted]

    def describe(self) -> str:
        return ", ".join(dict.fromkeys(op.describe() for step in self.steps for op in step.ops)) or "rename"

    def canonical(self) -> dict[str, Any]:
        return {"op": "Before", "ops": [[op.canonical() for op in step.ops] for step in self.steps]}


@dataclass(frozen=True)
class _Computed(_Before, Compute):
    """The same, where a step makes new numbers."""
