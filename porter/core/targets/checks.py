"""What ticks a step: the plan, the catalogue or the framework's inventory shows that it is done. Nothing else does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from porter.core.family import Component, families, proof
from porter.core.targets.facts import Facts, Piece, listed
from porter.core.targets.names import shown

Verdict = tuple[bool, str]
OPEN: Verdict = (False, "")


def check(name: str, facts: Facts, piece: Piece | None, paths: Sequence[str]) -> Verdict:
    """(done, what shows it) for a step whose `done` is `name`; `paths` are the step's files."""
    if not name:
        return OPEN
    if piece is not None and name in OF_A_PIECE:
        return OF_A_PIECE[name](facts, piece)
    return OF_A_MODEL[name](facts, paths)


def _holds(facts: Facts, _: object) -> Verdict:
    """The step is there only because it holds."""
    return True, ""


def _exists(facts: Facts, paths: Sequence[str]) -> Verdict:
    """The family's files are there; a new family's folder is none that exists (`Facts.folder`)."""
    there = all(facts.exists(path) for path in paths)
    return there, listed(paths) if there else ""


def _pipeline(facts: Facts, _: object) -> Verdict:
    where = facts.target.pipelines.get(facts.names.pipeline, "")
    return bool(where), f"`{where}`" if where else ""


def _registered(facts: Facts, _: object) -> Verdict:
    where = facts.target.models.get(facts.plan.source, "")
    return bool(where), f"`{where}`" if where else ""


def _parity(facts: Facts, _: object) -> Verdict:
    """The plan is one of a port whose parity passed."""
    held = facts.plan.verdict == "passed"
    return held, "this port's parity passed" if held else ""


def _cases(facts: Facts, _: object) -> Verdict:
    return _shows(facts.family.cases if facts.family else None)


def _entry(facts: Facts, _: object) -> Verdict:
    return _shows(facts.family.pipeline if facts.family and facts.native else None)


def _recipe(facts: Facts, piece: Piece) -> Verdict:
    """A recipe that takes these very weights."""
    recipes = {part.recipe if part.status == "convert" else None for part in piece.parts}
    if None not in recipes:
        return True, "recipe " + listed(sorted(str(recipe) for recipe in recipes))
    near = next((guess for part in piece.parts for guess in part.guesses), None)
    nearest = f"; nearest known layout `{shown(str(near['class']))}` ({near['score']:.0%})" if near else ""
    return False, f"no recipe of porter's takes it{nearest}"


def _catalogued(facts: Facts, piece: Piece) -> Verdict:
    """A recipe of the family's for each, or the hint that families share one."""
    known = [_record(facts, piece, part.name) for part in piece.parts]
    if all(record and record.recipe for record in known):
        return True, listed(str(record.recipe) for record in known if record)
    shared = (
        part.recipe
        for family in families().values()
        for part in family.components
        if piece.class_name in part.class_names and (part.recipe or "").startswith("conversions.common.")
    )
    found = next(shared, None)
    return False, f"families share `{found}`" if found else ""


def _trace(facts: Facts, piece: Piece) -> Verdict:
    """Committed answers of the original code for each of the components."""
    family = facts.family
    traces = proof(family) if family else []
    classes = {part.name: part.class_name for part in piece.parts}
    if family is None or not all(
        f"{name}.safetensors" in traces and (known := family.component(name)) and own in known.class_names
        for name, own in classes.items()
    ):
        return OPEN
    return True, f"porter's traces, recorded from {family.reference_code}"


def _native(facts: Facts, piece: Piece) -> Verdict:
    known = _record(facts, piece, piece.parts[0].name)
    return _shows(known.native_of(piece.class_name) if known else None)


def _record(facts: Facts, piece: Piece, name: str) -> Component | None:
    """The catalogue's record of a component, where its class is one of the record's."""
    known = facts.family.component(name) if facts.family else None
    return known if known and piece.class_name in known.class_names else None


def _shows(reference: str | None) -> Verdict:
    return bool(reference), f"`{reference}`" if reference else ""


OF_A_MODEL: Mapping[str, Callable[[Facts, Sequence[str]], Verdict]] = {
    "holds": _holds,
    "exists": _exists,
    "pipeline": _pipeline,
    "registered": _registered,
    "parity": _parity,
    "cases": _cases,
    "entry": _entry,
}
OF_A_PIECE: Mapping[str, Callable[[Facts, Piece], Verdict]] = {
    "recipe": _recipe,
    "catalogue": _catalogued,
    "trace": _trace,
    "native": _native,
}
