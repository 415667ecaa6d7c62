"""One component against a trace: every recorded activation compared, free-running and with inputs reset.

Blocks run once more with the reference's recorded inputs, so that one fault does not hide, or blame, the blocks behind
it. `parity.locate` says from the verdicts which module is guilty.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from parity.align import Alignment, Place, fit, read
from parity.arbiter import cast_disagreement
from parity.capture import Capture, capture
from parity.case import Block, Candidate
from parity.compare import GATE, PASSING, SKIPPED, Verdict, judge, skipped, worst
from parity.locate import Guilty, Tap, locate
from parity.recorder import sample_indices
from parity.trace import Trace, split_key


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
) -> ComponentResult:
    """Run every recorded pass of `module` and fill `result`.

    A candidate that fails to run raises nothing: the failure becomes the reason, which is not a pass.
    """
    result.warnings += constant_tensors(module)
    ran: set[str] = set()
    for name in trace.passes:
        forcing = forcings(trace, name, candidate, alignment)
        runs = []
        try:
            for use in (None, forcing):
                call, inputs = candidate.passes[name], trace.inputs(name)
                runs.append([capture(module, call, inputs, double=d, forcing=use) for d in (False, True)])
        except (RuntimeError, ValueError, TypeError) as error:
            result.reason = f"{name}: the candidate did not run: {type(error).__name__}: {error}"
            return result
        free, reset = runs
        ran |= free[0].ran
        pairs = {p: c for p in trace.modules(name) if (c := alignment.counterpart(p))}
        casts = cast_disagreement(trace.casts, free[0].casts, {**pairs, "": ""})
        taps, outputs = [], []
        for key, path, kind, look in _events(trace, name, candidate, alignment, casts, gate):
            if path == "=":
                outputs.append(look(free))
            else:
                forced = [f.path for f in forcing.values() if not f.unfit]
                inside = any(path == p or path.startswith(p + ".") for p in forced)
                taps.append(Tap(key, path, kind, look(free), look(reset) if inside else None))
        result.taps += taps
        result.outputs += outputs
        result.notes += [f"{text}; lost precision would show in that side's own noise" for text in casts.values()][:1]
        step = (step_names or {}).get(name, "the steps after its last module")
        found = locate(trace, name, taps, outputs, alignment, candidate, free[1], step)
        result.guilty = result.guilty or found
    result.notes = list(dict.fromkeys(result.notes))
    own = [p for p, m in module.named_modules() if any(True for _ in m.parameters(recurse=False))]
    result.unused = [p for p in own if p not in ran]
    recorded = {path for name in trace.passes for path in trace.modules(name)} | set(trace.meta.get("idle", ()))
    # Tensors of the outermost module itself (no path, on either side) take part in the pass, whose output is compared.
    result.unwatched = [
        leaf for leaf, parts in alignment.parts.items()
        if leaf and leaf not in recorded and any(part.candidate for part in parts)
    ]  # fmt: skip
    return result


def constant_tensors(module: nn.Module) -> list[str]:
    """A warning where parameters are still all zero or all one: a comparison through them proves little."""
    found = []
    for name, parameter in module.named_parameters():
        values = parameter.detach().flatten()
        if len(values) > 1 and float(values[0]) in (0.0, 1.0) and bool((values == values[0]).all()):
            found.append(name)
    shown = ", ".join(found[:3]) + (" …" if len(found) > 3 else "")
    return [f"{len(found)} parameters are all zero or all one, so faults in them stay hidden: {shown}"] if found else []


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


def _events(
    trace: Trace, name: str, candidate: Candidate, alignment: Alignment, casts: Mapping[str, str], gate: float
) -> Iterator[tuple[str, str, str, Callable[[list[Capture]], Verdict]]]:
    """Every recorded event of a pass in order: key, reference module, `in` or `out`, and what judges a pair of runs."""
    order: Counter[tuple[str, str]] = Counter()
    for key in trace.events:
        where, kind, _ = split_key(key)
        of, _, rest = where.partition("/")
        if of != name or (rest == "=" and kind == "in"):
            continue
        path = rest.partition("#")[0]
        position = order[where, kind]
        order[where, kind] += 1
        what = name if path == "=" else key.partition("/")[2]
        place = Place.of(trace, key, position)

        def look(pair: list[Capture], key: str = key, what: str = what, place: Place = place) -> Verdict:
            value = trace.value(key)
            low, high = (read(run, alignment, candidate, place, value.event.shape) for run in pair)
            if isinstance(low, str) or isinstance(high, str):
                return skipped(what, low if isinstance(low, str) else str(high))
            index = sample_indices(low.numel(), value.event.elements)
            a, b = low.reshape(-1)[index].float(), high.reshape(-1)[index].double()
            disagree = casts.get("" if place.module == "=" else place.module, "")
            return judge(what, value, a, b, gate=gate, casts=disagree, positions=index)

        yield key, path, kind, look
