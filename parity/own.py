"""A user's case: both sides built, filled with the same weights, and compared as the catalogue's components are.

The reference is recorded first (here, or in a process of its own), and gone before the candidate is built.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from parity.align import Alignment
from parity.case import Candidate, Case
from parity.compare import GATE
from parity.component import ComponentResult, compare_component
from parity.drawn import draw
from parity.exact import rounded, tables
from parity.facts import environment
from parity.fingerprint import alignment as aligned
from parity.fingerprint import moved
from parity.layouts import Rearranged
from parity.outcome import Options, Outcome, reason_of
from parity.recorder import Exact, file_sha256, float64, seeded, told
from parity.reference import CaseError, record_reference, state_sha256
from parity.trace import Trace
from parity.truths import origin
from porter.core.checkpoint import spec
from porter.core.errors import BadInputError
from porter.core.execute import apply
from porter.core.family import resolve
from porter.core.port import code_sha256
from porter.core.recipe import Recipe, compile_recipe
from porter.core.userrecipe import read_recipes

State = dict[str, Tensor]


@dataclass(frozen=True)
class Conversion:
    """How the reference's state becomes the candidate's, and which modules follow from it."""

    state: Callable[[State], Mapping[str, Tensor]]
    alignment: Alignment
    dropped: tuple[str, ...] = ()


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
    made = filled(case, conversion, state, seed, result, exact_state(trace), own)
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
    result.notes += trace.meta.get("notes", [])
    for side, name in ((case.reference, "reference"), (case.candidate, "candidate")):
        result.notes += [] if side.halves else [f"casts of the {name} to half precision were left out"]
        result.notes += [] if side.asserts else [f"assertions of the {name} were left out"]
    if skipped := trace.meta.get("skipped"):
        result.notes.append(f"the case leaves out {len(skipped)} modules: {', '.join(skipped[:3])}")
    return result


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


def reference_state(case: Case, trace: Trace) -> State:
    """The reference's state again: from its file, or drawn as the trace says; never from the reference's memory."""
    kept = {name.removeprefix("state/"): tensor for name, tensor in trace.extra("state/").items()}
    if case.weights is not None:
        found = load_file(case.weights)
        return {n: t.float() if t.is_floating_point() else t for n, t in found.items()} | kept
    weights = trace.meta["weights"]
    drawn = {
        name: torch.from_numpy(draw(name, tuple(shape), weights["seed"]))
        for name, shape in weights["shapes"].items()
        if name not in kept
    }
    return drawn | kept


def exact_state(trace: Trace) -> State:
    """What of the reference's state is known more exactly than in float32: the tables that it computes."""
    return {name.removeprefix("exact/"): tensor for name, tensor in trace.extra("exact/").items()}


def conversion_of(case: Case, state: State, leaves: Collection[str] = ()) -> Conversion:
    """A case's conversion, from a recipe, a function, or nothing (the same names).

    Raises:
        BadInputError: it is none of these, or does not take this state.
    """
    recipe = recipe_of(case)
    if recipe is not None:
        header = {name: spec("F32", tuple(t.shape), name) for name, t in state.items() if t.is_floating_point()}
        plan = compile_recipe(recipe, dict(case.config), header)
        alignment = Alignment.of_plan(plan)
        alignment.parts |= aligned([], case.modules).parts
        return Conversion(lambda own: apply(plan, {n: own[n] for n in plan.sources}), alignment)
    function = case.convert or (lambda same: same)
    if not callable(function):
        raise BadInputError(
            "the case's `convert` is neither a function nor a recipe", found=type(function).__name__,
            expected="a function (state -> state), a Recipe, or the name of a recipe's file",
        )  # fmt: skip
    found = moved(state, function)
    arrived = {move.source for move in found}
    dropped = tuple(n for n, t in state.items() if t.is_floating_point() and n not in arrived)
    return Conversion(lambda own: function(dict(own)), aligned(found, case.modules, leaves), dropped)


def recipe_of(case: Case) -> Recipe | None:
    """The recipe that a case's `convert` is or names; None where it is a function, or nothing."""
    if isinstance(case.convert, Recipe):
        return case.convert
    if not isinstance(case.convert, str):
        return None
    file, _, name = case.convert.partition(".py")
    if file != case.convert:
        recipes = read_recipes(Path(file + ".py"), name.removeprefix(":") or case.name)
        return recipes.get(name.removeprefix(":")) or next(iter(recipes.values()))
    found = resolve(case.convert)
    if not isinstance(found, Recipe):
        raise BadInputError(f"{case.convert} is no recipe", found=type(found).__name__, expected="a Recipe")
    return found


def filled(
    case: Case,
    conversion: Conversion,
    state: State,
    seed: int,
    result: ComponentResult,
    exact: State,
    own: Mapping[str, Tensor] | None = None,
) -> tuple[nn.Module, Exact] | None:
    """The candidate with the converted weights in it, and what float32 rounded of them and of its own tables.

    None, with the result's reason, where they do not fit.

    Args:
        exact: what of the state is known more exactly.
        own: see `compare_case`.
    """
    seeded(seed)
    try:
        module = case.candidate.module(case.config).float().eval()
    except (Exception, SystemExit) as error:
        result.reason = f"the candidate does not build: {told(error)}"
        return None
    result.candidate = case.candidate.name or type(module).__qualname__
    known = tables(module, lambda: case.candidate.module(case.config), seed, result.notes)
    try:
        converted = {n: t for n, t in conversion.state(dict(state)).items() if isinstance(t, Tensor)}
        missing, extra = module.load_state_dict(converted if own is None else own, strict=False)
    except RuntimeError as error:
        result.reason = f"the converted weights do not fit the candidate: {str(error).splitlines()[-1].strip()}"
        return None
    kept = re.compile(case.keep) if case.keep else None
    missing = [n for n in missing if not (kept and kept.fullmatch(n))]
    if missing or extra:
        words = [
            f"{len(names)} {what}: {', '.join(names[:3])}"
            for what, names in (("missing", missing), ("left over", extra))
            if names
        ]
        words += ["what its class fills itself is named by `keep`"] if missing else []
        result.reason = f"the converted weights are not the candidate's: {'; '.join(words)}"
        return None
    if conversion.dropped:
        result.warnings.append(
            f"the conversion drops {len(conversion.dropped)} tensors: {', '.join(conversion.dropped[:3])}"
        )
    try:
        with float64():
            wide = {n: exact.get(n, t).double() if t.is_floating_point() else t for n, t in state.items()}
            made = conversion.state(wide)
        known |= rounded(converted, made)
    except Exception as error:  # then a conversion that computes leaves its rounding in the comparison
        result.notes.append(f"the conversion does not run in float64 ({told(error)})")
    return module, known


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
