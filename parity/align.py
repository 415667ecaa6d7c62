"""Which module of the port answers to which of the reference: read off the compiled recipe, never guessed by order.

A leaf owns weights, and the plan says which rows of its weights went where, so the same rows of its output went there:
one fused projection of the reference is compared with three of the port, swapped halves are swapped back. A container
corresponds to the module that holds the counterparts of all its leaves.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from parity.capture import Capture
from parity.case import Candidate
from parity.trace import Trace, split_key

NEVER_RAN = "never ran"  # of a module that one side called and the other did not


@dataclass(frozen=True)
class Part:
    """Rows `target` of module `candidate` hold rows `source` of the reference module; None means all."""

    candidate: str
    source: tuple[int, int] | None = None
    target: tuple[int, int] | None = None


@dataclass
class Alignment:
    """Leaves of the reference with the parts that hold them, and the rule that put them there."""

    parts: dict[str, tuple[Part, ...]]
    rules: dict[str, str] = field(default_factory=dict)

    @classmethod
    def identity(cls, modules: Iterable[str]) -> Alignment:
        """Both sides name their modules alike."""
        return cls({path: (Part(path),) for path in modules})

    @classmethod
    def of_plan(cls, plan: Any) -> Alignment:
        """From a TensorPlan's module map."""
        parts: dict[str, list[Part]] = {}
        rules: dict[str, str] = {}
        for entry in plan.module_map():
            part = Part(entry.target, entry.source_rows, entry.target_rows)
            if part not in parts.setdefault(entry.source, []):
                parts[entry.source].append(part)
            rules.setdefault(entry.source, entry.rule)
        return cls({k: tuple(v) for k, v in parts.items()}, rules)

    def single(self, reference: Mapping[str, str], candidate: Mapping[str, str]) -> Alignment:
        """The same with every module by its first path, where it has several: further paths -> first, of each side."""
        parts: dict[str, tuple[Part, ...]] = {}
        for path, mine in self.parts.items():
            named = (replace(part, candidate=candidate.get(part.candidate, part.candidate)) for part in mine)
            first = reference.get(path, path)
            parts[first] = tuple(dict.fromkeys([*parts.get(first, ()), *named]))
        return Alignment(parts, {reference.get(path, path): rule for path, rule in reversed(self.rules.items())})

    def leaves(self, path: str) -> list[str]:
        """Reference leaves at or below a reference module."""
        return [leaf for leaf in self.parts if leaf == path or not path or leaf.startswith(path + ".")]

    def counterpart(self, path: str) -> str | None:
        """The candidate module that holds what reference module `path` holds; None if no weights say so."""
        leaves = self.leaves(path)
        paths = sorted({part.candidate for leaf in leaves for part in self.parts[leaf]})
        if not paths:
            return None
        if path in self.parts:
            return paths[0] if len(paths) == 1 else common_path(paths)
        if len(paths) == 1:  # one leaf, so many steps below: climb as many
            depth = leaves[0].count(".") - path.count(".")
            return paths[0].rsplit(".", depth)[0]
        return common_path(paths)

    def behind(self, candidate: str) -> list[str]:
        """Reference leaves whose weights a candidate module holds."""
        return [
            leaf
            for leaf, parts in self.parts.items()
            if any(p.candidate == candidate or p.candidate.startswith(candidate + ".") for p in parts)
        ]

    def label(self, path: str) -> str:
        """`candidate ↔ reference` of a reference module, for people; several candidates share their common path."""
        parts = self.parts.get(path, ())
        names = list(dict.fromkeys(p.candidate for p in parts))
        if len(names) > 1:
            stem = common_path(names)
            mine = f"{stem}.{{{','.join(n.removeprefix(stem + '.') for n in names)}}}" if stem else ", ".join(names)
        else:
            mine = names[0] if names else (self.counterpart(path) or "?")
        return f"{mine} ↔ {path}" if path else mine

    def rule(self, path: str) -> str:
        """The recipe rule behind a reference module; of a container, its leaves' rules."""
        rules = dict.fromkeys(self.rules[leaf] for leaf in self.leaves(path) if leaf in self.rules)
        return "; ".join(list(rules)[:2]) + ("; …" if len(rules) > 2 else "")


