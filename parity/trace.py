"""Reading traces: what the recorder wrote, with float32 and float64 values of every event."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from parity.recorder import SCHEMA, Event, Recording
from porter.core.errors import CheckpointError, MissingError


@dataclass(frozen=True)
class Value:
    """One recorded tensor: flat samples `low` (float32) and `high` (float64) of a tensor of `shape`."""

    event: Event
    low: Tensor
    high: Tensor

    @property
    def complete(self) -> bool:
        """Whether every element is there."""
        return self.low.numel() == torch.Size(self.event.shape).numel()

    def tensor(self, double: bool) -> Tensor:
        """The whole tensor in its shape; only for complete values."""
        return (self.high if double else self.low).reshape(self.event.shape)


class Trace:
    """A recorded run. `events` keep the order of execution; keys are `<pass>/<module>#<call>.<in|out>.<name>`.

    Events of modules without weights, which the metadata's `plain` lists, and of those around others (`around`) are
    no `events`; `keys` and `value` know them too.
    """

    def __init__(self, meta: Mapping[str, Any], events: list[Event], tensors: Mapping[str, Tensor]) -> None:
        self.meta, self._tensors = dict(meta), tensors
        apart = {*self.meta.get("plain", {}), *self.meta.get("around", ())}
        self._order = {e.key: e for e in events}
        self.events = {key: e for key, e in self._order.items() if not apart or _module(key) not in apart}
        self._calls: dict[str, list[str]] = {}
        for key in self._order:
            where, kind, _ = split_key(key)
            self._calls.setdefault(f"{where}.{kind}", []).append(key)

    @classmethod
    def of(cls, recording: Recording) -> Trace:
        """A trace that was never written to disk."""
        return cls(recording.meta, recording.events, recording.tensors)

    @classmethod
    def open(cls, path: Path) -> Trace:
        """Read a trace file; raises MissingError or CheckpointError."""
        if not path.is_file():
            raise MissingError(f"no trace at {path}", hint="record one with the family's record command, see docs/")
        try:
            with safe_open(str(path), "pt") as f:
                document = json.loads((f.metadata() or {}).get("trace", "{}"))
                tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118 (safe_open has no iterator)
        except (SafetensorError, ValueError, OSError) as error:
            raise CheckpointError(f"{path.name} is not a readable trace", found=str(error)) from error
        document = document if isinstance(document, dict) else {}
        if document.get("schema") != SCHEMA:
            raise CheckpointError(f"{path.name} is not a trace", expected=SCHEMA, found=str(document.get("schema")))
        wrong = [name for name, kind in _META.items() if name in document and not isinstance(document[name], kind)]
        try:
            events = [_event(row) for row in document.pop("events")]
        except (KeyError, TypeError, ValueError) as error:
            wrong.append(f"events: {error}")
        if wrong:
            raise CheckpointError(f"{path.name} is a trace that cannot be used", found=", ".join(wrong))
        lost = [e.key for e in events if e.stored not in tensors or e.stored + "|delta" not in tensors]
        if lost:
            raise CheckpointError(f"{path.name} lacks tensors that it lists", found=", ".join(lost[:3]))
        odd = [e.key for e in events if not _fits(e, tensors[e.stored], tensors[e.stored + "|delta"])]
        if odd:
            what = "tensors of another size or dtype than it lists"
            raise CheckpointError(f"{path.name} is a trace that cannot be used: {what}", found=", ".join(odd[:3]))
        return cls(document, events, tensors)

    @property
    def casts(self) -> dict[str, list[str]]:
        """Module path -> floating-point dtypes computed inside it, in the float32 run."""
        return {path: key.split(",") for key, paths in self.meta.get("casts", {}).items() for path in paths}

    @property
    def passes(self) -> list[str]:
        """Names of the recorded passes, in order."""
        return list(dict.fromkeys(key.partition("/")[0] for key in self.events))

    def keys(self, name: str, path: str, call: int, kind: str) -> list[str]:
        """Events of one call of a module (`in` or `out`) in pass `name`, in order."""
        return self._calls.get(f"{name}/{path}#{call}.{kind}", [])

    def beside(self, where: str, kind: str) -> list[str]:
        """Events of one place, as `split_key` names it."""
        return self._calls.get(f"{where}.{kind}", [])

    def value(self, key: str) -> Value:
        """The tensor of an event."""
        event = self._order[key]
        low = self._tensors[event.stored]
        return Value(event, low, low.double() + self._tensors[event.stored + "|delta"].double())

    def plain_before(self, key: str, since: str = "") -> list[str]:
        """Events of modules without weights in the pass of the event `key`, before it and behind `since`."""
        name = key.partition("/")[0]
        before = list(itertools.takewhile(lambda k: k != key, self._order))
        before = before[before.index(since) + 1 :] if since in before else before
        plain = self.meta.get("plain", {})
        return [k for k in before if _module(k) in plain and k.partition("/")[0] == name]

    def extra(self, prefix: str) -> dict[str, Tensor]:
        """Tensors that are no events, by the beginning of their names."""
        return {key: self._tensors[key] for key in self._tensors if key.startswith(prefix)}

    def modules(self, name: str) -> dict[str, int]:
        """Modules recorded in pass `name` and how often each ran."""
        calls: dict[str, int] = {}
        for key in self.events:
            where, _, _ = split_key(key)
            of, _, call = where.partition("/")
            path, _, index = call.partition("#")
            if of == name and path and index:
                calls[path] = max(calls.get(path, 0), int(index) + 1)
        return calls

    def inputs(self, name: str) -> dict[str, Tensor]:
        """The named inputs of a pass: float32, and whole numbers or booleans in their own dtype."""
        prefix = f"{name}/=.in."
        found = {}
        for key, event in self.events.items():
            if key.startswith(prefix):
                exact = event.dtype == "float32"
                value = self.value(key).tensor(not exact)
                found[key.removeprefix(prefix)] = value if exact else value.round().to(getattr(torch, event.dtype))
        return found


# What other files of parity rely on in a trace's metadata, where it is there.
_META: dict[str, type | tuple[type, ...]] = {
    "events": list, "source": dict, "reference": dict, "casts": dict, "idle": list, "notes": list, "parents": list,
    "attributes": dict, "weights": dict, "seed": int, "float64": bool, "level": str, "component": str, "plain": dict,
    "around": list, "aliases": dict, "singles": list,
}  # fmt: skip


def _module(key: str) -> str:
    return split_key(key)[0].partition("/")[2].rpartition("#")[0]


def _event(row: list[Any]) -> Event:
    """One row of the metadata; raises TypeError, ValueError or CheckpointError where it is none."""
    event = Event(row[0], tuple(row[1]), *row[2:]) if isinstance(row, list) and len(row) > 4 else None
    if event is None or not all(isinstance(size, int) and size >= 0 for size in event.shape):
        raise ValueError(f"{str(row)[:80]} is no row of an event")
    if not isinstance(getattr(torch, str(event.dtype), None), torch.dtype):
        raise ValueError(f"{event.key} has the dtype {event.dtype}")
    split_key(str(event.key))
    return event


def _fits(event: Event, low: Tensor, delta: Tensor) -> bool:
    """Whether stored tensors are what an event says of them."""
    whole = math.prod(event.shape)
    alike = low.dtype == delta.dtype == torch.float32 and low.shape == delta.shape == (event.elements,)
    return alike and (event.elements <= whole) and (whole == 0) == (event.elements == 0)


def split_key(key: str) -> tuple[str, str, str]:
    """`forward/blocks.0#0.out.1` -> (`forward/blocks.0#0`, `out`, `1`); the whole pass is `forward/=`."""
    for kind in ("in", "out"):
        where, dot, name = key.rpartition(f".{kind}.")
        if dot and (where.endswith("/=") or where.rpartition("#")[2].isdigit()):
            return where, kind, name
    raise CheckpointError(f"{key!r} is not an event key", expected="<pass>/<module>#<call>.<in|out>.<name>")
