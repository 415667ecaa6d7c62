"""porter: move diffusion models between codebases, with proof.

The public API is four functions, imported only when they are used:

    porter.plan(model) -> PortPlan            what is there, and what each component needs
    porter.convert(model, output) -> Result   a port folder in the target layout, with its manifest
    porter.parity(port) -> document           the port compared with the reference
    porter.load(port) -> pipeline             the pipeline of a port, ready to generate
"""

from __future__ import annotations

import importlib
from typing import Any

from porter.core.version import VERSION as __version__

__all__ = ["__version__", "convert", "load", "parity", "plan"]

_PUBLIC = {
    "plan": ("porter.core.planning", "plan"),
    "convert": ("porter.core.convert", "convert"),
    "parity": ("porter.api", "parity"),
    "load": ("porter.api", "load"),
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'porter' has no attribute {name!r}")
    module, attribute = _PUBLIC[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
