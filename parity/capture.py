"""Running a candidate and keeping its activations, free or with each block's inputs reset to the reference's."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from parity.recorder import Dtypes, Exact, Singles, answers, bind, float64, listen, lossy, owner, tensors_of, uncompiled

Forcing = Mapping[str, Callable[[int, Mapping[str, Tensor]], Mapping[str, Tensor]]]


@dataclass
class Capture:
    """Activations of one pass: `tensors` by `<module>#<call>.<in|out>.<name>`, the output under `=`.

    `producers` names, for each captured input, the innermost module whose output it is; inputs computed in between by
    plain operations have none. Inputs that are one and the same tensor have one number in `handed`. `casts` holds the
    floating-point dtypes computed inside each module. `ran` are modules that were called, or whose parameters were
    computed with; `untouched` are the outermost one's own of which none was. `singles`: see `recorder.Singles`.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    handed: dict[str, int] = field(default_factory=dict)
    producers: dict[str, str] = field(default_factory=dict)
    casts: dict[str, list[str]] = field(default_factory=dict)
    ran: set[str] = field(default_factory=set)
    untouched: set[str] = field(default_factory=set)
    singles: set[str] = field(default_factory=set)
    _places: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def at(self, place: str) -> Mapping[str, Tensor]:
        """What `<module>#<call>.<in|out>` received or returned, by name; for a finished run."""
        if sum(map(len, self._places.values())) != len(self.tensors):
            self._places = {}
            for key, tensor in self.tensors.items():
                path, mark, rest = key.partition("#")
                call, kind, name = rest.split(".", 2) if mark else ("", "", "")
                self._places.setdefault(f"{path}#{call}.{kind}", {})[name] = tensor
        return self._places.get(place, {})

    def first(self, modules: Iterable[str], call: int) -> str:
        """Which of these modules took something first in a call; of a finished run. The first named where none did."""
        names = list(modules)
        if len(names) == 1:
            return names[0]
        self.at("")
        order = {place: i for i, place in enumerate(self._places)}
        return min(names, key=lambda name: order.get(f"{name}#{call}.in", len(order)))


@torch.no_grad()
def capture(
    module: nn.Module,
    call: Callable[[nn.Module, Mapping[str, Tensor]], Any],
    inputs: Mapping[str, Tensor],
    *,
    double: bool,
    forcing: Forcing | None = None,
    isolation: Callable[[nn.Module], AbstractContextManager[None]] | None = None,
    dtype: str = "",
    device: str = "cpu",
    exact: Exact | None = None,
) -> Capture:
    """Run `call(module, inputs)` and keep what every submodule received and returned.

    Args:
        inputs: named tensors; floating-point ones are cast to the run's precision.
        double: run in float64 under the arbiter.
        forcing: module path -> (call index, the module's own inputs) -> arguments to replace before it runs.
        dtype: run in this lossy dtype instead of float32.
        device: where the module is; what is kept comes to the CPU.
        exact: see `recorder.float64`.
        isolation: what gives the reference's values to leaves, after their own were kept (`Isolation.of`).
    """
    result = Capture()
    made: dict[int, tuple[Tensor, str]] = {}  # id -> the tensor itself (kept alive, so that ids stay unique), its maker

    given: list[Tensor] = []  # kept alive for the same reason

    def sink(key: str, path: str, kind: str, tensor: Tensor) -> None:
        if kind == "in":
            given.append(tensor)
            result.handed[key] = id(tensor)
            maker = made.get(id(tensor))
            if maker:
                result.producers[key] = maker[1]
        else:
            made.setdefault(id(tensor), (tensor, path))
        result.tensors[key] = _kept(tensor)

    dtypes = Singles() if double else Dtypes()
    kind = torch.float64 if double else getattr(torch, dtype or "float32")
    values = {k: (v.to(kind) if v.is_floating_point() else v).to(device) for k, v in inputs.items()}
    with ExitStack() as stack:
        stack.enter_context(uncompiled())
        if double:
            stack.enter_context(float64(module, exact=exact))
        if dtype:
            stack.enter_context(lossy(module, kind))
        for path, forced in (forcing or {}).items():
            stack.enter_context(_forced(module.get_submodule(path), forced))
        result.ran = stack.enter_context(listen(module, lambda path: True, sink, dtypes))
        if isolation is not None:
            stack.enter_context(isolation(module))
        stack.enter_context(dtypes)
        out = call(module, values)
    for name, tensor in answers(out):
        result.tensors[f"=.out.{name}"] = _kept(tensor)
    used = [n for n, p in module.named_parameters(remove_duplicate=False) if id(p) in dtypes.used]
    result.ran = {*result.ran, *(owner(n.rpartition(".")[0]) for n in used)}
    result.untouched = {n for n, p in module.named_parameters(recurse=False) if id(p) not in dtypes.used}
    result.casts = {path: sorted(seen) for path, seen in dtypes.seen.items()}
    result.singles = dtypes.mixed if isinstance(dtypes, Singles) else set()
    return result


def _kept(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


@contextmanager
def _forced(module: nn.Module, forced: Callable[[int, Mapping[str, Tensor]], Mapping[str, Tensor]]) -> Iterator[None]:
    """Replace arguments of `module` by name on every call inside the block."""
    signature = inspect.signature(module.forward)
    calls = 0

    def hook(m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        nonlocal calls
        bound = signature.bind(*args, **kwargs)
        bound.arguments.update(forced(calls, dict(tensors_of(bind(m, args, kwargs)))))
        calls += 1
        return bound.args, bound.kwargs

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
