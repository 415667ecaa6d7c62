"""What float32 rounded before a model ever ran: tables that a class computes, weights that a conversion computes.

Stand-alone with `recorder.py`. In the arbiter's float64 runs such numbers take their exact values, as all others do;
otherwise a table that one side keeps and the other computes as it goes would look like a difference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from parity.recorder import float64, held, seeded, told

Rounded = tuple[Tensor, Tensor]
_APART = 1e-2  # how far rounding can take a number, of the tensor's largest: sines of large angles lose most
_MOST = 1 << 28  # numbers in a module that is built twice
_WIDE = (torch.float64, torch.complex128)


def rounded(low: Mapping[str, Tensor], high: Mapping[str, Tensor]) -> dict[str, Rounded]:
    """Of tensors computed in float32 and again in float64, those that rounding changed -> both."""
    found = {}
    for name, tensor in low.items():
        wide = high.get(name)
        floats = tensor.is_floating_point() or tensor.is_complex()
        if wide is None or not floats or wide.shape != tensor.shape or wide.dtype not in _WIDE or not tensor.numel():
            continue
        gap = (tensor.to(wide) - wide).abs()
        if 0 < float(gap.max()) <= _APART * float(wide.abs().max()):
            found[name] = (tensor.detach().clone(), wide.detach().clone())
    return found


@torch.no_grad()
def tables(module: nn.Module, build: Callable[[], nn.Module], seed: int, notes: list[str]) -> dict[str, Rounded]:
    """Buffers and other tensors beside trained weights of a just built module, as `build` makes them in float64.

    What does not build in float64 keeps its float32 tables, and `notes` says so: the verdict shows what that changes.
    """
    own = {n: t for n, t in held(module) if t.is_floating_point() or t.is_complex()}
    own = {n: t for n, t in own.items() if not (isinstance(t, nn.Parameter) and t.requires_grad)}
    if not own:
        return {}
    whose = type(module).__name__
    if sum(p.numel() for p in module.parameters()) > _MOST:
        notes.append(f"{whose} is not built a second time for its size: what it computes in building stays in float32")
        return {}
    seeded(seed)
    try:
        with float64():
            twin = build()
    except (Exception, SystemExit) as error:
        what = told(error)
        notes.append(f"{whose} does not build in float64, so what it computes in building stays in float32 ({what})")
        return {}
    return rounded(own, dict(held(twin)))
