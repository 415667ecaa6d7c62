"""A compiled recipe: which elements of which source tensor make each target tensor, and everything that follows.

The conversion, its inverse, the account of every tensor, the bytes it takes and the map between both sides' modules are
all read off the same steps.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from porter.core import stream
from porter.core.checkpoint import ANY, Header, TensorInfo, nbytes, spec
from porter.core.errors import RecipeError
from porter.core.modulemap import ModulePair, module_map
from porter.core.ops import Cast, Compute, Drop, Exactness, Op, castable, widens
from porter.core.views import Run, View, merge

BASE = " (base)"  # after the name of a tensor that an inverse takes from the original weights


@dataclass(frozen=True)
class Output:
    """A target tensor of a step. `runs` count elements of the step's sources, each in its source's own dtype.

    Of a computed step they only say which sources' elements came through unchanged.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    runs: tuple[Run, ...]


@dataclass(frozen=True)
class Step:
    """One rule applied to one set of names: sources → bound ops → outputs."""

    rule: int
    sources: tuple[str, ...]
    ops: tuple[Op, ...]
    outputs: tuple[Output, ...]
    agreements: tuple[tuple[Output, Output], ...] = ()  # values that an execution must find equal in every bit

    @property
    def computed(self) -> bool:
        """Whether an op makes new numbers, so that the step needs its sources whole, and torch."""
        return any(isinstance(op, Compute) for op in self.ops)

    @property
    def exactness(self) -> Exactness:
        """The weakest of the ops' promises."""
        return weakest(op.exactness for op in self.ops)


def make_step(
    rule: int, sources: Sequence[TensorInfo], ops: Sequence[Op], targets: Sequence[str], parameters: Mapping[str, int]
) -> Step:
    """Bind `ops` to the sources' shapes and follow every element to the targets.

    Raises:
        RecipeError: the ops don't fit the shapes, or give another number of tensors than there are targets.
    """
    views = [View.whole(index, source.dtype, source.shape) for index, source in enumerate(sources)]
    bound: list[Op] = []
    rounded: list[tuple[str, str]] = []
    agreements: list[tuple[Output, Output]] = []
    for op in ops:
        bound.append(op.bind(views, parameters))
        for pair in bound[-1].agreements(views):
            agreements.append(tuple(Output(op.describe(), v.dtype, v.shape, merge(v.runs)) for v in pair))  # type: ignore[arg-type]
        if isinstance(bound[-1], Cast) and not all(widens(*pair) for pair in rounded):
            raise RecipeError(
                f"{' + '.join(source.name for source in sources)} is rounded twice",
                expected="one cast, or casts of which only the last rounds",
                found=" → ".join(op.describe() for op in ops), hint="leave out the first cast, or --dtype",
            )  # fmt: skip
        if isinstance(bound[-1], Cast):  # an execution converts each element once, from its source's dtype to the last
            rounded += [pair for pair in bound[-1].pairs() if ANY not in pair]
        views = bound[-1].move(views)
    if len(views) != len(targets):
        raise RecipeError(
            f"{' + '.join(source.name for source in sources) or 'nothing'} gives {len(views)} tensors",
            expected=f"{len(targets)}: {', '.join(targets) or 'none'}", found=" → ".join(op.describe() for op in ops),
        )  # fmt: skip
    outputs = tuple(
        Output(name, view.dtype, view.shape, merge(view.runs)) for name, view in zip(targets, views, strict=True)
    )
    return Step(rule, tuple(source.name for source in sources), tuple(bound), outputs, tuple(agreements))


