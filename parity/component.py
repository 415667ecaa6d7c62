"""One component against a trace: every recorded activation compared, free-running and with inputs reset.

Blocks run once more with the reference's recorded inputs, so that one fault does not hide, or blame, the blocks behind
it. `parity.locate` says from the verdicts which module is guilty.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from parity.align import Alignment, Place, fit, read
from parity.arbiter import cast_disagreement
from parity.capture import Capture, capture
from parity.case import Block, Candidate
from parity.compare import GATE, PASSING, SKIPPED, Verdict, judge, skipped, worst
from parity.isolate import Isolation
from parity.locate import Fault, Guilty, Tap, faults, locate
from parity.preflight import constant_tensors, differing_settings
from parity.recorder import sample_indices
from parity.trace import Trace, split_key


@dataclass(frozen=True)
class Pair:
    """A run in float32 and the same in float64."""

    low: Capture
    high: Capture


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
        """The gravest output: whose number stands in the table."""
        return worst(self.outputs)


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
) -> ComponentResult:
    """Run every recorded pass of `module` and fill `result`.

    A candidate that fails to run raises nothing: the failure becomes the reason, which is not a pass.

    Args:
        baseline: largest scaled difference of a correct port in float32; decides where float64 cannot run.
    """
    result.warnings += constant_tensors(module)
    settings = differing_settings(trace.meta.get("attributes", {}), module, alignment)
    ran: set[str] = set()
    seed, double = int(trace.meta.get("seed", 0)), bool(trace.meta.get("float64", True))
    if double and trace.passes and candidate.passes.keys() >= set(trace.passes):
        double = _runs_in_float64(module, candidate.passes[trace.passes[0]], trace, seed, result)
    for name in trace.passes:
        forcing = forcings(trace, name, candidate, alignment)
        isolation = Isolation(trace, name, candidate, alignment)
        call, inputs = candidate.passes[name], trace.inputs(name)

        def run(call: Any = call, inputs: Any = inputs, double: bool = double, **kind: Any) -> Pair:
            low = _run(module, call, inputs, seed=seed, double=False, **kind)
            return Pair(low, _run(module, call, inputs, seed=seed, double=True, **kind) if double else low)

        try:
            free = run()
            settle(trace, name, candidate, alignment, free)
            reset = run(forcing=forcing) if forcing else None
            alone = run(isolation=isolation.of) if isolation.holders else None
        except Exception as error:  # whatever a project's code raises
            result.reason = f"{name}: the candidate did not run: {type(error).__name__}: {error}"
            return result
        ran |= free.low.ran
        pairs = {p: c for p in trace.modules(name) if (c := alignment.counterpart(p))}
        single = None if double else baseline or math.nan
        casts = cast_disagreement(trace.casts, free.low.casts, {**pairs, "": ""})
        forced = [f.path for f in forcing.values() if not f.unfit]
        taps, outputs = [], []
        for event in _events(trace, name, candidate, alignment, casts, gate, single):
            if event.path == "=":
                outputs.append(event.look(free))
                continue
            inside = any(event.path == p or event.path.startswith(p + ".") for p in forced)
            kept = look_alone(event, isolation, alone)
            if kept is None and inside and reset is not None:
                kept = event.look(reset)
            taps.append(Tap(event.key, event.path, event.kind, event.look(free), kept))
        result.taps += taps
        result.faults += faults(taps, alignment) if alone is not None else []
        result.outputs += outputs
        result.notes += [f"{text}; lost precision would show in that side's own noise" for text in casts.values()][:1]
        step = (step_names or {}).get(name, "the steps after its last module")
        found = locate(trace, name, taps, outputs, alignment, candidate, free.high, step)
        result.guilty = result.guilty or (found and found.because(settings))
    result.outputs += effects(trace)
    result.notes += [f"{path}: {text}" for path, text in settings.items()]
    result.notes = list(dict.fromkeys(result.notes))
    own = [p for p, m in module.named_modules() if any(True for _ in m.parameters(recurse=False))]
    result.unused = [p for p in own if p not in ran]
    recorded = {path for name in trace.passes for path in trace.modules(name)} | set(trace.meta.get("idle", ()))
    recorded |= set(trace.meta.get("parents", ())) | set(trace.meta.get("skipped", ()))
    # Tensors of the outermost module itself (no path, on either side) take part in the pass, whose output is compared.
    if trace.meta.get("level", "module") == "module":
        result.unwatched = [
            leaf for leaf, parts in alignment.parts.items()
            if leaf and leaf not in recorded and any(part.candidate for part in parts)
        ]  # fmt: skip
    return result


def _run(module: nn.Module, call: Any, inputs: Mapping[str, Tensor], *, seed: int, **kind: Any) -> Capture:
    """One run with inputs of its own and the same global random numbers as every other."""
    torch.manual_seed(seed)
    return capture(module, call, {name: tensor.clone() for name, tensor in inputs.items()}, **kind)


def _runs_in_float64(module: nn.Module, call: Any, trace: Trace, seed: int, result: ComponentResult) -> bool:
    """Whether the candidate, which runs in float32, does so in float64; that it does not is noted."""
    inputs = trace.inputs(trace.passes[0])
    try:
        _run(module, call, inputs, seed=seed, double=True)
    except Exception as error:
        try:
            _run(module, call, inputs, seed=seed, double=False)
        except Exception:  # it runs in neither, which is another matter
            return True
        result.notes.append(f"the candidate does not run in float64 ({type(error).__name__}: {error})")
        return False
    return True


def effects(trace: Trace) -> list[Verdict]:
    """What was not compared because an input, changed in a pass `name~input`, changed no output of the reference."""
    found = []
    for name in trace.passes:
        base, mark, key = name.partition("~")
        if not mark:
            continue
        outputs = [k for k in trace.events if k.startswith(f"{name}/=.out.")]
        before = [trace.value(f"{base}/{k.partition('/')[2]}").high for k in outputs]
        after = [trace.value(k).high for k in outputs]
        alike = all(
            a.shape == b.shape and bool(((a - b).abs() <= 1e-12 * a.abs().max()).all())
            for a, b in zip(after, before, strict=True)
        )
        if alike:
            why = f"changing {key} changes nothing in the reference's output, so nothing was compared through it"
            found.append(
                skipped(f"effect of {key} in {base}", f"{why}; if that is right, name it in the case's `free`")
            )
    return found


def settle(trace: Trace, name: str, candidate: Candidate, alignment: Alignment, free: Pair) -> None:
    """Let the candidate's layout see the free run first: what it settles there holds for the runs with values given."""
    for key in trace.events:
        of, _, rest = split_key(key)[0].partition("/")
        if of == name and rest != "=":
            read(free.high, alignment, candidate, Place.of(trace, key), trace.events[key].shape)


