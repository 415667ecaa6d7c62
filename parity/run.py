"""`porter parity`: everything that is compared for one port, and the one document that says how it went.

Truth first: each converted component against what the original code answered on the original file (a committed trace,
or that code live). Only then implementations of the port against each other, and the whole pipeline.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

from parity.align import Alignment
from parity.case import ComponentCase, Cross, FamilyCases
from parity.component import ComponentResult, compare_component
from parity.facts import facts
from parity.outcome import PIPELINE, Options, Outcome
from parity.pipeline import compare_pipelines
from parity.recorder import Watch, record
from parity.stages import Request
from parity.trace import Trace
from parity.truths import applicable, origin, truths
from porter.core.errors import BadInputError, UsageError
from porter.core.family import family_named, resolve
from porter.core.files import read_config
from porter.core.port import Port, hostile_until_proven
from porter.core.recipe import compile_recipe


def compare_port(path: str | Path, options: Options, *, progress: Callable[[str], None] = lambda _: None) -> Outcome:
    """Open the port at `path`, find what its family declares, and compare.

    Raises:
        BadInputError: the port's family is unknown, so nothing is known to compare it with.
        PorterError: see `run_parity`.
    """
    port = Port.open(path)
    name = port.manifest.get("family")
    cases = family_named(name).cases if name else None
    if not cases:
        raise BadInputError(
            f"nothing is known to compare {path} with",
            found=f"family {name}",
            hint="porter families lists what is proven",
        )
    with hostile_until_proven(port.path):
        return run_parity(port, str(name), resolve(cases), options, progress=progress)


def run_parity(
    port: Port, family: str, cases: FamilyCases, options: Options, *, progress: Callable[[str], None] = lambda _: None
) -> Outcome:
    """Compare a port with its reference.

    Raises:
        UsageError: an unknown component, or `original` without a checkout.
        MissingError: no checkout, no source files.
        CheckFailed: the original code does not run.
        CheckpointError, BadInputError: a trace or the port's files cannot be read.
    """
    known = [case.component for case in cases.components] + ([PIPELINE] if cases.pipeline else [])
    for name in options.components:
        if name not in known:
            raise UsageError(f"unknown component {name!r}", expected=" | ".join(known), hint="porter parity PORT")
    wanted = options.against or ("trace", "diffusers", *(("original",) if options.reference_repo else ()))
    if "original" in wanted and options.reference_repo is None:
        raise UsageError(
            "--against original needs the original code",
            hint="porter parity PORT --against original --reference-repo <checkout>",
        )
    absent = [c for c in options.components if c != PIPELINE and c not in port.components]
    whole = (port.path / "model_index.json").is_file()
    absent += [PIPELINE] if PIPELINE in options.components and not whole else []
    if absent:
        raise UsageError(
            f"the port has no {absent[0]}", expected=" | ".join(port.components), hint="porter parity PORT"
        )
    outcome = Outcome(port, family, options, changed=port.stale(full=True))
    proven: set[str] = set()
    here = [c for c in cases.components if _asked(c.component, options) and c.component in port.components]
    for case in applicable(here, port):
        folder = port.component_dir(case.component)
        for against, trace, warnings in truths(case, port, options, wanted):
            for candidate in case.candidates:
                progress(f"{case.component} ({candidate.name}) against {against}")
                known = [*warnings, *_casts(port, case.component)]
                result = ComponentResult(case.component, against, candidate.name, "", warnings=known)
                outcome.components.append(result)
                if isinstance(trace, str):
                    result.reason = trace
                    continue
                result.reference = origin(trace)
                module = candidate.load(folder)
                alignment = alignment_of(case, folder)
                compare_component(
                    module, candidate, trace, alignment, result, gate=options.gate, step_names=case.output_step
                )
                proven.add(case.component)
                del module
                gc.collect()
        if "diffusers" in wanted:
            for cross in case.cross:
                progress(f"{case.component} ({cross.candidate.name}) against {cross.reference.name}")
                outcome.components.append(_compare_cross(case.component, cross, folder, options))
    if cases.pipeline and "diffusers" in wanted and _asked(PIPELINE, options) and whole:
        progress("pipeline (native) against diffusers")
        p = cases.pipeline
        request = Request(
            p.prompt if options.prompt is None else options.prompt, options.seed, options.steps or p.steps, p.guidance
        )
        outcome.pipeline = compare_pipelines(p, port.path, request, gate=options.gate, dtype=options.dtype)
    converted = [name for name, record in port.manifest["components"].items() if record["action"] == "convert"]
    outcome.unproven = [name for name in converted if name not in proven]
    outcome.facts = facts(port, cases)
    return outcome


def _casts(port: Port, component: str) -> list[str]:
    """What a reader must know of a port whose weights were cast: the reference ran on the original ones."""
    lossy = [item for item in port.manifest["loss"].get("lossy", ()) if item.get("component") == component]
    dtype = port.manifest["components"][component].get("dtype")
    return [f"the conversion cast its weights to {dtype}; the reference has the original ones"] if lossy else []


def alignment_of(case: ComponentCase, folder: Path) -> Alignment:
    """The module map of a component, from its recipe compiled for the port's config."""
    recipe = resolve(case.recipe)
    config = read_config(folder / "config.json")
    return Alignment.of_plan(compile_recipe(recipe, config, recipe.source_headers(config, "F32")))


def _asked(component: str, options: Options) -> bool:
    return not options.components or component in options.components


def _compare_cross(component: str, cross: Cross, folder: Path, options: Options) -> ComponentResult:
    """One implementation against another on the same port; the reference is gone before the candidate loads."""
    result = ComponentResult(component, cross.reference.name, cross.candidate.name, cross.reference.name)
    module = cross.reference.load(folder)
    leaves = [p for p, m in module.named_modules() if any(True for _ in m.parameters(recurse=False))]
    watches = [Watch(cross.whole), *(Watch(p.replace(".", r"\.")) for p in leaves)]
    passes = {n: (cross.call, x) for n, x in cross.inputs(folder, options.seed).items()}
    trace = Trace.of(record(module, passes, watches, {"component": component}))
    del module
    gc.collect()
    candidate = cross.candidate.load(folder)
    return compare_component(candidate, cross.candidate, trace, Alignment.identity(leaves), result, gate=options.gate)
