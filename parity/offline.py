"""Two traces compared without running anything: what one side recorded, against what the other did.

Modules are matched by their names, or as a case's conversion moves weights. Both must be traces of the same weights and
inputs; whatever one lacks is not compared, and so no pass.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from parity.align import Alignment, Place, read
from parity.arbiter import cast_disagreement
from parity.capture import Capture
from parity.case import Candidate, Case
from parity.compare import GATE, Verdict, judge, skipped
from parity.component import ComponentResult, effects
from parity.layouts import Rearranged
from parity.locate import Tap, locate
from parity.recorder import file_sha256, sample_indices
from parity.trace import Trace, Value, split_key
from porter.core.errors import CheckpointError


def compare_traces(
    a: Trace, b: Trace, *, case: Case | None = None, weights: Path | None = None, gate: float = GATE
) -> ComponentResult:
    """Compare trace `b`, the candidate, with trace `a`, the reference.

    Args:
        case: whose conversion says which module of `a` answers to which of `b`, and how layouts differ.
        weights: the file that `b` was recorded with, where the case converts them; it must hold what that gives.

    Raises:
        BadInputError: the case's conversion does not take the reference's state.
        CheckpointError: `weights` cannot be read.
    """
    names = [str(_meta(trace, "reference", "name") or "an unnamed module") for trace in (a, b)]
    result = ComponentResult(str(a.meta.get("component") or "model"), "trace", names[1], names[0])
    alignment, result.reason = _aligned(a, b, case, weights)
    if result.reason:
        return result
    blocks, layout = (case.blocks, Rearranged(a, case.layout)) if case else ((), Candidate.layout)
    candidate = Candidate(names[1], lambda folder: torch.nn.Module(), {}, blocks, layout)
    pairs = {path: ours for name in a.passes for path in a.modules(name) if (ours := alignment.counterpart(path))}
    casts = cast_disagreement(a.casts, b.casts, {**pairs, "": ""})
    double = all(trace.meta.get("float64", True) for trace in (a, b))
    single = None if double else (case.baseline if case and case.baseline is not None else math.nan)
    for name in a.passes:
        if name not in b.passes:
            result.outputs.append(skipped(name, "the candidate's trace has no such pass"))
            continue
        if other := _other_inputs(a, b, name):
            result.reason = f"{name}: {other}"
            return result
        runs = _captures(b, name)
        taps, outputs = [], []
        positions: dict[tuple[str, str], int] = {}
        for key in a.events:
            where, kind, _ = split_key(key)
            if not key.startswith(f"{name}/") or (where == f"{name}/=" and kind == "in"):
                continue
            at = positions[where, kind] = positions.get((where, kind), -1) + 1
            place = Place.of(a, key, at)
            given = casts.get("" if place.module == "=" else place.module, "")
            verdict = _verdict(a, b, key, place, runs, alignment, candidate, case is None, gate, given, single)
            if place.module == "=":
                outputs.append(verdict)
            else:
                taps.append(Tap(key, place.module, kind, verdict))
        step = (case.steps if case else {}).get(name, "the steps after its last module")
        result.guilty = result.guilty or locate(a, name, taps, outputs, alignment, candidate, runs[1], step)
        result.taps += taps
        result.outputs += outputs
    result.outputs += effects(a)
    result.notes += [text for trace in (a, b) for text in trace.meta.get("notes", [])]
    result.unused = list(b.meta.get("idle", ()))
    if case is None:
        known = {path for name in a.passes for path in a.modules(name)}
        result.unwatched = [p for n in b.passes for p in b.modules(n) if p not in known]
    if not result.reason and result.counts["compared"] == 0:
        result.reason = "the two traces have nothing in common"
    return result


def _meta(trace: Trace, *path: str) -> object:
    """A value inside a trace's metadata, None where there is none; the file may hold anything."""
    found: object = trace.meta
    for name in path:
        found = found.get(name) if isinstance(found, dict) else None
    return found


