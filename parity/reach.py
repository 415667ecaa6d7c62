"""Which elements of a candidate's activations can reach its output: what no output depends on is not judged.

Text behind a mask is the usual case: implementations leave other numbers in the padding. Elements with a gradient of
exactly zero are proposed; they count as unreachable only where noise in all of them leaves every bit of the output.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from parity.capture import Capture
from parity.case import Named
from parity.recorder import Exact, float64, listen, seeded, tensors_of

_MOST_PARAMETERS = 5e8  # beyond, a run with gradients is too large
_MOST_PROOFS = 48  # one run each

Masks = dict[str, Tensor]  # True where no output is reached
Call = Callable[[Any, Named], Any]


def reachable(
    module: nn.Module,
    call: Call,
    inputs: Named,
    paths: Collection[str],
    seed: int,
    *,
    double: bool,
    exact: Exact | None = None,
) -> Capture | None:
    """Of modules `paths`: 1 for every element of an input or output that may reach an output of the pass, else 0.

    None where nothing can be said: no gradient reaches them, or the module is too large.
    """
    if sum(p.numel() for p in module.parameters()) > _MOST_PARAMETERS:
        return None

    run = partial(_run, module, call, inputs, seed, double, exact)
    try:
        dead = _proposed(module, run, set(paths))
    except RuntimeError:  # code that forbids gradients, or changes in place what needs one
        return None
    proven = _proven(module, run, dead) if dead else {}
    return Capture({key: (~mask).double() for key, mask in proven.items()})


def _proposed(module: nn.Module, run: Callable[[], Any], paths: Collection[str]) -> Masks:
    """Elements whose gradient is exactly zero, by `<module>#<call>.<in|out>.<name>`."""
    seen: Masks = {}

    def sink(key: str, path: str, kind: str, tensor: Tensor) -> None:
        if tensor.requires_grad:
            seen[key] = tensor

    asked = [(p, p.requires_grad) for p in module.parameters()]
    try:
        for parameter, _ in asked:
            parameter.requires_grad_(parameter.is_floating_point())
        with torch.enable_grad(), listen(module, lambda path: path in paths, sink):
            out = run()
            drawn = torch.Generator().manual_seed(0)
            sums = [
                (t * torch.randn(t.shape, generator=drawn).to(t)).sum() for _, t in tensors_of(out) if t.requires_grad
            ]
            if not sums or not seen:
                return {}
            total = torch.stack([s.double() for s in sums]).sum()
            grads = torch.autograd.grad(total, list(seen.values()), allow_unused=True)
    finally:
        for parameter, asks in asked:
            parameter.requires_grad_(asks)
    found = {
        key: torch.ones_like(tensor, dtype=torch.bool) if grad is None else grad == 0
        for (key, tensor), grad in zip(seen.items(), grads, strict=True)
    }
    return {key: mask for key, mask in found.items() if bool(mask.any())}


def unread(
    module: nn.Module, call: Call, inputs: Named, paths: Collection[str], seed: int, *, double: bool,
    exact: Exact | None = None,
) -> set[str]:  # fmt: skip
    """Those of `paths` of whose inputs nothing but shapes and dtypes is used: noise in them leaves every bit."""
    seen: dict[str, Masks] = {}

    def sink(key: str, path: str, kind: str, tensor: Tensor) -> None:
        if kind == "in" and tensor.is_floating_point():
            seen.setdefault(path, {})[key] = torch.ones_like(tensor, dtype=torch.bool)

    run = partial(_run, module, call, inputs, seed, double, exact)
    with torch.no_grad():
        with listen(module, lambda path: path in paths, sink):
            run()
        return {path for path, masks in list(seen.items())[:_MOST_PROOFS] if _holds(module, run, masks)}


def _run(module: nn.Module, call: Call, inputs: Named, seed: int, double: bool, exact: Exact | None) -> Any:
    seeded(seed)
    kind = torch.float64 if double else torch.float32
    given = {k: (v.to(kind) if v.is_floating_point() else v).clone() for k, v in inputs.items()}
    with float64(module, exact=exact) if double else nullcontext():
        return call(module, given)


def _holds(module: nn.Module, run: Callable[[], Any], masks: Masks) -> bool:
    """Two runs that differ in the noise's size alone: a copied tensor may be summed in another order."""
    found = []
    for size in (0.0, 1.0):
        with _noise(module, masks, size) as put:
            found.append(dict(tensors_of(run(), integers=True)))
    still, noisy = found
    return (
        put == masks.keys() and noisy.keys() == still.keys() and all(map(torch.equal, noisy.values(), still.values()))
    )


@torch.no_grad()
def _proven(module: nn.Module, run: Callable[[], Any], dead: Masks) -> Masks:
    """Those of the proposed elements that noise was put into without a change of the output."""
    if _holds(module, run, dead):
        return dead
    by: dict[str, Masks] = {}
    for key, mask in dead.items():
        by.setdefault(key.rpartition("#")[0], {})[key] = mask
    return {k: m for masks in list(by.values())[:_MOST_PROOFS] if _holds(module, run, masks) for k, m in masks.items()}


@contextmanager
def _noise(module: nn.Module, masks: Mapping[str, Tensor], size: float) -> Iterator[set[str]]:
    """Noise in the masked elements of what modules take and answer; yields the keys that got it."""
    calls: dict[str, int] = {}
    put: set[str] = set()
    handles = []

    def noisy(value: Any, key: str) -> Any:
        """Tensors by themselves, in tuples, lists and mappings, under the names that `tensors_of` gives them."""
        if isinstance(value, Tensor) and key in masks:
            put.add(key)
            drawn = torch.randn(value.shape, generator=torch.Generator().manual_seed(1)).to(value)
            return torch.where(masks[key], value + size * drawn * (1 + value.abs().max()), value)
        if type(value) in (tuple, list):
            return type(value)(noisy(v, f"{key}.{i}") for i, v in enumerate(value))
        return {k: noisy(v, f"{key}.{k}") for k, v in value.items()} if type(value) is dict else value

    def enter(path: str) -> Any:
        def hook(m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            at = f"{path}#{calls.setdefault(path, 0)}.in"
            signature = inspect.signature(m.forward)
            bound = signature.bind(*args, **kwargs)
            for name, value in bound.arguments.items():
                extra = signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
                bound.arguments[name] = noisy(value, at if extra else f"{at}.{name}")
            return bound.args, bound.kwargs

        return hook

    def leave(path: str) -> Any:
        def hook(m: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
            at = f"{path}#{calls[path]}.out"
            calls[path] += 1
            return noisy(out, f"{at}.0" if isinstance(out, Tensor) else at)

        return hook

    for path in {key.rpartition("#")[0] for key in masks}:
        handles.append(module.get_submodule(path).register_forward_pre_hook(enter(path), with_kwargs=True))
        handles.append(module.get_submodule(path).register_forward_hook(leave(path)))
    try:
        yield put
    finally:
        for handle in handles:
            handle.remove()
