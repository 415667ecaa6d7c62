"""One component against a trace: every recorded activation compared, free-running and with inputs reset.

Blocks run once more with the reference's recorded inputs, so that one fault does not hide, or blame, the blocks behind
it. `parity.locate` says from the verdicts which module is guilty.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial

from torch import nn

from parity.align import Alignment
from parity.arbiter import cast_disagreement
from parity.case import Candidate
from parity.compare import GATE, IDENTICAL, PASSING, SKIPPED, Verdict, skipped, worst
from parity.events import Judge, Runner, events, settle, singles_of
from parity.force import forcings
from parity.isolate import Isolation
from parity.locate import Fault, Guilty, Tap, faults, locate
from parity.perturb import ALL, PERTURBED
from parity.plain import Plain
from parity.preflight import constant_tensors, differing_settings
from parity.recorder import Exact, aliases, owners, told
from parity.reorder import reorder
from parity.steps import Steps
from parity.tied import tied
from parity.trace import Trace
from parity.twins import answers, settled, twins


@dataclass
class ComponentResult:
    """All comparisons of one candidate with one reference."""

    component: str
    against: str
    candidate: str
    reference: str
    taps: list[Tap] = field(default_factory=list)
    outputs: list[Verdict] = field(default_factory=list)
    guilty: Guilty | None = None
    faults: list[Fault] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    unwatched: list[str] = field(default_factory=list)
    reason: str = ""

    @property
    def verdicts(self) -> list[Verdict]:
        return [*(t.free for t in self.taps), *self.outputs]

    @property
    def counts(self) -> dict[str, int]:
        """Activations that were compared, that could not be, and modules with weights that never took part."""
        by = Counter(v.status for v in self.verdicts)
        return {
            "compared": sum(by.values()) - by[SKIPPED],
            "skipped": by[SKIPPED],
            "missing": len({*self.unused, *self.unwatched}),
        }

    @property
    def status(self) -> str:
        """The gravest verdict; `not compared` when anything was left out, or nothing was there."""
        gravest = worst(self.verdicts)
        if self.reason or gravest is None or ((self.unused or self.unwatched) and gravest.passed):
            return SKIPPED
        if gravest.passed:
            final = worst(self.outputs)
            return final.status if final else SKIPPED
        real = worst(v for v in self.verdicts if v.status != SKIPPED and not v.passed)
        return real.status if real else SKIPPED

    @property
    def passed(self) -> bool:
        return self.status in PASSING

    @property
    def headline(self) -> Verdict | None:
        """The gravest output that was compared: its number stands in the table."""
        return worst([v for v in self.outputs if v.status != SKIPPED]) or worst(self.outputs)


def compare_component(
    module: nn.Module,
    candidate: Candidate,
    trace: Trace,
    alignment: Alignment,
    result: ComponentResult,
    *,
    gate: float = GATE,
    step_names: Mapping[str, str] | None = None,
    baseline: float | None = None,
    level: str = "module",
    dtype: str = "",
    device: str = "cpu",
    exact: Exact | None = None,
) -> ComponentResult:
    """Run every recorded pass of `module` and fill `result`.

    A candidate that fails to run raises nothing: the failure becomes the reason, which is not a pass.

    Args:
        baseline: largest scaled difference of a correct port in float32; decides where float64 cannot run.
        level: `component` compares outputs only.
        dtype: run the candidate in it (`bfloat16`), judged by the reference's own loss from its float64 run.
        device: where the candidate runs; what it computes is compared on the CPU.
        exact: see `recorder.float64`.
    """
    if dtype and not any(dtype in event.losses for event in trace.events.values()):
        result.reason = f"the reference has no run in {dtype}: it was recorded without one, or did not run in it"
        return result
    module.to(device)
    alignment = alignment.single(trace.meta.get("aliases", {}), aliases(module))
    result.warnings += constant_tensors(module)
    settings = differing_settings(trace.meta.get("attributes", {}), module, alignment)
    plain_ones = Plain.of(trace, module)
    whole, theirs, ours = alignment, twins(trace.meta.get("weights", {}).get("tied", {})), twins(tied(module))
    ran: set[str] = set()
    untouched: set[str] | None = None
    singles: dict[str, str] = {}
    runner = Runner(module, int(trace.meta.get("seed", 0)), bool(trace.meta.get("float64", True)), dtype, device, exact)
    for name in trace.passes:
        if plain(name) not in candidate.passes:
            result.reason = f"the candidate has no call for the pass {plain(name)!r}"
            return result
        run = partial(runner.pair, candidate.passes[plain(name)], trace.inputs(name))
        try:
            free = run()
            made = {k.partition("/")[2]: e.shape for k, e in trace.events.items() if k.startswith(f"{name}/")}
            called = {key: tensor.shape for key, tensor in free.low.tensors.items()}
            alignment = settled(whole, theirs, ours, answers(made), answers(called))
            forcing = forcings(trace, name, candidate, alignment)
            isolation = Isolation(trace, name, candidate, alignment)
            settle(trace, name, candidate, alignment, free)
            deep = level != "component" and not dtype
            reset = run(forcing=forcing) if forcing and deep else None
            alone = run(isolation=isolation.of) if isolation.holders and deep else None
        except (Exception, SystemExit) as error:  # whatever a project's code raises
            result.reason = f"{name}: the candidate did not run: {told(error)}"
            return result
        ran |= free.low.ran
        untouched = free.low.untouched if untouched is None else untouched & free.low.untouched
        pairs = {p: c for p in trace.modules(name) if (c := alignment.counterpart(p))}
        single = None if runner.double else baseline or math.nan
        casts = cast_disagreement(trace.casts, free.low.casts, {**pairs, "": ""}) if not dtype else {}
        judge = Judge(trace, candidate, alignment, gate, casts, single, dtype, baseline)
        if alone is not None and (low := singles_of(trace.meta.get("singles", ()), free.high.singles)):
            apart = [e for e in events(trace, name) if e.kind == "out" and (e.path, e.call) in isolation.given]
            if not any(_fails(judge(event, alone)) for event in apart):  # else a module computes otherwise by itself
                singles[name] = low
        judge = replace(judge, singles=singles.get(name.partition(PERTURBED)[0], ""))
        forced = [f.path for f in forcing.values() if not f.unfit]
        taps, outputs, differing, unlike = [], [], [], []
        for event in events(trace, name):
            if event.path == "=":
                outputs.append(judge(event, free))
                continue
            if level == "component" or (level == "block" and event.path in alignment.parts):
                continue
            inside = any(event.path == p or event.path.startswith(p + ".") for p in forced)
            given = None
            if alone is not None and (event.path, event.call) in isolation.given:
                given = alone
            elif inside and reset is not None:
                given = reset
            taps.append(
                Tap(event.key, event.path, event.kind, judge(event, free), judge(event, given) if given else None)
            )
            if event.path in alignment.parts and not dtype and taps[-1].differs:
                differing.append((len(taps) - 1, event, given))
            if event.path in alignment.parts and not dtype and event.kind == "in" and taps[-1].free.status == SKIPPED:
                unlike.append((len(taps) - 1, event))
        if unlike:
            takers = {event.path: alignment.parts[event.path][0].candidate for _, event in unlike}
            shapes = runner.unread(candidate.passes[plain(name)], trace.inputs(name), set(takers.values()))
            passed = {at: event.path for at, event in unlike if takers[event.path] in shapes}
            for at in passed:
                taps[at] = taps[at].judged(Verdict(taps[at].free.name, IDENTICAL, max_abs=0.0, max_abs64=0.0), None)
            other = "gets something else, and nothing but its shape is used: not judged"
            result.notes += [f"{name}: {alignment.label(path)} {other}" for path in dict.fromkeys(passed.values())]
        reach = None
        if differing:
            paths = {part.candidate for _, event, _ in differing for part in alignment.parts[event.path]}
            reach = runner.reach(candidate.passes[plain(name)], trace.inputs(name), paths)
            for at, event, given in differing if reach else ():
                taps[at] = taps[at].judged(judge(event, free, reach), judge(event, given, reach) if given else None)
            hidden = [event.path for at, event, _ in differing if not taps[at].differs]
            if hidden:
                result.notes.append(
                    f"{name}: what differs in {len(hidden)} tensors reaches no output of the candidate (padding, rows "
                    f"that nothing uses) and was not judged: {', '.join(dict.fromkeys(hidden))}"
                )
        steps = None
        if alone is not None:
            once = partial(runner.once, candidate.passes[plain(name)], trace.inputs(name))
            steps = Steps(trace, name, candidate, alignment, plain_ones, isolation, once, runner.double)
            failing = {t.key: t.reset for t in taps if t.reset and t.kind == "in" and _fails(t.reset)}
            ends = [judge(event, alone) for event in events(trace, name) if event.path == "="]
            if bad := worst(filter(_fails, ends)):
                failing[""] = bad
            if failing and result.guilty is None:
                reorder(steps, alone.high, [key for key in failing if key])
            if failing and steps.settle(alone.high):
                alone = run(isolation=isolation.planned(steps.plan))
                of = {event.key: event for event in events(trace, name)}
                for i, tap in enumerate(taps):
                    if (tap.module, of[tap.key].call) in isolation.given:
                        taps[i] = tap.judged(tap.free, judge(of[tap.key], alone, reach))
                still = [t.key for t in taps if t.reset and t.kind == "in" and _fails(t.reset)]
                steps.blame(alone.high, failing.keys(), still)
            result.faults += faults(taps, steps, alone.high, failing, settings)
        result.taps += taps
        result.outputs += outputs
        result.notes += [f"{text}; lost precision would show in that side's own noise" for text in casts.values()][:1]
        step = (step_names or {}).get(plain(name), "the steps after its last module")
        found = locate(trace, name, taps, outputs, alignment, candidate, free.high, step, steps)
        result.guilty = result.guilty or (found and found.because(settings))
    result.outputs += effects(trace)
    result.notes += runner.notes
    result.notes += [f"{path}: {text}" for path, text in settings.items()]
    result.notes = list(dict.fromkeys(result.notes))
    skip = re.compile(str(trace.meta.get("skip", "")) or "$.")
    result.unused = [
        path
        for path in owners(module)
        if path
        and not ran & {path, *ours.get(path, ())}
        and not all(skip.fullmatch(b) for b in whole.behind(path) or ["-"])
    ]
    result.unused += sorted(name for name in untouched or () if not skip.fullmatch(name))
    recorded = {path for name in trace.passes for path in trace.modules(name)} | set(trace.meta.get("idle", ()))
    recorded |= set(trace.meta.get("parents", ())) | set(trace.meta.get("skipped", ()))
    # Tensors of the outermost module itself (no path, on either side) take part in the pass, whose output is compared.
    if "module" == level == trace.meta.get("level", "module"):
        result.unwatched = [
            leaf for leaf, parts in whole.parts.items()
            if leaf and not recorded & {leaf, *theirs.get(leaf, ())} and any(part.candidate for part in parts)
        ]  # fmt: skip
    return result


def _fails(verdict: Verdict) -> bool:
    return not verdict.passed and verdict.status != SKIPPED


def plain(name: str) -> str:
    """The pass as the case names it: `forward~mask` and `forward@3` are calls of `forward`."""
    return name.partition(PERTURBED)[0].partition("@")[0]


def effects(trace: Trace) -> list[Verdict]:
    """What was not compared because an input, changed in a pass `name~input`, changed no output of the reference."""
    found = []
    for name in trace.passes:
        base, mark, key = name.partition(PERTURBED)
        if not mark:
            continue
        outputs = [k for k in trace.events if k.startswith(f"{name}/=.out.")]
        before = [trace.value(f"{base}/{k.partition('/')[2]}").high for k in outputs]
        after = [trace.value(k).high for k in outputs]
        alike = all(
            a.shape == b.shape and (not a.numel() or bool(((a - b).abs() <= 1e-12 * a.abs().max()).all()))
            for a, b in zip(after, before, strict=True)
        )
        if alike:
            changed = "all inputs" if key == ALL else key
            why = f"changing {changed} changes nothing in the reference's output, so nothing was compared through it"
            why += "" if key == ALL else "; if that is right, name it in the case's `free`"
            found.append(skipped(f"effect of {changed} in {base}", why))
    return [*found, *_without_effect(trace)]


def _without_effect(trace: Trace) -> list[Verdict]:
    """Passes of a case that no changed input was put through: their answer may depend on nothing."""
    bases = [name for name in trace.passes if PERTURBED not in name] if "leaves" in trace.meta else []
    guarded = {name.partition(PERTURBED)[0] for name in trace.passes if PERTURBED in name}
    why = "it has no input that could be changed, so nothing says that what was compared depends on anything"
    return [skipped(f"effect of the inputs in {name}", why) for name in bases if name not in guarded]