def _aligned(a: Trace, b: Trace, case: Case | None, weights: Path | None) -> tuple[Alignment, str]:
    """Which modules answer to each other, and why the traces cannot be compared."""
    from parity.candidate import conversion_of, reference_state
    from parity.state import state_sha256

    hashes = [_meta(trace, "source", "sha256") for trace in (a, b)]
    short = " and ".join(str(h)[:12] for h in hashes)
    if not all(isinstance(h, str) and h for h in hashes):
        return Alignment({}), "a trace does not say which weights it is of"
    if case is None:
        if hashes[0] != hashes[1]:
            return Alignment({}), f"the traces are of other weights (sha256 {short}); --case names a conversion"
        return Alignment.identity([path for name in a.passes for path in a.modules(name)]), ""
    try:
        state = reference_state(case, a)
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            "the first trace is not one of a case's reference", found=f"no {error} in it",
            hint="porter parity record CASE -o a.safetensors",
        ) from error  # fmt: skip
    if state_sha256(state) != hashes[0]:
        return Alignment({}), "the first trace is of other weights than the case's"
    conversion = conversion_of(case, state)
    converted = {n: t for n, t in conversion.state(dict(state)).items() if isinstance(t, Tensor)}
    if hashes[1] not in (hashes[0], state_sha256(converted)):
        if weights is None:
            why = "it is unknown whether the second trace's weights are the first's, converted; --weights FILE shows it"
            return conversion.alignment, why
        try:
            found = load_file(weights)
        except Exception as error:  # safetensors raises its own, OSError and more
            raise CheckpointError(f"{weights} is no weights file", found=str(error)) from error
        if file_sha256(weights) != hashes[1]:
            return conversion.alignment, f"the second trace was not recorded with {weights.name} (sha256 differs)"
        wrong = [n for n, t in converted.items() if n not in found or not torch.equal(found[n].to(t.dtype), t)]
        if wrong:
            return conversion.alignment, f"{weights.name} is not the reference's weights, converted: {wrong[0]} differs"
    return conversion.alignment, ""


def _other_inputs(a: Trace, b: Trace, name: str) -> str:
    """What differs between both traces' inputs of a pass."""
    ours, theirs = a.inputs(name), b.inputs(name)
    if ours.keys() != theirs.keys():
        listed = [", ".join(sorted(side)) or "none" for side in (ours, theirs)]
        return f"one trace has the inputs {listed[0]}, the other {listed[1]}"
    other = [k for k in ours if ours[k].shape != theirs[k].shape or not torch.equal(ours[k], theirs[k])]
    return f"the traces were recorded with other inputs: {', '.join(other)}" if other else ""


def _captures(trace: Trace, name: str) -> tuple[Capture, Capture]:
    """What a trace holds in full of a pass, as if it had just run: in float32, and in float64."""
    low, high = Capture(), Capture()
    for key in trace.events:
        value = trace.value(key)
        if key.startswith(f"{name}/") and value.complete:
            short = key.partition("/")[2]
            low.tensors[short], high.tensors[short] = value.tensor(False), value.tensor(True)
    paths = [path.split(".") for path in trace.modules(name)]
    low.ran = high.ran = {".".join(parts[:n]) for parts in paths for n in range(1, len(parts) + 1)}
    return low, high


def _verdict(
    a: Trace, b: Trace, key: str, place: Place, runs: tuple[Capture, Capture], alignment: Alignment,
    candidate: Candidate, alike: bool, gate: float, casts: str, single: float | None,
) -> Verdict:  # fmt: skip
    """One event of `a`, against the same event of `b`, or against what the alignment says answers to it."""
    what, value = key.partition("/")[2] if place.module != "=" else key.partition("/")[0], a.value(key)
    if alike:
        if key not in b.events:
            return skipped(what, "the candidate's trace has nothing of it")
        found = _sampled(b.value(key), value)
    else:
        whole = [read(run, alignment, candidate, place, value.event.shape) for run in runs]
        if isinstance(whole[0], str) or isinstance(whole[1], str):
            reason = whole[0] if isinstance(whole[0], str) else whole[1]
            return skipped(what, f"{reason}, or its trace has samples of it only")
        index = sample_indices(whole[0].numel(), value.event.elements)
        found = whole[0].reshape(-1)[index], whole[1].reshape(-1)[index]
    if isinstance(found, str):
        return skipped(what, found)
    index = sample_indices(math.prod(value.event.shape), value.event.elements)
    return judge(what, value, *found, gate=gate, casts=casts, positions=index, single=single)


def _sampled(mine: Value, theirs: Value) -> tuple[Tensor, Tensor] | str:
    """This value's elements at the other's positions, or why there are none."""
    if mine.event.shape != theirs.event.shape:
        return f"shape {tuple(mine.event.shape)}, reference {tuple(theirs.event.shape)}"
    if mine.event.elements == theirs.event.elements:
        return mine.low, mine.high
    if mine.complete:
        index = sample_indices(mine.low.numel(), theirs.event.elements)
        return mine.low[index], mine.high[index]
    return f"the candidate's trace holds {mine.event.elements} elements of it, the reference's {theirs.event.elements}"
