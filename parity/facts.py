"""What a verdict is bound to: weights, recipes, code, traces and environment, by hash and by version."""

from __future__ import annotations

import hashlib
import importlib.util
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from parity.case import FamilyCases
from parity.recorder import file_sha256
from parity.trace import Trace
from porter.core.errors import BadInputError
from porter.core.port import Port


def facts(port: Port, cases: FamilyCases) -> dict[str, Any]:
    """What the verdict is bound to: weights, recipes, code, traces, environment."""
    components = [c.component for c in cases.components if c.component in port.components]
    weights = {
        name: {
            str(f.relative_to(port.path)): file_sha256(f) for f in sorted((port.path / name).glob("*")) if f.is_file()
        }
        for name in components
    }
    packages = ("torch", "diffusers", "transformers", "safetensors", "numpy")
    return {
        "manifest_sha256": port.manifest_sha256,
        "weights": weights,
        "recipes": {n: port.manifest["components"][n].get("recipe") for n in components},
        "traces": {c.component: {"sha256": file_sha256(c.trace), **_trace_facts(c.trace)} for c in cases.components},
        "code": {name: _code_sha256(name) for name in (*cases.code, "parity")},
        "environment": {
            "python": platform.python_version(),
            "platform": platform.platform(),
            "threads": torch.get_num_threads(),
            **{name: version(name) for name in packages},
        },
    }


def _trace_facts(path: Path) -> dict[str, Any]:
    meta = Trace.open(path).meta
    return {k: meta[k] for k in ("reference", "source", "command", "seed", "torch")}


def _code_sha256(module: str) -> str:
    """One hash of a module's source, or of all sources in a package."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise BadInputError(f"no module {module} to bind a verdict to")
    origin = Path(spec.origin)
    files = sorted(origin.parent.rglob("*.py")) if origin.name == "__init__.py" else [origin]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()
