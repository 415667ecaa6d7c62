"""A case's reference as its class makes it, and the weights it gets. Runs beside it (see `parity/reference.py`)."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Collection, Mapping

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from parity import stubs
from parity.case import Case
from parity.drawn import draw
from parity.loading import CaseError
from parity.recorder import seeded, told
from parity.tied import tied, with_all_names

ALSO = "also missing: "  # before the names of further packages


def built_dtypes(module: nn.Module) -> dict[str, int]:
    """How many tensors of its state a module is built with in which dtype."""
    return dict(Counter(str(t.dtype).removeprefix("torch.") for t in module.state_dict().values()))


def built(case: Case, seed: int) -> nn.Module:
    """The reference's module, as its class makes it.

    Raises:
        CaseError: it does not build, or is no module.
    """
    seeded(seed)
    try:
        module = case.reference.module(case.config)
    except ModuleNotFoundError as error:
        also = _also_missing(case, error)
        more = f" ({ALSO}{', '.join(also)})" if also else ""
        raise CaseError(f"the reference does not build: {told(error)}{more}") from error
    except (Exception, SystemExit) as error:
        raise CaseError(f"the reference does not build: {told(error)}") from error
    if odd := unfit(module):
        raise CaseError(f"the reference's build returns {odd}")
    return module


def unfit(module: object) -> str:
    """What is wrong with what a `build` returned; empty for a module whose tensors hold numbers."""
    if not isinstance(module, nn.Module):
        return f"{type(module).__name__}, not a torch.nn.Module"
    tensors = itertools.chain(module.named_parameters(), module.named_buffers())
    empty = [name for name, tensor in tensors if tensor.is_meta]
    shown = f"{len(empty)} tensors without numbers, on the device meta: {', '.join(empty[:3])}"
    return f"a module with {shown}; build it on the CPU" if empty else ""


def _also_missing(case: Case, error: BaseException) -> list[str]:
    """The packages that would be missing next: what fails once those before are there, but empty."""
    found: list[str] = []
    with stubs.on_trial():
        while isinstance(error, ModuleNotFoundError) and error.name:
            name = error.name.partition(".")[0]
            if name in found or not stubs.install([name]):
                break
            found.append(name)
            try:
                case.reference.module(case.config)
                break
            except (Exception, SystemExit) as following:
                error = following
    return found[1:]


def state_of(case: Case, module: nn.Module, seed: int, kept: Collection[str]) -> dict[str, Tensor]:
    """The reference's state: from the case's file, or drawn from names and the seed; float32.

    Args:
        kept: of `computed`; this, and what is not floating point, stays as the module made it.

    Raises:
        CaseError: the file's tensors are not the module's.
    """
    own, ties = module.state_dict(), tied(module)
    if case.weights is None:
        return {
            name: tensor.clone() if name in kept else _drawn(ties.get(name, name), tensor, seed)
            for name, tensor in own.items()
        }
    pattern = re.compile(case.keep) if case.keep else None
    try:
        given = load_file(case.weights)
    except Exception as error:  # safetensors' own, OSError and more
        raise CaseError(f"the weights {case.weights} cannot be read: {error}") from error
    given = with_all_names(given, ties)
    free = {name for name in own if pattern and pattern.fullmatch(name)}
    if odd := sorted((own.keys() ^ given.keys()) - free):
        missing, extra = ([n for n in odd if n in of][:3] for of in (own, given))
        raise CaseError(f"{case.weights} is not of this module: missing {missing}, left over {extra}")
    wrong = [name for name in given if name in own and given[name].shape != own[name].shape]
    if wrong:
        shapes = tuple(given[wrong[0]].shape), tuple(own[wrong[0]].shape)
        raise CaseError(f"{case.weights}: {wrong[0]} has shape {shapes[0]}, the module {shapes[1]}")
    for name, earlier in ties.items():
        if not (name in free or given[name].equal(given[earlier])):
            raise CaseError(f"{case.weights}: the module holds {earlier} and {name} as one tensor, the file two")
    return {
        name: (given[name].float() if own[name].is_floating_point() else given[name]) if name in given else own[name]
        for name in own
    }


def _drawn(name: str, tensor: Tensor, seed: int) -> Tensor:
    """Numbers for a tensor of the state; complex ones have both parts drawn, whole ones stay as they are."""
    shape = tuple(tensor.shape)
    if tensor.is_complex():
        parts = (torch.from_numpy(draw(f"{name}.{part}", shape, seed)) for part in ("real", "imaginary"))
        return torch.complex(*parts)
    return torch.from_numpy(draw(name, shape, seed)) if tensor.is_floating_point() else tensor.clone()


def computed(case: Case, module: nn.Module) -> list[str]:
    """The part of a built module's state that its class computes, so that it is not drawn: tables, frequencies.

    `case.keep` names it; besides, buffers, and parameters that are not trained beside others that are, unless all of
    their numbers are zero or one, which is what is filled later.
    """
    kept = re.compile(case.keep) if case.keep else None
    parameters = dict(module.named_parameters(remove_duplicate=False))
    trained = any(p.requires_grad for p in parameters.values())
    found = []
    for name, tensor in module.state_dict().items():
        own = name not in parameters or (trained and not parameters[name].requires_grad)
        filled = bool(((tensor != tensor.flatten()[:1]) | ((tensor != 0) & (tensor != 1))).any())
        if (kept and kept.fullmatch(name)) or (own and filled and bool(tensor.isfinite().all())):
            found.append(name)
    return found


def state_sha256(state: Mapping[str, Tensor]) -> str:
    """One hash of all names, dtypes, shapes and contents of a state."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
