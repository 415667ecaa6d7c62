"""The candidate's side of a case: its module, and how the reference's weights come into it."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from parity import stubs
from parity.align import Alignment
from parity.case import Case
from parity.casename import split_case
from parity.component import ComponentResult
from parity.drawn import draw
from parity.exact import rounded, tables
from parity.fingerprint import alignment as aligned
from parity.fingerprint import moved
from parity.influence import Moved
from parity.preflight import differing_dtypes, round_trip
from parity.recorder import Exact, float64, seeded, told
from parity.state import built_dtypes, unfit
from parity.tied import tied, with_all_names
from parity.trace import Trace
from porter.core.chain import chain
from porter.core.checkpoint import Header, spec
from porter.core.errors import BadInputError
from porter.core.execute import apply
from porter.core.family import resolve
from porter.core.onload import compile_on_load
from porter.core.recipe import Recipe, compile_recipe
from porter.core.tensorplan import TensorPlan
from porter.core.userrecipe import read_recipes

State = dict[str, Tensor]


@dataclass(frozen=True)
class Conversion:
    """How the reference's state becomes the candidate's, and which modules follow from it."""

    state: Callable[[State], Mapping[str, Tensor]]
    alignment: Alignment
    dropped: tuple[str, ...] = ()
    moves: tuple[Moved, ...] = ()


def reference_state(case: Case, trace: Trace) -> State:
    """The reference's state again: from its file, or drawn as the trace says; never from the reference's memory."""
    kept = {name.removeprefix("state/"): tensor for name, tensor in trace.extra("state/").items()}
    if case.weights is not None:
        found = with_all_names(load_file(case.weights), trace.meta["weights"].get("tied", {}))
        return {n: t.float() if t.is_floating_point() else t for n, t in found.items()} | kept
    weights = trace.meta["weights"]
    ties = trace.meta["weights"].get("tied", {})
    drawn = {
        name: torch.from_numpy(draw(ties.get(name, name), tuple(shape), weights["seed"]))
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
    stubs.install(case.candidate.stubs)  # a conversion may come from a script that imports more than it uses
    header = {name: spec("F32", tuple(t.shape), name) for name, t in state.items() if t.is_floating_point()}
    plan = plan_of(case, header)
    if plan is not None:
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
    return Conversion(lambda own: function(dict(own)), aligned(found, case.modules, leaves), dropped, tuple(found))


def plan_of(case: Case, header: Header) -> TensorPlan | None:
    """What makes the candidate's tensors of the reference's `header`: the case's recipe and its on-load recipe.

    None where a function converts, or both have the same names.

    Raises:
        BadInputError, RecipeError: no recipe, or it does not take these tensors; a function and an on-load recipe.
    """
    recipe, config = recipe_of(case), dict(case.config)
    if case.on_load is None:
        return compile_recipe(recipe, config, header) if recipe is not None else None
    if recipe is None and case.convert is not None:
        raise BadInputError(
            "the case has an on-load recipe behind a function", expected="`convert` as a recipe, or none",
            found=type(case.convert).__name__, hint="docs/parity.md",
        )  # fmt: skip
    if recipe is None:
        return compile_on_load(case.on_load, config, header)
    plan = compile_recipe(recipe, config, header)
    return chain(plan, compile_on_load(case.on_load, config, plan.targets))


def recipe_of(case: Case) -> Recipe | None:
    """The recipe that a case's `convert` is or names; None where it is a function, or nothing."""
    if isinstance(case.convert, Recipe):
        return case.convert
    if not isinstance(case.convert, str):
        return None
    if ".py:" in case.convert or case.convert.endswith(".py"):
        file, name = split_case(case.convert)
        recipes = read_recipes(file, name or case.name)
        return recipes.get(name) or next(iter(recipes.values()))
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
    trace: Trace,
    own: Mapping[str, Tensor] | None = None,
) -> tuple[nn.Module, Exact] | None:
    """The candidate with the converted weights in it, and what float32 rounded of them and of its own tables.

    None, with the result's reason, where they do not fit.

    Args:
        trace: the reference's, which knows some of the state more exactly.
        own: see `compare_case`.
    """
    exact = exact_state(trace)
    seeded(seed)
    try:
        module = case.candidate.module(case.config)
        if odd := unfit(module):
            result.reason = f"the candidate's build returns {odd}"
            return None
        kinds = built_dtypes(module)
        module = module.float().eval()
    except (Exception, SystemExit) as error:
        result.reason = f"the candidate does not build: {told(error)}"
        return None
    result.candidate = case.candidate.name or type(module).__qualname__
    known = tables(module, lambda: case.candidate.module(case.config), seed, result.notes)
    try:
        converted = {n: t for n, t in conversion.state(dict(state)).items() if isinstance(t, Tensor)}
        given = converted if own is None else own
        missing, extra = module.load_state_dict(given, strict=False)
        one = with_all_names(given, ties := tied(module))
    except RuntimeError as error:
        result.reason = f"the converted weights do not fit the candidate: {str(error).splitlines()[-1].strip()}"
        return None
    kept = re.compile(case.keep) if case.keep else None
    missing = [n for n in missing if n not in one and not (kept and kept.fullmatch(n))]
    if torn := [n for n, earlier in ties.items() if n in one and not one[n].equal(one[earlier])]:
        result.reason = f"the candidate holds {ties[torn[0]]} and {torn[0]} as one tensor, the conversion makes two"
        return None
    if missing or extra:
        words = [
            f"{len(names)} {what}: {', '.join(names[:3])}"
            for what, names in (("missing", missing), ("left over", extra))
            if names
        ]
        words += ["what its class fills itself is named by `keep`"] if missing else []
        result.reason = f"the converted weights are not the candidate's: {'; '.join(words)}"
        return None
    result.notes += differing_dtypes(trace.meta.get("dtypes", {}), kinds)
    result.notes += round_trip(conversion.moves, state, converted)
    arrived = with_all_names(
        dict.fromkeys(move.source for move in conversion.moves), trace.meta["weights"].get("tied", {})
    )
    if dropped := [name for name in conversion.dropped if name not in arrived]:
        result.warnings.append(f"the conversion drops {len(dropped)} tensors: {', '.join(dropped[:3])}")
    try:
        with float64():
            wide = {n: exact.get(n, t).double() if t.is_floating_point() else t for n, t in state.items()}
            made = conversion.state(wide)
        known |= rounded(converted, made)
    except Exception as error:  # then a conversion that computes leaves its rounding in the comparison
        result.notes.append(f"the conversion does not run in float64 ({told(error)})")
    return module, known
