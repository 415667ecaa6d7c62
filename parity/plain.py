"""Modules without weights (norms, activations, sinusoids): nothing aligns them, so they are paired by what they get.

Of a step that goes wrong between two modules with weights they name the part: the reference hands the same numbers to
its module as the candidate to one of its own, and the answers differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from parity.capture import Capture
from parity.preflight import pair_settings
from parity.recorder import attributes, plain_modules
from parity.trace import Trace, split_key

ALIKE = 1e-9  # of the largest number; both sides run in float64


@dataclass(frozen=True)
class Suspect:
    """A pair of modules without weights: the same comes in, something else comes out; or a pair whose `code` does so.

    Attributes:
        settings: how those of both differ.
        code: which part of the candidate's code, between the modules that it calls.
        rows: what its conversion would have to do for the code behind it to match.
    """

    candidate: str
    reference: str
    settings: str = ""
    code: str = ""
    rows: str = ""

    def __str__(self) -> str:
        said = self.settings or self.code or (f"all matches if the conversion {self.rows}" if self.rows else "")
        return f"{self.candidate} ↔ {self.reference}" + (f" ({said})" if said else "")


@dataclass
class Plain:
    """The modules without weights of both sides.

    Attributes:
        own: the candidate's, path -> class.
        settings: of both sides' live modules, by path.
    """

    trace: Trace
    own: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @classmethod
    def of(cls, trace: Trace, module: nn.Module) -> Plain:
        return cls(trace, plain_modules(module), attributes(module))

    def suspect(self, key: str, captured: Capture, since: str = "") -> Suspect | None:
        """The last pair before the event `key`, and behind `since`, of which only the answers differ.

        Args:
            captured: the candidate's run in float64, right up to that event.
        """
        theirs: Mapping[str, str] = self.trace.meta.get("plain", {})
        calls = _calls({k: k.partition("/")[2] for k in self.trace.plain_before(key, since)}, theirs)
        mine = _calls({k: k for k in captured.tensors}, self.own)
        for (path, _), (given, answer) in reversed(calls.items()):
            got, made = (self.trace.value(k).high for k in (given, answer))
            pairs = [
                (ours, captured.tensors[b]) for (ours, _), (a, b) in mine.items() if same(captured.tensors[a], got)
            ]
            if not pairs or any(same(out, made) for _, out in pairs):
                continue
            fitting = {ours for ours, out in pairs if out.numel() == made.numel()}
            named = {ours for ours in fitting if self.own[ours] == theirs[path]} or fitting
            if len(named) == 1:
                ours = named.pop()
                return Suspect(ours, path, self.differing(ours, path))
        return None

    def differing(self, ours: str, theirs: str) -> str:
        """Settings of two modules that differ."""
        settings = self.trace.meta.get("attributes", {}).get(theirs, {})
        return pair_settings(settings, self.settings.get(ours, {}))


def _calls(keys: Mapping[str, str], of: Mapping[str, str]) -> dict[tuple[str, str], tuple[str, str]]:
    """(module, call) -> keys of its one input and its one output; modules of `of` only.

    Args:
        keys: key -> `<module>#<call>.<in|out>.<name>`.
    """
    found: dict[tuple[str, str], dict[str, list[str]]] = {}
    for key, event in keys.items():
        if event.startswith("="):
            continue
        where, kind, _ = split_key(event)
        path, _, call = where.rpartition("#")
        if path in of:
            found.setdefault((path, call), {}).setdefault(kind, []).append(key)
    return {
        at: (kinds["in"][0], kinds["out"][0])
        for at, kinds in found.items()
        if len(kinds.get("in", ())) == len(kinds.get("out", ())) == 1
    }


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same numbers, in any order."""
    if a.numel() != b.numel() or not a.numel():
        return False
    x, y = (t.double().reshape(-1).sort().values for t in (a, b))
    return bool((x - y).abs().max() <= ALIKE * max(1.0, float(y.abs().max())))