@dataclass(frozen=True)
class CoverageRow:
    """What one rule did: its patterns, how many tensors each side, its ops in words, what it costs, and why it is."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    source_count: int
    target_count: int
    ops: str
    exactness: Exactness
    why: str


@dataclass(frozen=True)
class Coverage:
    """The account of a plan: every source and target tensor stands in exactly one row, or is dropped with a reason."""

    rows: tuple[CoverageRow, ...]
    dropped: tuple[tuple[str, str], ...]
    totals: Mapping[str, int]

    def to_json(self) -> dict[str, Any]:
        """{"rules": [...], "dropped": [{"tensor", "reason"}], "totals": {...}}"""
        rules = [
            {
                "sources": list(row.sources), "targets": list(row.targets), "source_tensors": row.source_count,
                "target_tensors": row.target_count, "ops": row.ops, "exactness": row.exactness, "why": row.why,
            }
            for row in self.rows
        ]  # fmt: skip
        dropped = [{"tensor": name, "reason": reason} for name, reason in self.dropped]
        return {"rules": rules, "dropped": dropped, "totals": dict(self.totals)}

    def __str__(self) -> str:
        lines = [
            f"{row.source_count:>5} → {row.target_count:<5} {row.ops}: {' + '.join(row.sources)} → "
            f"{', '.join(row.targets) or 'nothing'}"
            for row in self.rows
        ]
        lines += [f"    dropped {name}: {reason}" for name, reason in self.dropped]
        totals = self.totals
        lines.append(f"{totals['source']:>5} → {totals['target']:<5} in all, {totals['dropped']} dropped")
        return "\n".join(lines)


@dataclass(frozen=True)
class TensorPlan:
    """What `compile_recipe` makes. `sources` and `targets` are headers; an entry that has a file can be read."""

    recipe: str
    source_layout: str
    target_layout: str
    sources: Header
    targets: Header
    steps: tuple[Step, ...]
    rules: tuple[Any, ...] = field(repr=False)  # porter.core.recipe.Rule, for the account
    parameters: Mapping[str, int]
    digest: str

    @property
    def exactness(self) -> Exactness:
        """The weakest of the steps' promises: exact, lossy, or needs-base."""
        return weakest(step.exactness for step in self.steps)

    @property
    def bytes_in(self) -> int:
        """Bytes of source tensors that are read; dropped ones are not."""
        read = {name for step in self.steps if not _drops(step) for name in step.sources}
        return sum(self.sources[name].nbytes for name in read)

    @property
    def bytes_out(self) -> int:
        """Bytes of target tensors, without the file's header."""
        return sum(target.nbytes for target in self.targets.values())

    @property
    def peak_buffer(self) -> int:
        """Bytes of tensor data in memory at once while executing, whatever the model's size."""
        largest = max((target.nbytes for target in self.targets.values()), default=0)
        gathered = max((self._gathered(step, output) for step, output in self.outputs()), default=0)
        whole = max((self._whole(step) for step in self.steps if step.computed), default=0)
        return max(stream.BUFFERS * min(stream.WINDOW, largest) + gathered, whole)

    def _gathered(self, step: Step, output: Output) -> int:
        """Bytes of the sources that a transposition needs whole."""
        if all(run.plain for run in output.runs):
            return 0
        return sum(self.sources[step.sources[source]].nbytes for source in {run.source for run in output.runs})

    def _whole(self, step: Step) -> int:
        """Bytes of a computed step's tensors: sources, float32 copies of them, results."""
        sources = [self.sources[name] for name in step.sources]
        results = sum(nbytes(item.dtype, math.prod(item.shape)) for item in step.outputs)
        return sum(source.nbytes + 4 * source.numel for source in sources) + results

    @property
    def coverage(self) -> Coverage:
        """The account, one row per rule that did something."""
        rows, dropped = [], []
        for index, rule in enumerate(self.rules):
            steps = [step for step in self.steps if step.rule == index]
            if not steps:
                continue
            words = [op.describe() for op in rule.ops]
            own = {type(op) for op in rule.ops}
            casts = {op.describe() for step in steps for op in step.ops if isinstance(op, Cast) and Cast not in own}
            rows.append(
                CoverageRow(
                    rule.sources, rule.targets, sum(len(step.sources) for step in steps),
                    sum(len(step.outputs) for step in steps), ", ".join(words + sorted(casts)) or "rename",
                    weakest(step.exactness for step in steps), rule.why,
                )
            )  # fmt: skip
            if any(map(_drops, steps)):
                dropped += [(name, rule.why) for step in steps for name in step.sources]
        totals = {
            "source": len(self.sources), "target": len(self.targets), "dropped": len(dropped),
            "bytes_in": self.bytes_in, "bytes_out": self.bytes_out,
        }  # fmt: skip
        return Coverage(tuple(rows), tuple(dropped), totals)

    def outputs(self) -> Iterator[tuple[Step, Output]]:
        """Every target tensor with the step that makes it."""
        for step in self.steps:
            for output in step.outputs:
                yield step, output

    def rebind(self, targets: Header) -> TensorPlan:
        """The same plan whose targets are the tensors of a real file, so that its inverse can read them.

        Raises:
            RecipeError: the file's tensors are not the plan's, in name, dtype or shape.
        """
        for name in self.targets.keys() | targets.keys():
            ours, theirs = self.targets.get(name), targets.get(name)
            if ours is None or theirs is None:
                raise RecipeError(
                    f"{self.recipe}: the file {'has' if ours is None else 'lacks'} the tensor {name}",
                    expected=f"the {len(self.targets)} tensors of the plan", found=f"{len(targets)} tensors",
                )  # fmt: skip
            if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype) and ours.dtype != ANY:
                raise RecipeError(
                    f"{self.recipe}: {name} is not what the plan made", expected=f"{ours.dtype} {list(ours.shape)}",
                    found=f"{theirs.dtype} {list(theirs.shape)}",
                )  # fmt: skip
        return replace(self, targets={name: targets[name] for name in self.targets})

    def inverse(self, base: Header | None = None) -> TensorPlan:
        """The plan from the targets back to the sources, derived step by step.

        It restores the sources exactly wherever this plan is exact. Undoing a widening cast counts as lossy, because
        only values that came through that cast survive it.

        Args:
            base: header of the original weights. What this plan dropped, rounded or folded is copied from there.

        Raises:
            RecipeError: something was dropped, rounded or folded, and only the original weights still have it.
        """
        lost = [(name, step) for step in self.steps if step.exactness != "exact" for name in step.sources]
        if lost and base is None:
            kinds: dict[str, list[str]] = {}
            for name, step in lost:
                does = "drops" if _drops(step) else "rounds" if step.exactness == "lossy" else "folds"
                kinds.setdefault(does, []).append(name)
            words = [
                f"{does} {names[0]}" if len(names) == 1 else f"{does} {len(names)} tensors, the first {names[0]}"
                for does, names in kinds.items()
            ]
            raise RecipeError(
                f"{self.recipe} cannot be undone: it {'; it '.join(words)}",
                expected="every element kept, or --base with the original weights",
                found=next((self.rules[step.rule].why for _, step in lost if _drops(step)), None),
                hint="name the original weights with --base",
            )  # fmt: skip
        steps, borrowed = [], dict[str, TensorInfo]()
        for step in self.steps:
            if base is not None and step.exactness != "exact":
                for name in step.sources:
                    borrowed[name + BASE] = taken = self._borrow(base, name)
                    steps.append(make_step(step.rule, [replace(taken, name=name + BASE)], (), [name], {}))
                continue
            sources = [replace(self.targets[output.name], name=output.name) for output in step.outputs]
            ops = [op.inverse() for op in reversed(step.ops)]
            steps.append(make_step(step.rule, sources, ops, step.sources, {}))
        used = {step.rule for step in self.steps}
        rules = tuple(rule.inverse() if index in used else rule for index, rule in enumerate(self.rules))
        made = {output.name: spec(output.dtype, output.shape, output.name) for step in steps for output in step.outputs}
        targets = {name: made[name] for name in self.sources}
        return replace(
            self, source_layout=self.target_layout, target_layout=self.source_layout,
            sources={**self.targets, **borrowed}, targets=targets, steps=tuple(steps), rules=rules,
            digest=digest_of(["inverse", self.digest]),
        )  # fmt: skip

    def cast(self, dtype: str, kept: Collection[str]) -> TensorPlan:
        """The same plan whose floating-point targets have the dtype code `dtype`, but for those `kept`.

        Raises:
            RecipeError: a target would be rounded twice.
        """
        steps = []
        for step in self.steps:
            olds = [(item.dtype, item.name) for item in step.outputs]
            added = cast_step(olds, dtype, [not castable(old) or name in kept for old, name in olds])
            infos = [replace(self.sources[name], name=name) for name in step.sources]
            names = [name for _, name in olds]
            steps.append(make_step(step.rule, infos, (*step.ops, added), names, {}) if added else step)
        made = {item.name: spec(item.dtype, item.shape, item.name) for step in steps for item in step.outputs}
        return replace(
            self, steps=tuple(steps), targets={name: made[name] for name in self.targets},
            digest=digest_of(["cast", self.digest, dtype, sorted(kept)]),
        )  # fmt: skip

    def _borrow(self, base: Header, name: str) -> TensorInfo:
        """A source tensor from the original weights, which must have it as this plan took it."""
        have, want = base.get(name), self.sources[name]
        if have is None or have.shape != want.shape or want.dtype not in (ANY, have.dtype):
            raise RecipeError(
                f"the base has no such {name}", expected=f"{want.dtype} {list(want.shape)}",
                found=f"{have.dtype} {list(have.shape)}" if have else "no tensor of this name",
                hint="name the original weights that the port was made from",
            )  # fmt: skip
        return have

    def module_map(self) -> list[ModulePair]:
        """Which rows of which target module's weights are which rows of which source module's; see `modulemap`."""
        return module_map(self)


def _drops(step: Step) -> bool:
    return any(isinstance(op, Drop) for op in step.ops)


def weakest(levels: Any) -> Exactness:
    """`needs-base` before `lossy` before `exact`."""
    found = set(levels)
    return "needs-base" if "needs-base" in found else "lossy" if "lossy" in found else "exact"


def digest_of(document: Any) -> str:
    """sha256 of a document's canonical JSON."""
    return hashlib.sha256(json.dumps(document, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def cast_step(outputs: Sequence[tuple[str, str]], dtype: str, kept: Sequence[bool]) -> Cast | None:
    """The cast that a dtype policy adds to a step's (dtype, name) outputs, or None where nothing changes."""
    wanted = tuple(old if keep else dtype for (old, _), keep in zip(outputs, kept, strict=True))
    return Cast(wanted) if wanted != tuple(old for old, _ in outputs) else None
