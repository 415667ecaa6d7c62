"""Packages that a model's code imports and computes nothing with: importable, and empty.

Stand-alone (torch and the standard library only). Whatever is taken from such a package is a `Stub`. As a decorator it
hands back what it decorates; as a base class it is none; anything else that is done with it gives another one. With a
tensor nothing can be done, so that no number comes from it.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from inspect import isclass, isfunction
from types import ModuleType
from typing import Any

from torch import Tensor

STAND_IN = "porter's CPU stand-in, parity/shims.py"  # origin of a module that stands in for a package


class Stub:
    """Stands for something of a package that is not there."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(value, Tensor) for value in (*args, *kwargs.values())):
            raise NotImplementedError(f"{self._path} is called with a tensor, and the case's `stubs` name its package")
        if len(args) == 1 and not kwargs and (isclass(args[0]) or isfunction(args[0])):
            return args[0]
        return Stub(f"{self._path}(…)")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what Python asks for by itself
            raise AttributeError(name)
        return Stub(f"{self._path}.{name}")

    def __instancecheck__(self, thing: Any) -> bool:  # nothing is one of a class that is not there
        return False

    __subclasscheck__ = __instancecheck__

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type, ...]:
        return ()

    def __getitem__(self, key: Any) -> Stub:
        return self

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __or__(self, other: Any) -> Any:  # in annotations
        return self

    __ror__ = __or__

    def __enter__(self) -> Stub:
        return self

    def __exit__(self, *error: Any) -> None:
        return None

    def __repr__(self) -> str:
        return f"<{self._path}, of a package that is not there>"


def _lacking(path: str, name: str) -> Stub:
    """What is taken from a module that has nothing of that name."""
    if name.startswith("__"):
        raise AttributeError(name)
    return Stub(f"{path}.{name}")


class _Module(ModuleType):
    def __getattr__(self, name: str) -> Any:
        return _lacking(self.__name__, name)


def _stands_in(module: ModuleType | None) -> bool:
    return getattr(getattr(module, "__spec__", None), "origin", None) == STAND_IN


def stubbed(name: str) -> bool:
    """Whether a case's `stubs` name this package."""
    return name in _FINDER.names


class _Finder(MetaPathFinder, Loader):
    """Finds the packages, or modules of packages, and everything below them."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = set(names)

    def find_spec(self, fullname: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        if not _within(fullname, self.names):
            return None
        return ModuleSpec(fullname, self, origin="a stub, parity/stubs.py", is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Module(spec.name, "Named in a case's `stubs`.")

    def exec_module(self, module: ModuleType) -> None:
        module.__path__ = []


_FINDER = _Finder(())
_INNER = _Finder(())  # modules of packages that are there: asked before the package itself


_find_spec_of = importlib.util.find_spec


def _find_spec(name: str, package: str | None = None) -> ModuleSpec | None:
    """`importlib.util.find_spec`, for which stubs are not there."""
    top = name.partition(".")[0]
    return None if stubbed(top) and not _stands_in(sys.modules.get(top)) else _find_spec_of(name, package)


def install(names: Iterable[str]) -> list[str]:
    """Make packages importable that are not there -> those of `names` that are not; a package that is there stays.

    Of a package that has a stand-in (`parity/shims.py`) only what that lacks is empty. A module of a package
    (`their_repo.utils.log`) is replaced even where it is there.

    Raises:
        ValueError: a name is no package's and no module's.
    """
    made = []
    for name in names:
        if not all(part.isidentifier() for part in name.split(".")):
            raise ValueError(f"`stubs` names packages and modules, not {name!r}")
        if "." in name:
            made.append(name)
            _INNER.names.add(name)
            if _INNER not in sys.meta_path:
                sys.meta_path.insert(0, _INNER)
            continue
        if name in _FINDER.names:
            made.append(name)
            continue
        try:
            found = import_module(name)
            there = found.__file__ is not None  # a folder of that name, without code, is no package
        except ImportError:
            there = False
        if there and _stands_in(found):
            made.append(name)
            for module in [m for path, m in sys.modules.items() if path.partition(".")[0] == name and _stands_in(m)]:
                vars(module)["__getattr__"] = partial(_lacking, module.__name__)
        made += [] if there else [name]
    for path, module in list(sys.modules.items()):
        if _within(path, made) and not isinstance(module, _Module) and not _stands_in(module):
            del sys.modules[path]  # halves of a package that broke
    _FINDER.names |= {name for name in made if "." not in name}
    if made and _FINDER not in sys.meta_path:
        sys.meta_path.append(_FINDER)
    if made and importlib.util.find_spec is not _find_spec:
        importlib.util.find_spec = _find_spec  # which libraries ask whether they may use a package
    return made


def _within(path: str, names: Iterable[str]) -> bool:
    return any(path == name or path.startswith(name + ".") for name in names)


@contextmanager
def on_trial() -> Iterator[None]:
    """Stubs that are installed inside the block are gone after it, with all code that was imported beside them."""
    names, modules, find_spec = set(_FINDER.names), dict(sys.modules), importlib.util.find_spec
    try:
        yield
    finally:
        for path in [p for p, m in sys.modules.items() if modules.get(p) is not m and _tainted(m)]:
            del sys.modules[path]
        _FINDER.names = names
        importlib.util.find_spec = find_spec


def _tainted(module: ModuleType) -> bool:
    """Whether a module is a stub, holds something of one, or is code of a project, which may."""
    if isinstance(module, _Module):
        return True
    own = f"{getattr(module, '__file__', None) or ''}"
    libraries = ("site-packages", "dist-packages", "lib-dynload", os.path.dirname(os.__file__))  # noqa: PTH120
    held = list(vars(module).values()) if isinstance(module, ModuleType) else []
    return (bool(own) and not any(name in own for name in libraries)) or any(
        isinstance(v, (Stub, _Module)) for v in held
    )
