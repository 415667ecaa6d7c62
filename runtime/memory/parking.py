"""Parked modules: their parameters are on the meta device, and come from a home while the module is used.

With component offload all of a module's weights come at once. With layer offload what stands outside its repeated
blocks does; of the blocks only the running one is here, and the next one on its way. A parked module that is called
fetches its weights by itself; `using` keeps them over several calls, or for methods other than `forward`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from runtime.compiled import blocks_of
from runtime.memory.fetching import PinnedHome, StreamFetcher, ThreadFetcher
from runtime.memory.options import Memory
from runtime.parallel import tensor as tensor_parallel


class Home(Protocol):
    """Where a module's weights are while it is not used."""

    @property
    def names(self) -> Sequence[str]:
        """Its tensors, as the module calls them."""

    def fetch(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Those tensors, in main memory."""

    def dtype(self, name: str) -> torch.dtype:
        """What a tensor will be."""


class Place(NamedTuple):
    """Where a tensor stands in a module; a tied one has several."""

    owner: nn.Module
    leaf: str


class Parked:
    """A module and where its weights are."""

    def __init__(self, module: nn.Module, home: Home, device: torch.device, *, layered: bool) -> None:
        """Raises: what the home raises, where its tensors are copied at once (to pinned memory, for CUDA)."""
        self.device = device
        self._blocks = blocks_of(module) if layered else []
        self._places = _places(module, home.names)
        self._stand_ins = {name: _stand_in(_held(at[0]), home.dtype(name)) for name, at in self._places.items()}
        for name, places in self._places.items():
            _set(places, self._stand_ins[name])
        inside = {id(part): number for number, block in enumerate(self._blocks) for part in block.modules()}
        self._groups: list[list[str]] = [[] for _ in (*self._blocks, None)]  # of each block; at the end what is in none
        for name, places in self._places.items():
            numbers = {inside.get(id(place.owner), -1) for place in places}
            self._groups[numbers.pop() if len(numbers) == 1 else -1].append(name)
        self._fetcher: StreamFetcher | ThreadFetcher
        if device.type == "cuda":
            self._fetcher = StreamFetcher(PinnedHome(home), device, self._groups)
        else:
            self._fetcher = ThreadFetcher(home, device, self._groups)
        self._next: dict[int, int] = {}  # which block ran after which: some are left out, some run twice
        self._last: int | None = None
        self._here: set[int] = set()
        self._users = 0
        for number, block in enumerate(self._blocks):
            block.register_forward_pre_hook(lambda *_, number=number: self._before(number), prepend=True)
            block.register_forward_hook(lambda *_, number=number: self._leave(number), always_call=True)
        module.register_forward_pre_hook(lambda *_: self.enter(), prepend=True)
        module.register_forward_hook(lambda *_: self.leave(), always_call=True)

    def enter(self) -> None:
        """Begin to use the module."""
        self._users += 1
        if self._users > 1:
            return
        try:
            self._put(-1, self._fetcher.now(-1))
            if self._blocks:
                self._fetcher.start(0)
        except BaseException:
            self.leave()
            raise

    def leave(self) -> None:
        """End what `enter` began; with the last one the weights go."""
        self._users = max(0, self._users - 1)
        if not self._users:
            self._fetcher.drop()
            for number in tuple(self._here):
                self._leave(number)
            self._last = None

    def _before(self, number: int) -> None:
        """A block is about to run."""
        if number in self._here:
            return
        if self._last is not None:
            self._next[self._last] = number
        self._last = number
        self._put(number, self._fetcher.take(number))
        self._fetcher.start(self._next.get(number, (number + 1) % len(self._blocks)))

    def _put(self, number: int, tensors: dict[str, Tensor]) -> None:
        self._here.add(number)
        for name in self._groups[number]:
            stand_in = self._stand_ins[name]
            found: Tensor = tensor_parallel.placed(stand_in, tensors.pop(name))
            _set(self._places[name], nn.Parameter(found, False) if isinstance(stand_in, nn.Parameter) else found)

    def _leave(self, number: int) -> None:
        """Forget a block's weights, or those outside of blocks."""
        if number in self._here:
            self._here.discard(number)
            for name in self._groups[number]:
                _set(self._places[name], self._stand_ins[name])
            self._fetcher.left()


_PARKED: WeakKeyDictionary[nn.Module, Parked] = WeakKeyDictionary()


def keep(module: nn.Module, home: Home, device: torch.device, memory: Memory) -> set[str]:
    """Give a module, whose parameters are on the meta device, its weights: for good, or whenever it is used.

    Returns:
        Names of the tensors that are not here meanwhile.
    """
    if memory.offload == "none":
        settle(module, home, device)
        return set()
    _PARKED[module] = Parked(module, home, device, layered=memory.offload == "layer")
    return set(home.names)


def settle(module: nn.Module, home: Home, device: torch.device) -> None:
    """Fill a module on the meta device from a home for good; one tensor in memory beyond the module itself."""
    for name, places in _places(module, home.names).items():
        stand_in = _held(places[0])
        found = tensor_parallel.placed(stand_in, home.fetch([name])[name].to(device))
        _set(places, nn.Parameter(found, False) if isinstance(stand_in, nn.Parameter) else found)


@contextmanager
def using(*modules: Any) -> Iterator[None]:
    """Have the weights of `modules` on the device; nothing happens for those that are not parked, or are None."""
    with ExitStack() as stack:
        for module in modules:
            if (parked := parked_of(module)) is not None:
                parked.enter()
                stack.callback(parked.leave)
        yield


def parked_of(module: Any) -> Parked | None:
    """What is known of a parked module; None for any other."""
    return _PARKED.get(module) if isinstance(module, nn.Module) else None


def device_of(module: nn.Module) -> torch.device:
    """The device that a module runs on."""
    parked = parked_of(module)
    return parked.device if parked is not None else next(module.parameters()).device


def _places(module: nn.Module, names: Sequence[str]) -> dict[str, list[Place]]:
    """Where each tensor stands: under its own name, and wherever else the module has the very same one."""
    alike: dict[int, list[Place]] = {}
    for owner in module.modules():
        for leaf, tensor in (*owner._parameters.items(), *owner._buffers.items()):
            if tensor is not None:
                alike.setdefault(id(tensor), []).append(Place(owner, leaf))
    found = {}
    for name in names:
        path, _, leaf = name.rpartition(".")
        found[name] = alike[id(_held(Place(module.get_submodule(path), leaf)))]
    return found


def _stand_in(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """What stands in a module for a tensor that is not here: its shape and dtype."""
    found = tensor.detach().to("meta", dtype)
    return nn.Parameter(found, False) if isinstance(tensor, nn.Parameter) else found


def _held(place: Place) -> Tensor:
    tensors = place.owner._parameters if place.leaf in place.owner._parameters else place.owner._buffers
    found = tensors[place.leaf]
    assert found is not None  # homes name what modules have
    return found


def _set(places: Sequence[Place], tensor: Tensor) -> None:
    for owner, leaf in places:
        (owner._parameters if leaf in owner._parameters else owner._buffers)[leaf] = tensor  # type: ignore[assignment]
