"""The two public functions that need more than one call: `porter.parity` and `porter.load`."""

from __future__ import annotations

import importlib
import shlex
from pathlib import Path
from typing import Any


def parity(port: str | Path, *, out: str | Path | None = None, **options: Any) -> dict[str, Any]:
    """Compares a port with its reference, writes parity.json and report.html, and returns the document.

    Args:
        port: the port folder.
        out: folder of the results; the port's own `parity/` by default.
        options: fields of `parity.outcome.Options` (components, against, reference_repo, source, gate, seed …).

    Raises:
        BadInputError: the port's family is unknown, so nothing is known to compare it with.
        PorterError: see `parity.run.compare_port`. A port that differs raises nothing: `document["passed"]` says so.
    """
    run, report = importlib.import_module("parity.run"), importlib.import_module("parity.document")
    settings = importlib.import_module("parity.outcome").Options(**options)
    outcome = run.compare_port(port, settings)
    command = shlex.join(["porter", "parity", str(port)])
    report.write(outcome, command, Path(out) if out else outcome.folder)
    document: dict[str, Any] = report.document(outcome, command)
    return document


def load(port: str | Path, *, dtype: Any = None, device: Any = None) -> Any:
    """The native pipeline of a port, ready to generate; see `runtime.registry.load`.

    Args:
        port: a port folder.
        dtype: a torch dtype; by default bfloat16 on CUDA, float32 elsewhere.
        device: a torch device or its name; by default CUDA where there is one.
    """
    return importlib.import_module("runtime.registry").load(port, dtype=dtype, device=device)
