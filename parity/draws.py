"""Random numbers that a run asks for: logged as they are drawn, and given again to another run of the same side."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from parity.compare import DIFFERS, IDENTICAL, ROUNDING, Verdict, skipped

GIVEN, GLOBAL, NUMPY, PYTHON = "a given generator", "torch's global generator", "numpy's global numbers", "random"

_FUNCTIONS = (
    *("rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial", "poisson"),
    *("rand_like", "randn_like", "randint_like"),
)
_METHODS = (
    *("normal_", "uniform_", "random_", "bernoulli_", "exponential_", "cauchy_", "log_normal_", "geometric_"),
    *("bernoulli", "multinomial"),
)
_DRAWS = {getattr(torch, n): f"torch.{n}" for n in _FUNCTIONS} | {getattr(Tensor, n): f"Tensor.{n}" for n in _METHODS}
_INIT = ("normal_", "uniform_", "kaiming_uniform_")
_DRAWS |= {getattr(nn.init, n): f"nn.init.{n}" for n in _INIT}
_NUMPY = (
    *("rand", "randn", "random", "random_sample", "normal", "standard_normal", "uniform", "randint", "choice"),
    *("permutation", "multivariate_normal", "beta", "gamma", "exponential", "poisson", "binomial"),
)
GRIDS = (torch.bfloat16, torch.float16)
_CLOSE = 2.0  # how many half steps of a dtype's grid two draws may lie apart to count as rounded


@dataclass(frozen=True)
class Drawn:
    """One request for random numbers: by which function, from what, where, and the numbers (on the CPU)."""

    function: str
    source: str
    where: str
    values: Tensor = field(default_factory=lambda: torch.empty(0))
    seed: int | None = None
    device: str = "cpu"

    @property
    def origin(self) -> str:
        """`a given generator (seed 7)`."""
        return self.source if self.seed is None else f"{self.source} (seed {self.seed})"

    def to_json(self) -> dict[str, Any]:
        """Plain data, without the numbers."""
        shape, dtype = list(self.values.shape), str(self.values.dtype).removeprefix("torch.")
        named = {"function": self.function, "source": self.source, "seed": self.seed, "where": self.where}
        return named | {"shape": shape, "dtype": dtype, "device": self.device}


class OtherDraws(Exception):
    """A run asked for other random numbers than the one it repeats."""


class Draws(TorchFunctionMode):
    """Logs every draw inside the block; with `replay`, each draw gets the numbers of the same draw in that log.

    Enter it inside of `float64`, so that it sees what the code asked for.

    Raises:
        OtherDraws: with `replay`, the run asks for other draws than the logged one.
    """

    def __init__(self, sink: Callable[[int, Tensor], None], replay: Sequence[Drawn] | None = None) -> None:
        super().__init__()
        self.log: list[Drawn] = []
        self._sink, self._replay = sink, replay

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = _DRAWS.get(func)
        if name is None:
            return out
        if self._replay is not None:
            known = self._replay[len(self.log)] if len(self.log) < len(self._replay) else None
            if known is None or known.values.shape != out.shape:
                raise OtherDraws(f"it draws other random numbers when it runs again: {name} at {_where()}")
            out.copy_(known.values)
        generator = next((a for a in (kwargs.get("generator"), *args) if isinstance(a, torch.Generator)), None)
        given = generator is not None and all(generator is not g for g in _global_generators())
        source, seed = (GIVEN, generator.initial_seed()) if generator is not None and given else (GLOBAL, None)
        self.add(Drawn(name, source, _where(), out.detach().cpu().clone(), seed, str(out.device)))
        return out

    def add(self, drawn: Drawn) -> None:
        """Append to the log."""
        self._sink(len(self.log), drawn.values)
        self.log.append(drawn)


def _global_generators() -> list[torch.Generator]:
    return [torch.default_generator, *(torch.cuda.default_generators if torch.cuda.is_available() else ())]


@contextmanager
def watch_draws(
    seed: int, sink: Callable[[int, Tensor], None] = lambda i, t: None, replay: Sequence[Drawn] | None = None
) -> Iterator[list[Drawn]]:
    """Log all draws inside the block: torch's by function, numpy's global ones; what moved unseen is logged at the end.

    Global generators start from a seed of their own, the same on both sides and other than the request's, so that a
    side that ignores the generator it was given draws other numbers; they are restored afterwards.

    Args:
        sink: called with the index and the numbers of each draw.
        replay: see `Draws`.
    """
    numpy_before, python_before = np.random.get_state(legacy=False), random.getstate()
    own = (seed * 2654435761 + 97) % 2**32
    draws = Draws(sink, replay)

    def logged(name: str, draw: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            out = draw(*args, **kwargs)
            draws.add(Drawn(f"numpy.random.{name}", NUMPY, _where(), torch.as_tensor(np.asarray(out)).clone()))
            return out

        return call

    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng())
        stack.callback(np.random.set_state, numpy_before)
        stack.callback(random.setstate, python_before)
        torch.manual_seed(own)
        np.random.seed(own)
        random.seed(own)
        states = torch.get_rng_state().tolist(), _numpy_state(), random.getstate()
        for name in _NUMPY:
            stack.enter_context(patch.object(np.random, name, logged(name, getattr(np.random, name))))
        with draws:
            yield draws.log
        seen = {d.source for d in draws.log}
        moved = {
            GLOBAL: states[0] != torch.get_rng_state().tolist(),
            NUMPY: states[1] != _numpy_state(),
            PYTHON: states[2] != random.getstate(),
        }
        for source in (s for s, changed in moved.items() if changed and s not in seen):
            draws.add(Drawn("unseen", source, "its state changed during the run"))


def _numpy_state() -> tuple[bytes, int]:
    state = np.random.get_state(legacy=False)["state"]
    return state["key"].tobytes(), state["pos"]


def _where() -> str:
    """Who asked: `stages.latent_preparation:31`, behind it its caller in another file; torch and this file left out."""
    found: list[str] = []
    frame = sys._getframe(1)
    while frame.f_back is not None and len(found) < 2:
        name = frame.f_globals.get("__name__", "?")
        if name != __name__ and name.partition(".")[0] not in ("torch", "numpy", "contextlib", "unittest"):
            place = ".".join(name.split(".")[-2:])
            if not found or found[0].rpartition(":")[0] != place:
                found.append(f"{place}:{frame.f_lineno}")
        frame = frame.f_back
    return " < ".join(found)


def on_grid(values: Tensor) -> str:
    """The coarsest dtype whose grid holds all numbers, `bfloat16` or `float16`; empty for finer ones and for few."""
    if not values.is_floating_point() or values.numel() < 8:
        return ""
    fits = (g for g in GRIDS if torch.equal(values.to(g).double(), values.double()))
    return next((str(g).removeprefix("torch.") for g in fits), "")


def compare_draws(reference: Sequence[Drawn], candidate: Sequence[Drawn], dtype: torch.dtype) -> Mapping[str, Verdict]:
    """One verdict for each draw of either side, by `draw 0`, `draw 1` …

    The same numbers are demanded; in low precision (`dtype`) numbers pass that differ by no more than its rounding.
    Another source, seed or dtype stands in the note. Both sides may cut the same numbers into other pieces.
    """
    pieces = [d.values.shape for d in reference] != [d.values.shape for d in candidate]
    if pieces and reference and candidate:
        a, b = (torch.cat([d.values.reshape(-1).double() for d in side]) for side in (reference, candidate))
        if torch.equal(a, b) and {d.source for d in reference} == {d.source for d in candidate}:
            note = f"the same numbers in other pieces: {len(reference)} draws there, {len(candidate)} here"
            same = [_verdict(f"draw {i}", IDENTICAL, d.values, d.values, note) for i, d in enumerate(reference)]
            return {v.name: v for v in same}
    found = {}
    for i in range(max(len(reference), len(candidate))):
        name = f"draw {i}"
        if i >= len(candidate):
            lacking = reference[i]
            found[name] = skipped(name, f"on the candidate's side: never drawn ({lacking.function} at {lacking.where})")
        elif i >= len(reference):
            more = candidate[i]
            at = f"{more.function} from {more.origin} at {more.where}"
            found[name] = skipped(name, f"on the reference's side: never drawn (here {at})")
        else:
            found[name] = _judge(name, reference[i], candidate[i], dtype)
    return found


def _judge(name: str, a: Drawn, b: Drawn, dtype: torch.dtype) -> Verdict:
    notes = []
    if a.source != b.source:
        notes.append(f"from {a.origin} there ({a.where}), from {b.origin} here ({b.where})")
    elif a.seed != b.seed:
        notes.append(f"seed {a.seed} there, {b.seed} here ({b.where})")
    if a.values.dtype != b.values.dtype:
        notes.append(f"drawn in {a.values.dtype} there, {b.values.dtype} here ({b.where})".replace("torch.", ""))
    if a.values.shape != b.values.shape:
        shapes = f"shape {tuple(a.values.shape)} there, {tuple(b.values.shape)} here"
        return Verdict(name, DIFFERS, of=a.values.numel(), note="; ".join([shapes, *notes]))
    equal = torch.equal(a.values.double(), b.values.double())
    grids = on_grid(a.values), on_grid(b.values)
    if not equal and grids[0] != grids[1]:
        side, grid = ("candidate", grids[1]) if grids[1] else ("reference", grids[0])
        notes.append(f"the {side}'s numbers all lie on {grid}'s grid")
    # Equal numbers from torch's global generator: it was seeded inside, as this run's own seed is another. Noted.
    status = IDENTICAL if equal else DIFFERS
    if status == DIFFERS and a.source == b.source and dtype in GRIDS:
        step = torch.finfo(dtype).eps / 2 * a.values.double().abs()
        close = (a.values.double() - b.values.double()).abs() <= _CLOSE * step
        status = ROUNDING if bool(close.all()) else DIFFERS
    if status == DIFFERS and not notes:
        notes.append(f"other numbers from {b.origin}, {b.function} at {b.where}; there {a.function} at {a.where}")
    return _verdict(name, status, a.values, b.values, "; ".join(notes))


def _verdict(name: str, status: str, a: Tensor, b: Tensor, note: str) -> Verdict:
    if not a.numel():
        return Verdict(name, status, max_abs=0.0, max_abs64=0.0, note=note)
    gap, peak = (a.double() - b.double()).abs(), float(a.double().abs().max())
    found = Verdict(name, status, float(gap.max()), float(gap.max()), float(gap.mean()), 0.0, 0.0, peak, note=note)
    return replace(found, elements=a.numel(), of=a.numel())
