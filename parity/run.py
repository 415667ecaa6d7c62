"""`porter parity`: everything that is compared for one port, and the one document that says how it went.

Truth first: each converted component against what the original code answered on the original file (a committed trace,
or that code live). Only then implementations of the port against each other, and the whole pipeline.
"""

from __future__ import annotations

import gc
import json
import shlex
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from parity.align import Alignment
from parity.case import ComponentCase, Cross, FamilyCases
from parity.compare import GATE
from parity.component import ComponentResult, compare_component
from parity.facts import facts
from parity.pipeline import PipelineResult, Request, compare_pipelines
from parity.recorder import Watch, record
from parity.trace import Trace
from porter.core.errors import BadInputError, CheckFailed, MissingError, UsageError
from porter.core.family import resolve
from porter.core.port import Port
from porter.core.recipe import compile_recipe

SCHEMA = "porter.parity/1"
AGAINST = ("trace", "diffusers", "original")
PIPELINE = "pipeline"


@dataclass(frozen=True)
class Options:
    """What to compare. `components` and `against` empty: everything there is, `original` only with a checkout."""

    components: tuple[str, ...] = ()
    against: tuple[str, ...] = ()
    reference_repo: Path | None = None
    source: Path | None = None
    gate: float = GATE
    seed: int = 0
    prompt: str | None = None
    steps: int | None = None


@dataclass
class Outcome:
    """All results of a run."""

    port: Port
    family: str
    options: Options
    components: list[ComponentResult] = field(default_factory=list)
    pipeline: PipelineResult | None = None
    changed: list[str] = field(default_factory=list)
    unproven: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def results(self) -> list[ComponentResult | PipelineResult]:
        return [*self.components, *([self.pipeline] if self.pipeline else [])]

    @property
    def holds(self) -> bool:
        """Whether everything that ran passes, and something ran."""
        return bool(self.results) and all(r.passed for r in self.results) and not self.changed

    @property
    def passed(self) -> bool:
        """The port's verdict: it holds, and each converted component was compared with the original's own answers."""
        return self.holds and not self.unproven

    @property
    def partial(self) -> bool:
        """Whether the user asked for less than everything."""
        return bool(self.options.components or self.options.against)

    def conclusion(self) -> str:
        """The last line of the terminal's output."""
        if not self.results:
            return "FAIL nothing was compared"
        for result in self.components:
            if result.guilty:
                return f"FAIL first guilty module: {result.guilty}"
        for failed in self.results:
            if not failed.passed:
                return f"FAIL {describe(failed)}: {reason_of(failed)}"
        if self.changed:
            return f"FAIL the port's files changed after conversion: {', '.join(self.changed[:3])}"
        lines = [v for r in self.results if (v := r.headline)]
        largest = max(lines, key=lambda v: v.max_abs)
        line = f"PASS max|Δ| = {largest.max_abs:.2g} (floor {largest.floor:.2g})"
        if self.unproven:
            line += f"; not compared with the original: {', '.join(self.unproven)}"
        return line


def describe(result: ComponentResult | PipelineResult) -> str:
    """`transformer (native) against trace`."""
    if isinstance(result, PipelineResult):
        return "pipeline (native) against diffusers"
    return f"{result.component} ({result.candidate}) against {result.against}"


def reason_of(result: ComponentResult | PipelineResult) -> str:
    """Why a result is not a pass, in one line."""
    if result.reason:
        return result.reason
    if isinstance(result, PipelineResult):
        stage = result.first_failing
        return (
            f"both sides part at {stage.name!r}: {stage.status}, {stage.note or f'max|Δ| {stage.max_abs:.1e}'}"
            if stage
            else ""
        )
    if result.guilty:
        return f"{result.guilty}: {result.guilty.why}"
    if result.unused:
        return f"{len(result.unused)} modules with weights never ran: {', '.join(result.unused[:3])}"
    left_out = next((v for v in result.verdicts if not v.passed), None)
    return f"{left_out.name}: {left_out.status} {left_out.note}" if left_out else result.status


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
    for case in here:
        folder = port.component_dir(case.component)
        for against, trace, warnings in _truths(case, port, options, wanted):
            for candidate in case.candidates:
                progress(f"{case.component} ({candidate.name}) against {against}")
                result = ComponentResult(case.component, against, candidate.name, "", warnings=list(warnings))
                outcome.components.append(result)
                if isinstance(trace, str):
                    result.reason = trace
                    continue
                result.reference = _origin(trace)
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
        outcome.pipeline = compare_pipelines(p, port.path, request, gate=options.gate)
    outcome.unproven = [
        c.component for c in cases.components if c.component in port.components and c.component not in proven
    ]
    outcome.facts = facts(port, cases)
    return outcome


