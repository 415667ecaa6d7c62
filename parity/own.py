"""A user's case: both sides built, filled with the same weights, and compared as the catalogue's components are.

The reference is recorded first (here, or in a process of its own), and gone before the candidate is built.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from parity.candidate import conversion_of, filled, reference_state
from parity.case import Candidate, Case
from parity.compare import GATE
from parity.component import ComponentResult, compare_component
from parity.facts import environment
from parity.layouts import Rearranged
from parity.loading import CaseError
from parity.outcome import Options, Outcome, reason_of
from parity.recorder import file_sha256
from parity.reference import record_reference
from parity.state import state_sha256
from parity.trace import Trace
from parity.truths import origin
from porter.core.errors import BadInputError
from porter.core.port import code_sha256


def compare_case(
    case: Case, *, seed: int = 0, gate: float = GATE, level: str = "module", trace: Trace | None = None,
    edit: Callable[[nn.Module], object] | None = None, dtype: str = "float32", device: str = "cpu",
    own: Mapping[str, Tensor] | None = None, inside: Callable[[str], Trace] | None = None,
) -> ComponentResult:  # fmt: skip
    """Compare a case's candidate with its reference.

    Args:
        trace: the reference's, where it was recorded elsewhere; by default it runs here.
        edit: changes the candidate after it was filled, for planted faults.
        level, dtype, device: see `compare_component`; at `block` the inside of blocks that differ is recorded too.
        inside: records what lies in one block of the reference; by default here.
        own: the candidate's weights, where they are not made by the case's conversion but come from a port.

    Raises:
        BadInputError: the case cannot be used: its reference does not run, its conversion does not take the state.
    """
    if level == "block":
        return _blocks_first(
            case, trace or recorded(case, seed, level, dtype),
            inside or (lambda block: recorded(case, seed, "module", dtype, block)),
            seed=seed, gate=gate, edit=edit, dtype=dtype, device=device, own=own,
        )  # fmt: skip
    trace = trace or recorded(case, seed, level, dtype)
    gc.collect()
    result = ComponentResult(case.name, "reference", case.candidate.name or "candidate", origin(trace))
    state = reference_state(case, trace)
    if state_sha256(state) != trace.meta["source"]["sha256"]:
        result.reason = "the trace is of other weights than this case's: record it again"
        return result
    conversion = conversion_of(case, state, trace.meta.get("leaves", ()))
    made = filled(case, conversion, state, seed, result, trace, own)
    if made is None:
        return result
    module, exact = made
    if edit:
        edit(module)
    candidate = Candidate(
        result.candidate, lambda folder: module, case.candidate.passes, case.blocks,
        Rearranged(trace, case.layout),
    )  # fmt: skip
    compare_component(
        module, candidate, trace, conversion.alignment, result, gate=gate, step_names=case.steps,
        baseline=case.baseline, level=level, dtype="" if dtype == "float32" else dtype, device=device,
        exact=exact,
    )  # fmt: skip
    if level == "module" and not result.taps and not result.reason:
        result.reason = "no module was compared: the case leaves all of them out, or nothing aligns them"
    result.warnings += _idle_patterns(case, trace, module)
    result.notes += trace.meta.get("notes", [])
    for side, name in ((case.reference, "reference"), (case.candidate, "candidate")):
        result.notes += [] if side.halves else [f"casts of the {name} to half precision were left out"]
        result.notes += [] if side.asserts else [f"assertions of the {name} were left out"]
    if skipped := trace.meta.get("skipped"):
        result.notes.append(f"the case leaves out {len(skipped)} modules: {', '.join(skipped[:3])}")
    return result


def _idle_patterns(case: Case, trace: Trace, module: nn.Module) -> list[str]:
    """A warning for each `skip` or `keep` that names nothing on any side."""
    meta = trace.meta
    both = {*module.state_dict(), *(path for path, _ in module.named_modules())}
    names = {
        "skip": {*both, *meta.get("leaves", ()), *meta.get("parents", ()), *meta.get("plain", ())},
        "keep": {*both, *reference_state(case, trace)},
    }
    return [
        f"`{which}` matches nothing: {pattern!r}"
        for which, pattern in (("skip", case.skip), ("keep", case.keep))
        if pattern and not any(re.fullmatch(pattern, name) for name in names[which])
    ]


def _blocks_first(case: Case, trace: Trace, inside: Callable[[str], Trace], **how: Any) -> ComponentResult:
    """Blocks, then the inside of those that differ or are cut differently, up to the first that has a fault."""
    result = compare_case(case, trace=trace, level="outline", **how)
    if result.passed or result.reason:
        return result
    open_blocks = dict.fromkeys(tap.module for tap in result.taps if not tap.free.passed)
    found = None
    for block in open_blocks:
        found = compare_case(case, trace=inside(block), **how)
        if found.faults or found.reason:
            break
    if found is None:
        return result
    names = ", ".join(list(open_blocks)[:3])
    found.notes.append(f"{len(open_blocks)} blocks differ or are cut differently on the two sides: {names}")
    return found


def run_case(
    case: Case, options: Options, trace: Trace | None = None, case_file: Path | None = None,
    own: Mapping[str, Tensor] | None = None, inside: Callable[[str], Trace] | None = None,
) -> Outcome:  # fmt: skip
    """A case compared as `porter parity` does it -> its Outcome, ready for a report.

    Raises:
        BadInputError: see `compare_case`.
    """
    level = options.level or "module"
    trace = trace or recorded(case, options.seed, level, options.dtype)
    result = compare_case(
        case, seed=options.seed, gate=options.gate, level=level, trace=trace, dtype=options.dtype,
        device=options.device, own=own, inside=inside,
    )  # fmt: skip
    facts = {
        "weights": {case.name: {trace.meta["source"]["file"]: trace.meta["source"]["sha256"]}},
        "recipes": {},
        "traces": {
            case.name: {k: trace.meta.get(k) for k in ("reference", "source", "command", "seed", "torch", "shims")}
        },
        "case": {"file": case_file.name, "sha256": file_sha256(case_file)} if case_file else None,
        "code": {"parity": code_sha256("parity")},
        "environment": environment(),
    }
    return Outcome(None, case.name, options, components=[result], facts=facts)


def recorded(case: Case, seed: int, level: str, dtype: str = "float32", inside: str = "") -> Trace:
    """The reference's trace, recorded in this process.

    Raises:
        BadInputError: the case cannot be used.
    """
    try:
        return Trace.of(record_reference(case, seed, level, dtype=dtype, inside=inside))
    except CaseError as error:
        raise BadInputError(str(error), hint="docs/parity.md, A case of your own") from error


def verdict_text(result: ComponentResult) -> str:
    """What a failing test says."""
    lines = [
        f"{result.component}: {result.status}: {reason_of(result)}",
        *(f"  {fault}" for fault in result.faults[:10]),
    ]
    return "\n".join(lines)


def assert_parity(case: Case, *, seed: int = 0, gate: float = GATE, level: str = "module") -> ComponentResult:
    """Fail a test unless the candidate computes what the reference computes -> the comparison.

    Raises:
        AssertionError: what differs, where and by how much.
    """
    result = compare_case(case, seed=seed, gate=gate, level=level)
    if not result.passed:
        raise AssertionError(verdict_text(result))
    return result
