"""What a verdict is bound to: weights, recipes, code, traces and environment, by hash and by version."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from parity.case import FamilyCases
from parity.recorder import file_sha256
from parity.trace import Trace
from parity.truths import applicable
from porter.core.port import Port, code_sha256


def facts(port: Port, cases: FamilyCases) -> dict[str, Any]:
    """What the verdict is bound to: weights, recipes, code, traces, environment."""
    here = applicable([c for c in cases.components if c.component in port.components], port)
    components = [c.component for c in here]
    weights = {
        name: {
            str(f.relative_to(port.path)): file_sha256(f) for f in sorted((port.path / name).glob("*")) if f.is_file()
        }
        for name in components
    }
    return {
        "manifest_sha256": port.manifest_sha256,
        "weights": weights,
        "recipes": {n: port.manifest["components"][n].get("recipe") for n in components},
        "traces": {c.component: {"sha256": file_sha256(c.trace), **_trace_facts(c.trace)} for c in here},
        "code": {name: code_sha256(name) for name in (*cases.code, "parity")},
        "environment": environment(),
    }


def environment() -> dict[str, Any]:
    """The versions that a verdict was reached with."""
    packages = ("torch", "diffusers", "transformers", "safetensors", "numpy")
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        **{name: version(name) for name in packages},
    }


def _trace_facts(path: Path) -> dict[str, Any]:
    meta = Trace.open(path).meta
    return {k: meta[k] for k in ("reference", "source", "command", "seed", "torch")}
