"""Two implementations of a model that does not fit into memory, compared block after block.

Both sides of a case are built without weights, which come, tensor by tensor, when a block runs and go when it is done:
drawn from names and a seed, or read from the case's file. Activations go to disk. `parity.passes` says what runs when.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from parity.align import Alignment
from parity.blockwise import Maps, Side
from parity.candidate import plan_of
from parity.case import Candidate, Case
from parity.case import Side as Declared
from parity.compare import GATE, skipped
from parity.component import ComponentResult
from parity.hollow import Jobs, Streamed, hollow
from parity.loading import CaseError, inputs_of
from parity.locate import Guilty, Tap
from parity.ondemand import Converted, Source, source_of, straight
from parity.passes import Pass
from parity.preflight import differing_settings
from parity.recorder import attributes, seeded
from parity.reference import blocks_of, leaves_and_parents
from parity.shelf import Shelf, spool
from parity.trace import split_key
from porter.core.checkpoint import spec
from porter.core.errors import BadInputError, RecipeError, ResourceError

Shapes = dict[str, tuple[int, ...]]


@dataclass
class Scaled:
    """A comparison block after block: its verdicts, and what it took."""

    result: ComponentResult
    figures: dict[str, Any]


def compare_scaled(
    case: Case, folder: Path, *, seed: int = 0, gate: float = GATE, say: Callable[[str], None] = lambda text: None,
    edit: Callable[[nn.Module], object] | None = None,
) -> Scaled:  # fmt: skip
    """Compare a case's candidate with its reference, in the memory of two blocks.

    Args:
        folder: activations are kept in a folder inside it, which is removed at the end; so are those of runs that were
            killed.
        say: told what was done.
        edit: changes the candidate, which has no weights yet, for planted faults.

    Raises:
        BadInputError: the case cannot be compared block after block, or its reference does not run.
        ResourceError: the disk is full, or `folder` cannot be written.
        BusyError: another process compares in `folder`.
    """
    reference = _built(case.reference, case, seed, "reference")
    shapes = _floats(reference, case.keep)
    source = source_of(case.weights, shapes, seed, case.keep)
    candidate = _built(case.candidate, case, seed, "candidate")
    if edit:
        edit(candidate)
    jobs, alignment, own = _conversion(case, reference, shapes, candidate, source)
    pairs = _pairs(case, reference, candidate, alignment)
    name = case.candidate.name or type(candidate).__qualname__
    result = ComponentResult(
        case.name, "reference", name, case.reference.name or f"{type(reference).__module__}:{type(reference).__name__}"
    )
    maps = Maps(Candidate(name, lambda at: candidate, case.candidate.passes, case.blocks, case.layout), alignment)
    theirs = Streamed(reference, list(pairs.values()), shapes, straight(source))
    ours = Streamed(candidate, list(pairs), own, jobs)
    leaves = [p for p in leaves_and_parents(reference)[0] if p in alignment.parts]
    outside = [p for p in leaves if not any(p == b or p.startswith(f"{b}.") for b in pairs.values())]
    matched = sorted({part.candidate for path in outside for part in alignment.parts[path]})
    passes: dict[str, Pass] = {}
    with spool(folder) as own_folder:
        shelf = Shelf(own_folder)
        for what, inputs in _inputs(case, seed).items():
            calls = (case.reference.passes[what], case.candidate.passes[what])
            sides = Side(theirs, calls[0], outside, shelf, seed), Side(ours, calls[1], matched, shelf, seed)
            run = passes[what] = Pass(*sides, maps, pairs, inputs, gate, say)
            try:
                run.record()
            except ResourceError:
                raise
            except Exception as error:  # whatever a project's code raises
                raise BadInputError(f"the reference does not run: {type(error).__name__}: {error}") from error
            if result.reason:
                continue
            try:
                run.compare()
            except ResourceError:
                raise
            except Exception as error:
                result.reason = f"{what}: the candidate did not run: {type(error).__name__}: {error}"
    for what, run in passes.items() if not result.reason else ():
        _fill(result, what, run, case)
    settings = differing_settings(attributes(reference), candidate, alignment)
    result.guilty = result.guilty and result.guilty.because(settings)
    result.notes += [f"{path}: {text}" for path, text in settings.items()]
    ran = {path for run in passes.values() for path in run.candidate.ran}
    called = {at.partition("#")[0] for run in passes.values() for at in run.calls}
    result.unwatched = [path for path in pairs.values() if path not in called]
    result.unused = [p for p, m in candidate.named_modules() if m._parameters and p not in ran]
    return Scaled(result, _figures(passes, shapes, theirs, ours, shelf))


def _fill(result: ComponentResult, what: str, run: Pass, case: Case) -> None:
    """The verdicts of a pass in order of execution, and the first module that fails."""
    for key in run.recorded:
        where, kind, _ = split_key(f"{what}/{key}")
        path = where.partition("/")[2].partition("#")[0]
        if path == "=":
            result.outputs += [run.docket.free[key], *([run.docket.exact[key]] if key in run.docket.exact else [])]
        elif path in run.blocks.values():
            absent = skipped(key, "the candidate's block never ran")
            result.taps.append(
                Tap(f"{what}/{key}", path, kind, run.docket.free.get(key, absent), run.docket.reset.get(key, absent))
            )
        elif key in run.docket.exact:
            result.taps.append(Tap(f"{what}/{key}", path, kind, run.docket.exact[key]))
    failing = [tap for tap in result.taps if not (tap.reset or tap.free).passed]
    label = run.maps.alignment.label
    if failing and result.guilty is None:
        first = failing[0]
        verdict = first.reset or first.free
        ours = label(first.module).partition(" ↔ ")[0]
        place = ours if first.kind == "out" else f"the step before {ours}"
        numbers = {"max|Δ|": verdict.max_abs, "in float64": verdict.max_abs64, "floor": verdict.floor}
        size = ", ".join(f"{what} {number:.1e}" for what, number in numbers.items() if math.isfinite(number))
        why = f"its inputs are the reference's, its output is not: {size}" if first.kind == "out" else size
        why = why if size else verdict.note
        others = dict.fromkeys(label(t.module) for t in failing if t.module != first.module)
        rule = run.maps.alignment.rule(first.module) if first.kind == "out" else ""
        result.guilty = Guilty(place, first.module, rule, why, "", tuple(others), code=first.kind == "out")
    elif any(not v.passed for v in result.outputs) and result.guilty is None:
        step = case.steps.get(what, "the steps after its last module")
        result.guilty = Guilty(step, f"{what}(…)", "", f"every block of {what} matches, its output does not")
    floors = ", ".join(f"{kind} {floor:.1e}" for kind, floor in run.docket.floors.items())
    result.notes.append(
        f"{what}: float64 on {len(run.alone)} of {len(run.calls)} blocks, {', '.join(run.alone)}; nothing in the "
        f"others differs more than in the worst of them (floors, scaled: {floors})"
    )
    result.notes += [
        f"{what}: {at} hands on the candidate's own answer: {why}" for at, why in run.docket.unhanded.items()
    ]
    result.notes += [f"{what}: {path} is not compared by itself: {why}" for path, why in run.docket.unread.items()]


def _built(side: Declared, case: Case, seed: int, role: str) -> nn.Module:
    """A side without its weights, float32, for inference."""
    seeded(seed)
    try:
        with hollow():
            module = side.build(dict(case.config))
        return module.float().eval()
    except Exception as error:
        raise BadInputError(f"the {role} does not build: {type(error).__name__}: {error}") from error


def _floats(module: nn.Module, keep: str) -> Shapes:
    """The state that is filled: floating point, and not what the class computes."""
    kept = re.compile(keep) if keep else None
    shapes: Shapes = {}
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not (kept and kept.fullmatch(name)):
            shapes[name] = tuple(tensor.shape)
        elif tensor.is_meta:  # a parameter, and those are built without memory
            raise BadInputError(
                f"{name} is to stay as {type(module).__name__} computes it, and is a parameter",
                expected="a buffer, or a floating-point parameter that is filled", hint="leave it out of `keep`",
            )  # fmt: skip
    return shapes


def _conversion(
    case: Case, reference: nn.Module, shapes: Shapes, candidate: nn.Module, source: Source
) -> tuple[Jobs, Alignment, Shapes]:
    """What makes the candidate's weights, which module answers to which, and the candidate's shapes."""
    own = _floats(candidate, case.keep)
    plan = plan_of(case, {name: spec("F32", shape, name) for name, shape in shapes.items()})
    if plan is None and case.convert is not None:
        raise BadInputError(
            "a function converts whole states, which do not fit into memory", expected="a recipe, or the same names",
            hint="docs/parity.md, A model larger than memory",
        )  # fmt: skip
    made, alignment = shapes, Alignment.identity(leaves_and_parents(reference)[0])
    jobs: Jobs = straight(source)
    if plan is not None:
        made = {name: info.shape for name, info in plan.targets.items()}
        jobs, alignment = Converted(plan, source), Alignment.of_plan(plan)
    odd = sorted(n for n in made.keys() | own.keys() if made.get(n) != own.get(n))
    if odd:
        raise RecipeError(
            f"the converted weights do not fill the candidate, beginning with {odd[0]}",
            expected=f"{odd[0]}: {own.get(odd[0], 'no such tensor')}", found=str(made.get(odd[0], "no such tensor")),
        )  # fmt: skip
    return jobs, alignment, own


def _pairs(case: Case, reference: nn.Module, candidate: nn.Module, alignment: Alignment) -> dict[str, str]:
    """Candidate block -> reference block, for the outermost blocks that have weights."""
    declared = [p for p, _ in reference.named_modules() if any(b.matches(p) for b in case.blocks)]
    skip = re.compile(case.skip) if case.skip else None
    found = [p for p in dict.fromkeys([*declared, *blocks_of(reference)]) if alignment.leaves(p)]
    found = [p for p in found if not (skip and skip.fullmatch(p))]
    found = [p for p in found if not any(p.startswith(f"{q}.") for q in found)]
    pairs = {alignment.counterpart(p) or "": p for p in found}
    known = {p for p, _ in candidate.named_modules() if p}
    nested = any(p != q and p.startswith(f"{q}.") for p in pairs for q in pairs)
    if not found or len(pairs) < len(found) or not pairs.keys() <= known or nested:
        raise BadInputError(
            "the blocks of both sides do not answer to each other one by one",
            expected="entries of module lists, or Blocks of the case, each with a module of the candidate",
            found=", ".join(f"{theirs} ↔ {ours or '?'}" for ours, theirs in list(pairs.items())[:4]) or "no blocks",
        )  # fmt: skip
    return pairs


def _inputs(case: Case, seed: int) -> dict[str, dict[str, Any]]:
    try:
        found = inputs_of(case, seed)
    except CaseError as error:
        raise BadInputError(str(error)) from error
    if lacking := [w for w in found if w not in case.reference.passes or w not in case.candidate.passes]:
        raise BadInputError(f"a side has no call for the pass {lacking[0]!r}", found=", ".join(case.reference.passes))
    return found


def _figures(
    passes: Mapping[str, Pass], shapes: Shapes, theirs: Streamed, ours: Streamed, shelf: Shelf
) -> dict[str, Any]:
    """What it took."""
    return {
        "parameters": sum(math.prod(shape) for shape in shapes.values()),
        "blocks": {what: len(run.calls) for what, run in passes.items()},
        "float64": {what: run.alone for what, run in passes.items()},
        "floors": {what: run.docket.floors for what, run in passes.items()},
        "seconds": {what: run.seconds for what, run in passes.items()},
        "weights at once, bytes": max(theirs.most, ours.most),
        "weights made, bytes": theirs.drawn + ours.drawn,
        "activations on disk, bytes": shelf.bytes,
    }
