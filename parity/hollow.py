"""Modules larger than memory: built without weights, each part filled for the time that it runs.

A part is a block, or what holds no block; what stands around blocks (a model's own tables) is a part by itself.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Job = Callable[[], Mapping[str, Tensor]]
Jobs = Callable[[Sequence[str]], Iterable[Job]]  # names of a state -> what makes these tensors, in any order
Around = Callable[[str, int, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
_MAKING = threading.Lock()


@contextmanager
def hollow() -> Iterator[None]:
    """Parameters made inside the block take no memory (`meta`); buffers are computed as ever."""
    register = nn.Module.register_parameter

    def without_memory(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
        register(module, name, parameter)

    with _MAKING:
        nn.Module.register_parameter = without_memory  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            nn.Module.register_parameter = register  # type: ignore[method-assign]


@dataclass(frozen=True)
class Part:
    """State tensors that are filled together while the module `path` runs."""

    path: str
    names: tuple[str, ...]


def parts_of(module: nn.Module, blocks: Sequence[str], names: Iterable[str]) -> list[Part]:
    """The blocks of `module`, and the other parts that hold any of the state tensors `names`; each is in exactly one.

    What a module without a forward of its own holds (a list of parameters) belongs to the module around it.
    """
    wanted = set(names)
    holders = {b for block in blocks for b in _above(block)}
    found: dict[str, list[str]] = {}

    def walk(path: str, child: nn.Module, owner: str) -> None:
        owner = path if type(child).forward is not nn.Module.forward else owner
        prefix = f"{path}." if path else ""
        whole = path in blocks or (path not in holders and owner == path)
        own = child.state_dict(keep_vars=True) if whole else {**child._parameters, **child._buffers}
        found.setdefault(owner, []).extend(prefix + name for name in own if prefix + name in wanted)
        for name, below in child.named_children() if not whole else ():
            walk(prefix + name, below, owner)

    walk("", module, "")
    return [Part(path, tuple(held)) for path, held in found.items() if held or path in blocks]


def _above(path: str) -> Iterator[str]:
    """The paths of the modules around `path`, the outermost (no path) too."""
    while path:
        path = path.rpartition(".")[0]
        yield path


class Streamed:
    """A hollow module whose parts are filled while they run.

    Attributes:
        live: bytes of weights in memory now.
        most: the most there were at once.
        drawn: bytes made in all.
    """

    def __init__(self, module: nn.Module, blocks: Sequence[str], names: Iterable[str], jobs: Jobs) -> None:
        self.module, self.blocks, self.jobs = module, tuple(blocks), jobs
        self.parts = parts_of(module, blocks, names)
        self.live = self.most = self.drawn = 0

    @contextmanager
    def running(self, around: Around | None = None, *, double: bool = False) -> Iterator[None]:
        """Inside the block `module` can be called; weights are float32, or their float64 values.

        Args:
            around: (block, call, its forward, positional and named arguments) -> what the block answers. The weights
                come when that forward is first called, and go when `around` returns; it may call it often, or never.
        """
        with ExitStack() as stack:
            for part in self.parts:
                child = self.module.get_submodule(part.path)
                if not part.path:  # whatever method is called, the outermost module's own are there
                    stack.enter_context(self._filled(part, double))
                    continue
                wrapped = self._wrapped(child, part, around if part.path in self.blocks else None, double)
                stack.enter_context(_instead(child, wrapped))
            yield

    def _wrapped(self, child: nn.Module, part: Part, around: Around | None, double: bool) -> Callable[..., Any]:
        run, calls = child.forward, 0

        @functools.wraps(run)
        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            call, calls = calls, calls + 1
            with ExitStack() as stack:
                filled = False

                def filling(*a: Any, **k: Any) -> Any:
                    nonlocal filled
                    if not filled:
                        stack.enter_context(self._filled(part, double))
                        filled = True
                    return run(*a, **k)

                return around(part.path, call, filling, args, kwargs) if around else filling(*args, **kwargs)

        return forward

    @contextmanager
    def _filled(self, part: Part, double: bool) -> Iterator[None]:
        """The part's weights in their places, and `meta` there again afterwards."""
        places: list[tuple[dict[str, Any], str, Any]] = []
        size = 0
        try:
            for name, tensor in made(self.jobs(part.names), double):
                path, _, leaf = name.rpartition(".")
                owner = self.module.get_submodule(path)
                table: dict[str, Any] = owner._parameters if leaf in owner._parameters else owner._buffers
                places.append((table, leaf, table[leaf]))
                table[leaf] = nn.Parameter(tensor, requires_grad=False) if table is owner._parameters else tensor
                size += tensor.nbytes
                self.live, self.drawn = self.live + tensor.nbytes, self.drawn + tensor.nbytes
                self.most = max(self.most, self.live)
            yield
        finally:
            for table, leaf, hollow_one in places:
                table[leaf] = hollow_one
            self.live -= size


def made(jobs: Iterable[Job], double: bool) -> Iterator[tuple[str, Tensor]]:
    """The tensors of all jobs, made on as many threads as torch computes with."""

    def done(job: Job) -> list[tuple[str, Tensor]]:
        tensors = job()
        return [(n, _wide(t) if double else t.contiguous()) for n, t in tensors.items()]

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for tensors in pool.map(done, jobs):
            yield from tensors


def _wide(tensor: Tensor) -> Tensor:
    """A float32 tensor in float64; numpy asks for huge pages, which for gigabytes saves most of the time."""
    return torch.from_numpy(tensor.numpy().astype(np.float64))


@contextmanager
def _instead(child: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Another `forward` for one module, inside the block."""
    own = vars(child).get("forward")
    child.forward = forward
    try:
        yield
    finally:
        if own is None:
            del child.forward
        else:
            child.forward = own