def alignment_of(case: ComponentCase, folder: Path) -> Alignment:
    """The module map of a component, from its recipe compiled for the port's config."""
    recipe = resolve(case.recipe)
    config = json.loads((folder / "config.json").read_text())
    return Alignment.of_plan(compile_recipe(recipe, config, recipe.source_headers(config, "F32")))


def _asked(component: str, options: Options) -> bool:
    return not options.components or component in options.components


def _truths(
    case: ComponentCase, port: Port, options: Options, wanted: tuple[str, ...]
) -> Iterator[tuple[str, Trace | str, list[str]]]:
    """The references that never read the port: (name, trace or why there is none, what a reader must know).

    A trace recorded on other weights says nothing about this port; the original code live then takes its place.
    """
    sources = port.manifest["source"]["files"]
    used = port.manifest["components"][case.component].get("sources") or list(sources)
    digests = {sources[name]["sha256"] for name in used if name in sources}

    def bound(trace: Trace, hint: str) -> Trace | str:
        source = trace.meta["source"]
        if source["sha256"] in digests:
            return trace
        return (
            f"the reference ran on {source['file']} (sha256 {source['sha256'][:12]}), "
            f"this port was converted from other weights; {hint}"
        )

    live = "original" in wanted and options.reference_repo is not None and case.record is not None
    warnings, recorded = [], Trace.open(case.trace)
    if "trace" in wanted:
        trace = bound(recorded, "compare with the original code: --reference-repo <checkout>")
        if isinstance(trace, str) and live and "trace" not in options.against:
            warnings.append("the recorded trace is of other weights; compared with the original code live instead")
        else:
            yield "trace", trace, []
    if live:
        with tempfile.TemporaryDirectory(prefix="porter-parity-") as folder:
            fresh = _record(case, port, options, Path(folder))
            here, known = (t.meta["reference"]["commit"] for t in (fresh, recorded))
            if here != known:
                warnings.append(f"the checkout is at {here or 'an unknown commit'}, the recorded trace at {known}")
            yield "original", bound(fresh, "name its source: --source <folder>"), warnings


def _record(case: ComponentCase, port: Port, options: Options, out: Path) -> Trace:
    """Run the original code in a process of its own; it reads the original files and never the port."""
    assert case.record is not None and options.reference_repo is not None
    source = options.source or _source_folder(port)
    command = case.record(source, options.reference_repo, options.seed, out)
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        kind = {4: MissingError, 6: BadInputError}.get(done.returncode, CheckFailed)
        said = done.stderr.strip() or f"exit code {done.returncode}"
        raise kind(f"the original code of {case.component} did not run", found=said, hint=shlex.join(command))
    return Trace.open(out / f"{case.component}.safetensors")


def _source_folder(port: Port) -> Path:
    """Where the original files lie, by the manifest."""
    spec = str(port.manifest["source"]["spec"])
    if spec.startswith("builtin:"):
        from porter.builtin import locate

        folder = locate(spec.removeprefix("builtin:"))
    else:
        folder = Path(spec).parent if Path(spec).is_file() else Path(spec)
    if folder is None or not folder.is_dir():
        raise MissingError(
            f"the original files of this port are not here: {spec}",
            hint="porter parity PORT --reference-repo <checkout> --source <folder with the original files>",
        )
    return folder


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


def _origin(trace: Trace) -> str:
    """`flux.model:Flux at 802fb47`."""
    reference = trace.meta["reference"]
    return f"{reference['name']} at {reference['commit'][:7] or 'unknown commit'}"
