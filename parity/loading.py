"""A case's file: which one a name means, and what is in it. Runs beside the reference (see `parity/reference.py`)."""

from __future__ import annotations

import importlib.util
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

from torch import Tensor

from parity.case import Case
from parity.casename import split_case
from parity.recorder import told


class CaseError(Exception):
    """A case that cannot be used: what is wrong with it, in one line."""


class _Aside(MetaPathFinder):
    """Lets a checkout's folder be imported that a case is named after: a file goes before a folder without code."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if path is not None or fullname != self.file.stem:
            return None
        return PathFinder.find_spec(fullname, [p for p in sys.path if Path(p).absolute() != self.file.parent])


def load_case(name: str) -> Case:
    """The case of `FILE.py` (its one Case, or the one called `case`) or `FILE.py:NAME`; the file is run.

    Raises:
        CaseError: no such file, it does not run, or it holds no such case.
    """
    file, wanted = split_case(name)
    path = file.absolute()
    if not path.is_file() or not (wanted or name.endswith(".py")):
        raise CaseError(f"no such case file: {path}; a case is FILE.py or FILE.py:NAME")
    if not any(isinstance(finder, _Aside) and finder.file == path for finder in sys.meta_path):
        sys.meta_path.insert(0, _Aside(path))
    spec = importlib.util.spec_from_file_location(f"parity_case_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise CaseError(f"{path.name} does not run: {told(error)}") from error
    finally:
        sys.path.remove(str(path.parent))
    found = {key: value for key, value in vars(module).items() if isinstance(value, Case)}
    chosen = wanted or ("case" if "case" in found else next(iter(found), "") if len(found) == 1 else "")
    if chosen not in found:
        has = ", ".join(found) or "none"
        raise CaseError(f"{path.name} has no case {wanted or 'of its own'}; cases in it: {has}; FILE.py:NAME names one")
    return found[chosen]


def inputs_of(case: Case, seed: int) -> dict[str, dict[str, Tensor]]:
    """A case's inputs, checked.

    Raises:
        CaseError: they cannot be made, or are no tensors.
    """
    try:
        given = case.inputs_of(seed)
    except Exception as error:
        raise CaseError(f"the case's inputs cannot be made: {told(error)}") from error
    for name, inputs in given.items():
        _usable("pass", name, "/#~@")
        for key, value in inputs.items():
            _usable(f"input of {name}", key, "/#")
            if isinstance(value, Tensor) and value.is_complex():
                raise CaseError(f"input {key!r} of {name} is complex: give both parts, and join them in the call")
            if not isinstance(value, Tensor):
                raise CaseError(
                    f"input {key!r} of {name} is {type(value).__name__}, not a tensor: put it into the call"
                )
    known = {key for inputs in given.values() for key in inputs}
    if odd := [key for key in case.free if key not in known]:
        raise CaseError(
            f"`free` names {', '.join(map(repr, odd))}; the inputs are {', '.join(sorted(known)) or 'none'}"
        )
    # Each run casts them to its own precision; of float64 ones float32 runs would have another value.
    return {
        name: {key: value.float() if value.is_floating_point() else value for key, value in inputs.items()}
        for name, inputs in given.items()
    }


def _usable(what: str, name: object, reserved: str) -> None:
    """Refuse names that a trace's keys cannot hold; raises CaseError."""
    if not isinstance(name, str) or not name or not name.isprintable() or any(mark in name for mark in reserved):
        raise CaseError(f"{name!r} is no name for a {what}: a text without any of {' '.join(reserved)}")