@dataclass(frozen=True)
class Place:
    """A recorded event: module (`=` is the pass itself), call, `in` or `out`, and name.

    `position` is its place among the call's events of this kind, `inputs` the shapes of the call's recorded inputs.
    `share` is, of a module that is called several times, where this call's samples lie in all of them, and how many
    these are: begin, end, all.
    """

    module: str
    call: int
    kind: str
    name: str
    position: int = 0
    inputs: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    share: tuple[int, int, int] | None = None

    @classmethod
    def of(cls, trace: Trace, key: str, position: int = 0) -> Place:
        """The place of an event key."""
        where, kind, name = split_key(key)
        module, _, call = where.partition("/")[2].partition("#")
        prefix = f"{where}.in."
        shapes = {k.removeprefix(prefix): trace.events[k].shape for k in trace.beside(where, "in")}
        return cls(module, int(call or 0), kind, name, position, shapes, _share(trace, key))


def _share(trace: Trace, key: str) -> tuple[int, int, int] | None:
    where, kind, name = split_key(key)
    module, mark, call = where.partition("#")
    counts: list[int] = []
    while mark and (event := trace.events.get(f"{module}#{len(counts)}.{kind}.{name}")) and event.shape:
        counts.append(event.shape[0])
    if len(counts) < 2 or int(call) >= len(counts):
        return None
    begin = sum(counts[: int(call)])
    return begin, begin + counts[int(call)], sum(counts)


def read(
    captured: Capture, alignment: Alignment, candidate: Candidate, place: Place, shape: tuple[int, ...]
) -> Tensor | str:
    """The candidate's counterpart of a recorded event in the reference's layout and `shape`, or why there is none."""
    path, call, kind, name = place.module, place.call, place.kind, place.name
    if path == "=":
        found = captured.tensors.get(f"=.{kind}.{name}")
        if found is None:
            return "the candidate returned no such output"
        # What the user gets is not bent: a case's `call` brings answers of other shapes together.
        return found if tuple(found.shape) == shape else f"shape {tuple(found.shape)}, reference {shape}"
    block = next((b for b in candidate.blocks if b.matches(path)), None)
    if block or path not in alignment.parts:
        ours = alignment.counterpart(path)
        if ours is None:
            return "no weights say which module answers to it, and the case declares none"
        own = {k: captured.at(f"{ours}#{call}.{k}") for k in ("in", "out")}
        if not own[kind]:
            return f"{ours} {NEVER_RAN} (call {call})"
        if block:
            named = (block.inputs if kind == "in" else block.outputs)(own[kind], place.inputs)
            return fit(named[name], shape) if name in named else f"{ours} has no counterpart of {kind} {name}"
        tensors, at = list(own[kind].values()), place.position
        return fit(tensors[at], shape) if at < len(tensors) else f"{ours} has no {kind} {at}"
    own_parts: dict[str, Tensor] = {}
    parts = alignment.parts[path]
    if kind == "in":  # of several that take the same, the first to run: later ones may find it set right already
        first = captured.first((part.candidate for part in parts), call)
        parts = tuple(part for part in parts if part.candidate == first)[:1]
        alignment = Alignment({path: parts})
    for part in parts:
        own_part = list(captured.at(f"{part.candidate}#{call}.{kind}").values())
        if place.share and not captured.at(f"{part.candidate}#1.{kind}"):  # called once for all of them
            begin, end, count = place.share
            whole = captured.at(f"{part.candidate}#0.{kind}").values()
            own_part = [t[begin:end] for t in whole if t.ndim and t.shape[0] == count] or own_part
        if not own_part:
            return f"{part.candidate} {NEVER_RAN} (call {call})"
        at = place.position if kind == "in" and len(own_part) > 1 else 0
        if at >= len(own_part):
            return f"{part.candidate} has no in {at}"
        own_parts[part.candidate] = own_part[at]
    return gather(alignment, candidate, place, shape, own_parts)


