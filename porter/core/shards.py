"""Which part of each target tensor a tensor-parallel rank holds, read off a compiled plan and its rules' `Shard`.

A tensor that was packed of several is shared part by part: rank r holds [q_r; k_r; v_r], not a stretch of [q; k; v].
"""

from __future__ import annotations

from dataclasses import dataclass

from porter.core.errors import RecipeError, UsageError
from porter.core.ops import Cast, Concat
from porter.core.patterns import evaluate
from porter.core.recipe import Shard
from porter.core.tensorplan import Output, Step, TensorPlan


@dataclass(frozen=True)
class Cut:
    """The part of one tensor that a rank holds: along `dim`, these ranges one after the other."""

    dim: int
    ranges: tuple[tuple[int, int], ...]


def shard_of(plan: TensorPlan, step: Step, output: Output) -> Shard | None:
    """How ranks share a target; None where each has it whole, as the bias of a layer whose inputs are shared."""
    shard: Shard | None = plan.rules[step.rule].shard
    return None if shard is None or shard.dim >= len(output.shape) else shard


def cut(plan: TensorPlan, step: Step, output: Output, rank: int, ranks: int) -> Cut | None:
    """What `rank` of `ranks` holds of a target; None: all of it.

    Raises:
        UsageError: the ranks cannot share it evenly.
        RecipeError: the rule's parts do not fill the tensor.
    """
    shard = shard_of(plan, step, output)
    if shard is None:
        return None
    ranges, start = [], 0
    for size in _parts(plan, step, output, shard):
        if size % ranks:
            raise UsageError(
                f"{ranks} ranks cannot share {output.name}", expected=f"a multiple of {ranks} along dim {shard.dim}",
                found=f"{size} of shape {list(output.shape)}", hint="choose a --tp that divides it",
            )  # fmt: skip
        share = size // ranks
        ranges.append((start + rank * share, start + (rank + 1) * share))
        start += size
    return Cut(shard.dim, tuple(ranges))


def stored(plan: TensorPlan, step: Step, held: Cut) -> list[tuple[str, int, int]] | None:
    """Where a rank's part stands in the sources, as (name, begin, end) along the cut's dim, in order; None: only the
    step's ops can tell, on whole tensors."""
    joins = len(step.ops) == 1 and isinstance(step.ops[0], Concat) and step.ops[0].dim == held.dim
    if step.ops and not joins:
        return None
    found, start = [], 0
    for name in step.sources:
        size = plan.sources[name].shape[held.dim]
        for begin, end in held.ranges:
            first, last = max(begin, start) - start, min(end, start + size) - start
            if first < last:
                found.append((name, first, last))
        start += size
    return found


def _parts(plan: TensorPlan, step: Step, output: Output, shard: Shard) -> list[int]:
    """Sizes along the shared dim of the parts that are shared each by itself."""
    whole = output.shape[shard.dim]
    sizes = [evaluate(size, plan.parameters) for size in shard.parts]
    for op in step.ops if not sizes else ():
        if isinstance(op, Concat) and op.dim == shard.dim:
            sizes = [evaluate(size, {}) for size in op.sizes]
        elif not isinstance(op, Cast):  # the elements lie in another order from here on
            sizes = []
    sizes = sizes or [whole]
    if sum(sizes) != whole or min(sizes) <= 0:
        raise RecipeError(
            f"{plan.recipe}: the parts of {output.name} do not fill it", expected=f"{whole} along dim {shard.dim}",
            found=f"{' + '.join(map(str, sizes))} = {sum(sizes)}", hint="correct the rule's Shard",
        )  # fmt: skip
    return sizes
