"""One pass of a model larger than memory, compared block after block.

Both sides run once in float32: each block of the candidate as the model ran, and again on the reference's recorded
inputs. Then a few blocks stand alone, in float32 and float64: the first, the middle and the last, and of each kind the
one that differs most. All blocks, on both sides, hand on what the reference answered. So whatever is computed outside
of blocks stands alone too, and is compared: before the first, between two, behind the last.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from parity.align import Place
from parity.arbiter import cast_disagreement
from parity.blockwise import Maps, Recorded, Side, Slips, arguments, of_call, with_arguments
from parity.case import Named
from parity.compare import BASELINES, DIFFERS, IDENTICAL, ROUNDING, SKIPPED, Verdict, judge, skipped
from parity.hollow import Around
from parity.recorder import Event, tensors_of
from parity.shelf import digest, with_tensors
from parity.trace import Value, split_key

_EPS = 2.0**-23  # float32's


@dataclass
class Pass:
    """Verdicts by event key: `free` as the model ran, `reset` with the reference's inputs (both float32), `exact`.

    Attributes:
        blocks: candidate block -> reference block.
        recorded: the reference's float32 run, in order of execution.
        alone: calls that stood alone, in float64 too.
        floors: kind of block -> its largest floor there, scaled.
        worst: kind of block -> the call that differs most, where float64 calls that rounding.
        unread: module outside of blocks -> why it is not compared by itself.
        unhanded: call -> why the candidate hands on its own answer where it hands on the reference's elsewhere.
        seconds: by step.
    """

    reference: Side
    candidate: Side
    maps: Maps
    blocks: Mapping[str, str]
    inputs: Named
    gate: float
    say: Callable[[str], None]
    recorded: Slips = field(default_factory=dict)
    free: dict[str, Verdict] = field(default_factory=dict)
    reset: dict[str, Verdict] = field(default_factory=dict)
    exact: dict[str, Verdict] = field(default_factory=dict)
    alone: list[str] = field(default_factory=list)
    floors: dict[str, float] = field(default_factory=dict)
    worst: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    unread: dict[str, str] = field(default_factory=dict)
    unhanded: dict[str, str] = field(default_factory=dict)
    _used: dict[str, set[str]] = field(default_factory=dict)
    _unforced: dict[str, str] = field(default_factory=dict)
    _pairs: dict[str, tuple[str, str]] = field(default_factory=dict)  # key -> hashes of both sides' tensors
    _seen: dict[tuple[str, str], Verdict] = field(default_factory=dict)

    def record(self) -> None:
        """The reference, as it runs."""
        self._run("reference, float32", self.reference, self._record, self.recorded)

    def compare(self) -> None:
        """The candidate; `record` came before."""
        own: Slips = {}
        self._run("candidate, float32", self.candidate, self._compare, own)
        for key in (k for k in self.recorded if k.startswith("=.out.")):
            self.free[key] = self._judged(key, {k: self.candidate.shelf.get(s) for k, s in own.items() if k[0] == "="})
        self.alone = self._chosen()
        low, high, ours_low, ours_high = ({}, {}, {}, {})  # type: tuple[Slips, Slips, Slips, Slips]
        theirs, ours = (self._standing(s, kept) for s, kept in ((self.reference, high), (self.candidate, ours_low)))
        self._run("chosen blocks of the reference, float64", self.reference, theirs, high, double=True)
        self._run("chosen blocks of the candidate, float32", self.candidate, ours, ours_low)
        last = self._standing(self.candidate, ours_high, double=True)
        self._run("chosen blocks of the candidate, float64", self.candidate, last, ours_high, double=True)
        low = {key: self.recorded[key] for key in high}
        self._arbitrate(low, high, ours_low, ours_high)
        self._settle()

    def _run(self, step: str, side: Side, around: Around, kept: Slips, *, double: bool = False) -> None:
        began = time.monotonic()
        side.run(self.inputs, around, kept, double=double)
        self.seconds[step] = round(time.monotonic() - began, 1)
        self.say(f"{step}: {self.seconds[step]:.0f} s")

    def _record(self, path: str, call: int, run: Any, args: Any, kwargs: Any) -> Any:
        where, side = f"{path}#{call}", self.reference
        self.calls.append(where)
        self.recorded.update(side.keep(where, "in", arguments(side.module.get_submodule(path), args, kwargs)))
        out = run(*args, **kwargs)
        self.recorded.update(side.keep(where, "out", out))
        side.remember(where, out)
        self.say(f"{len(self.calls)} of {len(self.blocks)} blocks: {where}")
        return out

    def _compare(self, path: str, call: int, run: Any, args: Any, kwargs: Any) -> Any:
        """A block as the model runs, and on the reference's inputs; later it hands on the reference's answer."""
        where, at, side = f"{path}#{call}", f"{self.blocks[path]}#{call}", self.candidate
        if at not in self.calls:
            raise RuntimeError(f"it runs {where}, where the reference does not run {at}")
        module = side.module.get_submodule(path)
        own = arguments(module, args, kwargs)
        with side.aside():
            recorded = Recorded(side.shelf, of_call(self.recorded, at, "in"))
            given = self.maps.forced(self.blocks[path], recorded, own)
            same = not isinstance(given, str) and _equal(given, own)
            self._look(self.free, at, "in", {f"{where}.in.{name}": t for name, t in own.items()})
        out = answer = run(*args, **kwargs)
        if isinstance(given, str):
            self._unforced[at] = given
        else:
            self._used[at] = recorded.used
            if not same:  # where it is, the block would answer the same again
                args, kwargs = with_arguments(module, args, kwargs, given)
                answer = run(*args, **kwargs)
        with side.aside():
            inputs = {f"{where}.in.{name}": t for name, t in own.items()}
            self._look(self.free, at, "out", inputs | {f"{where}.out.{name}": t for name, t in tensors_of(out)})
            tensors = dict(tensors_of(answer))
            self._look(self.reset, at, "out", inputs | {f"{where}.out.{name}": t for name, t in tensors.items()})
            theirs = dict(Recorded(side.shelf, of_call(self.recorded, at, "out")))
            places = {name: self._place(f"{at}.out.{name}") for name in theirs}
            handed = self.maps.given_back(places, theirs, tensors, f"{where}.out.")
            if isinstance(handed, str):
                self.unhanded[at] = handed
            else:
                answer = with_tensors(answer, handed)
        side.remember(where, answer)
        worst = max((v.scaled for k, v in self.reset.items() if k.startswith(f"{at}.")), default=math.nan)
        self.say(f"{len(self._used) + len(self._unforced)} of {len(self.blocks)} blocks: {where}: {worst:.1e} (scaled)")
        return out

    def _standing(self, side: Side, kept: Slips, double: bool | None = None) -> Around:
        """Chosen blocks run on the reference's inputs; all hand on what the reference answered."""
        ours = side is self.candidate
        high = not ours if double is None else double

        def around(path: str, call: int, run: Any, args: Any, kwargs: Any) -> Any:
            where, at = f"{path}#{call}", f"{self.blocks[path] if ours else path}#{call}"
            module = side.module.get_submodule(path)
            own = arguments(module, args, kwargs)
            if at == self.calls[0]:  # nothing of its inputs came through a block
                kept.update(side.keep(where, "in", own))
            if ours and not high:
                with side.aside():
                    self._look(self.reset, at, "in", {f"{where}.in.{name}": t for name, t in own.items()})
            if at not in self.alone:
                return side.again(where, high)
            with side.aside():
                recorded = Recorded(side.shelf, of_call(self.recorded, at, "in"), high)
                given: Any = {name: recorded[name] for name in self._used[at]}
                given = self.maps.forced(self.blocks[path], recorded, own) if ours else given
            args, kwargs = with_arguments(module, args, kwargs, given)
            kept.update(side.keep(where, "out", run(*args, **kwargs)))
            return side.again(where, high)

        return around

    def _chosen(self) -> list[str]:
        """The first, the middle and the last block, and of each kind the one that differs most on the same inputs."""
        able = [at for at in self.calls if at in self._used]
        if not able:
            return []
        chosen = {able[0], able[len(able) // 2], able[-1]}
        for kind in {self._kind(at) for at in able}:
            alike = [at for at in able if self._kind(at) == kind]
            chosen.add(max(alike, key=self._difference))
        return [at for at in able if at in chosen]

    def _kind(self, at: str) -> str:
        return type(self.reference.module.get_submodule(at.partition("#")[0])).__qualname__

    def _difference(self, at: str) -> float:
        found = [v.scaled for v in self._outs(self.reset, at)]
        return max((math.inf if math.isnan(x) else x for x in found), default=0.0)

    def _outs(self, verdicts: Mapping[str, Verdict], at: str) -> list[Verdict]:
        return [v for key, v in verdicts.items() if key.startswith(f"{at}.out.")]

    def _look(self, into: dict[str, Verdict], at: str, kind: str, tensors: Mapping[str, Tensor]) -> None:
        """Judge what a block took or answered, in float32 alone; the same pair of tensors once."""
        for name, slip in of_call(self.recorded, at, kind).items():
            key = f"{at}.{kind}.{name}"
            mine = self.maps.read(self._place(key), slip.shape, tensors)
            if isinstance(mine, str):
                into[key] = skipped(key, mine)
                continue
            pair = self._pairs[key] = slip.digest, digest(mine)
            known = self._seen.get(pair)
            into[key] = self._seen[pair] = replace(known, name=key) if known else self._judge32(key, mine)

    def _judged(self, key: str, tensors: Mapping[str, Tensor]) -> Verdict:
        mine = self.maps.read(self._place(key), self.recorded[key].shape, tensors)
        return skipped(key, mine) if isinstance(mine, str) else self._judge32(key, mine)

    def _judge32(self, key: str, mine: Tensor) -> Verdict:
        theirs = self.reference.shelf.get(self.recorded[key])
        value = _value(key, theirs, theirs)
        flat = mine.reshape(-1).float()
        return judge(key, value, flat, flat, gate=self.gate, single=math.nan)

    def _place(self, key: str) -> Place:
        where, kind, name = split_key(f"pass/{key}")
        where = where.partition("/")[2]
        path, _, call = where.partition("#")
        shapes = {n: slip.shape for n, slip in of_call(self.recorded, where, "in").items()}
        return Place(path, int(call or 0), kind, name, list(of_call(self.recorded, where, kind)).index(name), shapes)

    def _arbitrate(self, low: Slips, high: Slips, ours_low: Slips, ours_high: Slips) -> None:
        """Verdicts in float64 for what stood alone."""
        pairs = {theirs: ours for ours, theirs in self.blocks.items()}
        pairs |= {p: self.maps.holders(p)[-1] for p in self.reference.outside}
        casts = cast_disagreement(self.reference.casts, self.candidate.casts, {**pairs, "": ""})
        for key in high:
            path = self._place(key).module
            at = [f"{holder}{'.' if holder == '=' else '#'}" for holder in self.maps.holders(path)]
            mine = []
            for slips in (ours_low, ours_high):
                near = {k: self.candidate.shelf.get(s) for k, s in slips.items() if k.startswith(tuple(at))}
                mine.append(self.maps.read(self._place(key), high[key].shape, near))
            a, b = mine
            if isinstance(a, str) or isinstance(b, str):
                if path in self.reference.outside:  # the blocks that it feeds, and the output, are compared
                    self.unread[path] = a if isinstance(a, str) else str(b)
                else:
                    self.exact[key] = skipped(key, a if isinstance(a, str) else str(b))
                continue
            get = self.reference.shelf.get
            value = _value(key, get(low[key]), get(high[key]))
            found = casts.get("" if path == "=" else path, "")
            flat, exact = a.reshape(-1).float(), b.reshape(-1).double()
            self.exact[key] = judge(key, value, flat, exact, gate=self.gate, casts=found)
        for kind in {self._kind(at) for at in self.alone}:
            alike = {at: self._outs(self.exact, at) for at in self.alone if self._kind(at) == kind}
            self.floors[kind] = max(v.floor / max(1.0, v.peak) for found in alike.values() for v in found)
            worst = max(alike, key=self._difference)
            if all(v.passed for v in alike[worst]):
                self.worst[kind] = worst

    def _settle(self) -> None:
        """Verdicts for what did not run in float64: nothing of its kind differs more than what did."""
        known = {self._pairs[k]: v for k, v in self.exact.items() if k in self._pairs and v.passed}
        around = [v for k, v in self.exact.items() if k.rpartition(".out.")[0] not in self.alone and v.passed]
        around += [v for at in self.unhanded for v in self._outs(self.reset, at)]
        carried = max([_EPS, *(v.scaled for v in around if math.isfinite(v.scaled))])
        for key, verdict in self.exact.items() if self.unhanded else ():
            if key.rpartition(".out.")[0] not in self.alone and verdict.status == DIFFERS:
                why = f"float32 alone: what it is made of differs by {carried:.1e} (scaled)"
                self.exact[key] = settled(replace(verdict, status=SKIPPED), BASELINES * carried, why)
        for key, verdict in self.reset.items():
            at = key.rpartition(".out.")[0] or key.rpartition(".in.")[0]
            kind = self._kind(at)
            if at in self._unforced and ".out." in key:
                self.reset[key] = skipped(key, self._unforced[at])
            elif key in self.exact:
                self.reset[key] = self.exact[key]
            elif ".in." in key:
                same = known.get(self._pairs.get(key, ("", "")))
                why = f"float32 alone: what it is made of differs by {carried:.1e} (scaled)"
                self.reset[key] = replace(same, name=key) if same else settled(verdict, BASELINES * carried, why)
            elif kind in self.worst:
                why = f"float32 alone: {self.worst[kind]} differs no less, and passes in float64"
                self.reset[key] = settled(verdict, math.inf, why)
            else:
                floor = self.floors.get(kind, math.nan)
                why = f"float32 alone: judged by its kind's floor in float64, {floor:.1e} (scaled)"
                self.reset[key] = settled(verdict, BASELINES * floor, why)
        for key, verdict in self.free.items():
            judged = self.reset.get(key, self.exact.get(key))
            if judged is None or not judged.passed:
                status, note = (judged.status, judged.note) if judged else (SKIPPED, "")
                self.free[key] = replace(verdict, status=status, note=note)
            else:
                self.free[key] = settled(verdict, math.inf, "float32, carried from block to block")


def settled(verdict: Verdict, most: float, why: str) -> Verdict:
    """A verdict that float32 left open, decided by the scaled difference that is `most` allowed; NaN allows none."""
    if verdict.status != SKIPPED or not math.isfinite(verdict.max_abs):
        return verdict
    passes = ROUNDING if verdict.scaled <= most else DIFFERS
    return replace(verdict, status=IDENTICAL if verdict.max_abs == 0 else passes, note=why)


def _value(key: str, low: Tensor, high: Tensor) -> Value:
    event = Event(key, tuple(low.shape), "float32", low.numel())
    return Value(event, low.reshape(-1).float(), high.reshape(-1).double())


def _equal(given: Mapping[str, Any], own: Named) -> bool:
    """Whether a reset would change nothing, to the bit."""
    tensors = dict(tensors_of(dict(given)))
    return all(n in own and t.shape == own[n].shape and torch.equal(t, own[n]) for n, t in tensors.items())
