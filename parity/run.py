"""`porter parity`: everything that is compared for one port, and the one document that says how it went.

Truth first: each converted component against what the original code answered on the original file (a committed trace,
or that code live). Only then implementations of the port against each other, and the whole pipeline.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from parity.align import Alignment
from parity.case import ComponentCase, Cross, FamilyCases, Named, PipelineCase
from parity.component import ComponentResult, compare_component
from parity.facts import facts
from parity.given import captured_inputs, inputs_from_file
from parity.outcome import PIPELINE, Options, Outcome
from parity.pipeline import compare_pipelines
from parity.recorder import Watch, owners, record
from parity.reference import LEVELS
from parity.stages import Request
from parity.trace import Trace
from parity.truths import applicable, origin, truths
from porter.core.chain import chain
from porter.core.checkpoint import spec
from porter.core.errors import BadInputError, UsageError
from porter.core.family import family_named, resolve
from porter.core.files import read_config, read_json
from porter.core.onload import compile_on_load
from porter.core.port import Port, hostile_until_proven
from porter.core.recipe import Recipe, compile_recipe


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
        CheckpointError, BadInputError: a trace or the port's files cannot be read.
    """
    known = [case.component for case in cases.components] + ([PIPELINE] if cases.pipelines else [])
    for name in options.components:
        if name not in known:
            raise UsageError(f"unknown component {name!r}", expected=" | ".join(known), hint="porter parity PORT")
    for text in options.against:
        if text not in ("trace", "diffusers", "original") and ":" not in text:
            raise UsageError(
                f"unknown reference {text!r}", expected="trace | diffusers | original | trace FILE | module:function",
                hint="porter parity PORT",
            )  # fmt: skip
    if options.source is not None and options.source.is_file() and not any(":" in t for t in options.against):
        raise UsageError(
            f"--source {options.source} is a file", expected="the folder of the original files", hint="--source DIR"
        )
    wanted = options.against or ("trace", "diffusers", *(("original",) if options.reference_repo else ()))
    _fits_together(options, wanted)
    if "original" in wanted and options.reference_repo is None:
        raise UsageError(
            "--against original needs the original code",
            hint="porter parity PORT --against original --reference-repo <checkout>",
        )
    asked = [case for case in cases.components if _asked(case.component, options)]
    if "original" in wanted and not any(case.record for case in asked):
        raise UsageError(
            f"nothing of {family} runs its original code live", expected="its recorded trace: --against trace",
            hint="leave --reference-repo out",
        )  # fmt: skip
    absent = [c for c in options.components if c != PIPELINE and c not in port.components]
    called = pipeline_class(port)
    whole = cases.pipelines.get(called or "")
    absent += [PIPELINE] if PIPELINE in options.components and called is None else []
    if absent:
        raise UsageError(
            f"the port has no {absent[0]}", expected=" | ".join(port.components), hint="porter parity PORT"
        )
    if PIPELINE in options.components and whole is None:
        raise UsageError(
            "nothing is known to compare this port's pipeline with", expected=" | ".join(cases.pipelines),
            found=str(called), hint="porter parity PORT, which compares its components",
        )  # fmt: skip
    outcome = Outcome(port, family, options, changed=port.stale(full=True))
    proven: set[str] = set()
    here = [c for c in cases.components if _asked(c.component, options) and c.component in port.components]
    here = here if options.level in ("", *LEVELS) else []
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
                alignment = alignment_of(case, folder, candidate.on_load)
                compare_component(
                    module, candidate, trace, alignment, result, step_names=case.output_step, **how(options)
                )
                proven.add(case.component)
                del module
                gc.collect()
        if "diffusers" in wanted:
            for cross in case.cross:
                progress(f"{case.component} ({cross.candidate.name}) against {cross.reference.name}")
                given = _given(case.component, cross, folder, port, whole, options)
                outcome.components.append(_compare_cross(case.component, cross, folder, given, options))
    deep = options.level in ("", "pipeline", "step")
    if whole and "diffusers" in wanted and _asked(PIPELINE, options) and deep:
        progress(f"pipeline ({called}, native) against diffusers")
        request = _request(whole, options)
        outcome.pipeline = compare_pipelines(
            whole, port.path, request, gate=options.gate, dtype=options.dtype, level=options.level or "step"
        )
    converted = [name for name, record in port.manifest["components"].items() if record["action"] == "convert"]
    outcome.unproven = [name for name in converted if name not in proven]
    outcome.facts = facts(port, cases)
    return outcome


