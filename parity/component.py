"""One component against a trace: every recorded activation compared, free-running and with inputs reset.

Blocks run once more with the reference's recorded inputs, so that one fault does not hide, or blame, the blocks behind
it. `parity.locate` says from the verdicts which module is guilty.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from parity.align import Alignment
from parity.case import Candidate
from parity.compare import GATE, PASSING, SKIPPED, Verdict, skipped, worst
from parity.events import Runner
from parity.locate import Fault, Guilty, Tap
from parity.onepass import OnePass, Subject, plain
from parity.perturb import ALL, PERTURBED
from parity.plain import Plain
from parity.preflight import constant_tensors, differing_settings
from parity.recorder import Exact, aliases, owners, told
from parity.tied import tied
from parity.trace import Trace
from parity.twins import twins


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
        real = worst(v for v in self.verdicts if v.fails)
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
    theirs, ours = twins(trace.meta.get("weights", {}).get("tied", {})), twins(tied(module))
    runner = Runner(module, int(trace.meta.get("seed", 0)), bool(trace.meta.get("float64", True)), dtype, device, exact)
    subject = Subject(
        candidate, trace, alignment, runner, Plain.of(trace, module), theirs, ours, settings, gate, baseline, level,
        dtype, step_names or {},
    )  # fmt: skip
    ran: set[str] = set()
    untouched: set[str] | None = None
    for name in trace.passes:
        if plain(name) not in candidate.passes:
            result.reason = f"the candidate has no call for the pass {plain(name)!r}"
            return result
        one = OnePass(subject, name)
        try:
            one.run()
        except (Exception, SystemExit) as error:  # whatever a project's code raises
            result.reason = f"{name}: the candidate did not run: {told(error)}"
            return result
        ran |= one.free.low.ran
        untouched = one.free.low.untouched if untouched is None else untouched & one.free.low.untouched
        one.look()
        found = one.blame(first=result.guilty is None)
        result.guilty = result.guilty or found
        result.taps += one.taps
        result.outputs += one.outputs
        result.faults += one.faults
        result.notes += one.notes
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
        and not all(skip.fullmatch(b) for b in alignment.behind(path) or ["-"])
    ]
    result.unused += sorted(name for name in untouched or () if not skip.fullmatch(name))
    recorded = {path for name in trace.passes for path in trace.modules(name)} | set(trace.meta.get("idle", ()))
    recorded |= set(trace.meta.get("parents", ())) | set(trace.meta.get("skipped", ()))
    # Tensors of the outermost module itself (no path, on either side) take part in the pass, whose output is compared.
    if "module" == level == trace.meta.get("level", "module"):
        result.unwatched = [
            leaf for leaf, parts in alignment.parts.items()
            if leaf and not recorded & {leaf, *theirs.get(leaf, ())} and any(part.candidate for part in parts)
        ]  # fmt: skip
    return result


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