def forcings(trace: Trace, name: str, candidate: Candidate, alignment: Alignment) -> dict[str, Force]:
    """Blocks of a pass whose inputs were recorded in full: candidate module -> what replaces its arguments."""
    found = {}
    for path in trace.modules(name):
        ours = alignment.counterpart(path)
        keys = [k for k in trace.events if k.startswith(f"{name}/{path}#0.in.")]
        declared = next((b for b in candidate.blocks if b.matches(path)), None)
        whole = bool(keys) and all(trace.value(k).complete for k in keys)
        if ours and whole and path not in alignment.parts and (declared or len(keys) == 1):
            found[ours] = Force(trace, name, path, declared)
    return found


@dataclass(frozen=True)
class Force:
    """Replaces a block's inputs by the reference's recorded ones; a block with one input needs no declaration."""

    trace: Trace
    name: str
    path: str
    block: Block | None
    unfit: list[str] = field(default_factory=list)

    def __call__(self, call: int, own: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        prefix = f"{self.name}/{self.path}#{call}.in."
        double = torch.get_default_dtype() == torch.float64
        keys = [k for k in self.trace.events if k.startswith(prefix)]
        recorded = {k.removeprefix(prefix): self.trace.value(k).tensor(double) for k in keys}
        if self.block:
            return self.block.force(recorded, own)
        argument, value = next(iter(own.items()))
        fitted = fit(next(iter(recorded.values())), tuple(value.shape))
        if isinstance(fitted, str):  # then nothing is reset, and no verdict may say so
            self.unfit.append(fitted)
            return {argument: value}
        return {argument: fitted}


@dataclass(frozen=True)
class Event:
    """One recorded activation: its key, the reference module (`=`: the pass), `in` or `out`, its call."""

    key: str
    path: str
    kind: str
    call: int
    look: Callable[[Pair], Verdict]


def look_alone(event: Event, isolation: Isolation, alone: Pair | None) -> Verdict | None:
    """A leaf's verdict with the reference's values around it; None where it did not stand alone."""
    if alone is None or (event.path, event.call) not in isolation.given:
        return None
    return event.look(alone)


def _events(
    trace: Trace,
    name: str,
    candidate: Candidate,
    alignment: Alignment,
    casts: Mapping[str, str],
    gate: float,
    single: float | None,
) -> Iterator[Event]:
    """Every recorded event of a pass in order, with what judges a pair of runs."""
    order: Counter[tuple[str, str]] = Counter()
    for key in trace.events:
        where, kind, _ = split_key(key)
        of, _, rest = where.partition("/")
        if of != name or (rest == "=" and kind == "in"):
            continue
        path, _, call = rest.partition("#")
        position = order[where, kind]
        order[where, kind] += 1
        what = name if path == "=" else key.partition("/")[2]
        place = Place.of(trace, key, position)

        def look(pair: Pair, key: str = key, what: str = what, place: Place = place) -> Verdict:
            value = trace.value(key)
            low, high = (read(run, alignment, candidate, place, value.event.shape) for run in (pair.low, pair.high))
            if isinstance(low, str) or isinstance(high, str):
                return skipped(what, low if isinstance(low, str) else str(high))
            index = sample_indices(low.numel(), value.event.elements)
            a, b = low.reshape(-1)[index].float(), high.reshape(-1)[index].double()
            disagree = casts.get("" if place.module == "=" else place.module, "")
            return judge(what, value, a, b, gate=gate, casts=disagree, positions=index, single=single)

        yield Event(key, path, kind, int(call or 0), look)