def pipeline_class(port: Port) -> str | None:
    """The pipeline that the port's model_index.json names; None where it is a port of single components.

    Raises:
        BadInputError: the file names none.
    """
    index = port.path / "model_index.json"
    if not index.is_file():
        return None
    found = read_json(index)
    name = found.get("_class_name") if isinstance(found, dict) else None
    if not isinstance(name, str):
        raise BadInputError(
            f"{index} names no pipeline", expected="an object with _class_name", found=repr(name),
            hint="convert the model again: porter convert <model> -o <port> --overwrite",
        )  # fmt: skip
    return name


def _casts(port: Port, component: str) -> list[str]:
    """What a reader must know of a port whose weights were cast: the reference ran on the original ones."""
    lossy = [item for item in port.manifest["loss"].get("lossy", ()) if item.get("component") == component]
    dtype = port.manifest["components"][component].get("dtype")
    return [f"the conversion cast its weights to {dtype}; the reference has the original ones"] if lossy else []


def alignment_of(case: ComponentCase, folder: Path, on_load: Recipe | None = None) -> Alignment:
    """The module map of a component, from its recipe, and a candidate's on-load recipe, compiled for the config."""
    recipe = resolve(case.recipe)
    config = read_config(folder / "config.json")
    plan = compile_recipe(recipe, config, recipe.source_headers(config, "F32"))
    if on_load is not None:
        plan = chain(plan, compile_on_load(on_load, config, plan.targets))
    return Alignment.of_plan(plan)


def _asked(component: str, options: Options) -> bool:
    return not options.components or component in options.components


def how(options: Options) -> dict[str, Any]:
    """The options of `compare_component`."""
    dtype = "" if options.dtype == "float32" else options.dtype
    return {"gate": options.gate, "level": options.level or "module", "dtype": dtype, "device": options.device}


def _request(case: PipelineCase, options: Options) -> Request:
    """What a pipeline is asked for: the case's, but for what the user named."""
    prompt = case.prompt if options.prompt is None else options.prompt
    return Request(prompt, options.seed, options.steps or case.steps, case.guidance)


def _fits_together(options: Options, wanted: Sequence[str]) -> None:
    """Refuse options that would be ignored.

    Raises:
        UsageError: recorded inputs cannot be others; a device that is not there.
    """
    if options.inputs != "random" and "diffusers" not in wanted:
        raise UsageError(
            f"--inputs {options.inputs} has no effect: a recorded reference has its own inputs",
            found=f"--against {', '.join(wanted)}",
            hint="--against diffusers, or a case: --case FILE",
        )
    options.check_device()


def _given(
    component: str, cross: Cross, folder: Path, port: Port, case: PipelineCase | None, options: Options
) -> Mapping[str, Named]:
    """What both implementations get: random inputs, those of a pipeline's run, or those of a file.

    Raises:
        UsageError: the family has no pipeline to capture from, or none of its stages is this component.
        MissingError, CheckpointError: the file.
    """
    if options.inputs == "random":
        return cross.inputs(folder, options.seed)
    if options.inputs == "captured":
        if case is None:
            raise UsageError("--inputs captured runs the pipeline, and none is known here", hint="--inputs random")
        return captured_inputs(case, port.path, component, _request(case, options))
    return inputs_from_file(Path(options.inputs), list(cross.inputs(folder, options.seed)))


def _compare_cross(
    component: str, cross: Cross, folder: Path, given: Mapping[str, Named], options: Options
) -> ComponentResult:
    """One implementation against another on the same port; the reference is gone before the candidate loads."""
    result = ComponentResult(component, cross.reference.name, cross.candidate.name, cross.reference.name)
    module = cross.reference.load(folder)
    leaves = owners(module)
    held = {name: spec("F32", tuple(tensor.shape), name) for name, tensor in module.state_dict().items()}
    watches = [Watch(cross.whole), *(Watch(p.replace(".", r"\.")) for p in leaves)]
    passes = {n: (cross.call, x) for n, x in given.items()}
    lossy = [options.dtype] if options.dtype != "float32" else []
    trace = Trace.of(record(module, passes, watches, {"component": component}, seed=options.seed, dtypes=lossy))
    del module
    gc.collect()
    candidate, alignment = cross.candidate.load(folder), Alignment.identity(leaves)
    if cross.candidate.on_load is not None:
        plan = compile_on_load(cross.candidate.on_load, read_config(folder / "config.json"), held)
        alignment = Alignment.of_plan(plan)
    return compare_component(candidate, cross.candidate, trace, alignment, result, **how(options))
