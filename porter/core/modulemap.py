"""Which module of one side holds the weights of which module of the other, read off a compiled plan.

Nothing is guessed by order or by name: a pair exists because the plan moves rows of weights from one to the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from porter.core.tensorplan import TensorPlan


@dataclass(frozen=True)
class ModulePair:
    """Rows `target_rows` of the target module's weights are rows `source_rows` of the source module's; None is all."""

    source: str
    target: str
    source_rows: tuple[int, int] | None
    target_rows: tuple[int, int] | None
    rule: str


def module_map(plan: TensorPlan) -> list[ModulePair]:
    """Which rows of which target module's weights are which rows of which source module's.

    A module is a tensor's name without its last part; its rows are counted along dim 0 of its largest tensor.
    Sources and targets that trade whole tensors have one pair with both rows None.
    """
    chosen: dict[tuple[str, str], tuple[int, list[ModulePair]]] = {}
    for step, output in plan.outputs():
        pairs: dict[tuple[str, str], list[ModulePair]] = {}
        rule, row = plan.rules[step.rule].label, _row(output.shape)
        whole = len(step.sources) == 1 and len(output.runs) == 1
        position = 0
        if step.computed or any(not run.plain for run in output.runs):
            # New numbers, or a transposition: every row takes part.
            for source in dict.fromkeys(step.sources):
                key = (source.rpartition(".")[0], output.name.rpartition(".")[0])
                pairs[key] = [ModulePair(*key, None, None, rule)]
        for run in () if pairs else output.runs:
            length, source = run.length, step.sources[run.source]
            source_row = _row(plan.sources[source].shape)
            key = (source.rpartition(".")[0], output.name.rpartition(".")[0])
            if whole and length == plan.sources[source].numel:
                pairs.setdefault(key, []).append(ModulePair(*key, None, None, rule))
            elif run.begin % source_row or run.end % source_row or position % row:
                # Cut along another dim: every row takes part.
                pairs[key] = [ModulePair(*key, None, None, rule)]
                break
            else:
                ours = (run.begin // source_row, run.end // source_row)
                theirs = (position // row, (position + length) // row)
                pairs.setdefault(key, []).append(ModulePair(*key, ours, theirs, rule))
            position += length
        # A module's weight speaks before its bias: an op forgotten on one of them must not hide behind the other.
        for key, found in pairs.items():
            if key not in chosen or len(output.shape) > chosen[key][0]:
                chosen[key] = (len(output.shape), found)
    return [pair for _, found in chosen.values() for pair in found]


def _row(shape: tuple[int, ...]) -> int:
    """Elements of one row: of all dims but the first."""
    size = 1
    for dim in shape[1:]:
        size *= dim
    return max(size, 1)