def gather(
    alignment: Alignment, candidate: Candidate, place: Place, shape: tuple[int, ...], own: Mapping[str, Tensor]
) -> Tensor | str:
    """What the candidate's modules `own` (path -> tensor) hold of a reference leaf, in its `shape`, or why not."""
    path, out = place.module, place.kind == "out"
    pieces: dict[int, Tensor] = {}
    for part in alignment.parts[path] if out else alignment.parts[path][:1]:
        tensor = own[part.candidate]
        if out and part.target is not None:
            axis = channels(tensor)
            if tensor.shape[axis] < part.target[1]:
                return f"{part.candidate} answers with shape {tuple(tensor.shape)}, its weights have more rows"
            tensor = tensor.narrow(axis, part.target[0], part.target[1] - part.target[0])
        first = part.source[0] if part.source else 0
        if first in pieces and not torch.equal(pieces[first], tensor):  # copies of the same weights
            return f"{part.candidate} answers otherwise than another copy of {path}"
        pieces[first] = tensor
    rows = [pieces[first] for first in sorted(pieces)]
    first_part = min(alignment.parts[path], key=lambda part: part.source[0] if part.source else 0)
    try:
        whole = rows[0] if len(rows) == 1 else torch.cat(rows, channels(rows[0], _rows(first_part.source)))
    except RuntimeError as error:
        return f"its parts do not fit together: {error}"
    return fit(candidate.layout(path, shape, whole), shape)


def scatter(
    alignment: Alignment, candidate: Candidate, place: Place, value: Tensor, own: Mapping[str, Tensor]
) -> dict[str, Tensor] | str:
    """The other way: a reference leaf's `value` put into the tensors of the candidate's modules, or why it cannot be.

    Numbers that name their place go through `gather`; where they arrive, the value's elements are taken from.
    """
    names = list(dict.fromkeys(part.candidate for part in alignment.parts[place.module]))
    names = names if place.kind == "out" else names[:1]
    if any(name not in own for name in names):
        return "a part of it never ran"
    starts, at = {}, 0
    for name in names:
        starts[name], at = at, at + own[name].numel()
    ids = {
        name: torch.arange(own[name].numel(), dtype=torch.float64).add(starts[name] + 1).reshape(own[name].shape)
        for name in names
    }
    buffer = torch.cat([own[name].reshape(-1) for name in names])
    for chosen in _copies(alignment.parts[place.module]) if place.kind == "out" else [alignment.parts[place.module]]:
        found = gather(Alignment({place.module: chosen}), candidate, place, tuple(value.shape), ids)
        if isinstance(found, str):
            return found
        flat = found.reshape(-1).long()  # zero: a border, which the candidate makes itself
        there, values = flat[flat > 0] - 1, value.reshape(-1).to(buffer)[flat > 0]
        buffer[there] = values
        if not torch.equal(buffer[there], values):
            return "its layout is not a rearrangement"
    return {name: buffer[starts[name] : starts[name] + own[name].numel()].reshape(own[name].shape) for name in names}


def _copies(parts: tuple[Part, ...]) -> list[tuple[Part, ...]]:
    """Parts with every copy of the same rows in one of the results."""
    by: dict[tuple[int, int] | None, list[Part]] = {}
    for part in parts:
        by.setdefault(part.source, []).append(part)
    most = max(len(same) for same in by.values())
    return [tuple(same[min(i, len(same) - 1)] for same in by.values()) for i in range(most)]


def channels(tensor: Tensor, rows: int = 0) -> int:
    """Where a layer's output rows lie: the axis of `rows`, or axis 1 of a feature map (B, C, H, W), else the last."""
    if tensor.ndim > 3 and (tensor.shape[1] == rows) != (tensor.shape[-1] == rows):
        return 1 if tensor.shape[1] == rows else -1
    return 1 if tensor.ndim == 4 else -1


def _rows(span: tuple[int, int] | None) -> int:
    return span[1] - span[0] if span else 0


def fit(tensor: Tensor, shape: tuple[int, ...]) -> Tensor | str:
    """Bring a linear's (B, H * W, C) or (B, C, H * W) to a 1 x 1 convolution's (B, C, H, W); nothing else is bent.

    -> the tensor in `shape`, or why that cannot be.
    """
    if tuple(tensor.shape) == shape:
        return tensor
    if len(shape) == 4 and tensor.ndim == 3:
        b, c, h, w = shape
        if tuple(tensor.shape) == (b, c, h * w) and h * w != c:
            return tensor.reshape(shape)
        if tuple(tensor.shape) == (b, h * w, c) and h * w != c:
            return tensor.transpose(1, 2).reshape(shape)
    return f"shape {tuple(tensor.shape)}, reference {shape}"


def common_path(paths: list[str]) -> str:
    """The longest module path that all paths begin with."""
    split = [p.split(".") for p in paths]
    stem: list[str] = []
    for names in zip(*split, strict=False):
        if len(set(names)) > 1:
            break
        stem.append(names[0])
    return ".".join(stem)
