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


def load(port: str | Path, **options: Any) -> Any:
    """The pipeline of a port, ready to generate: `porter.load("my-port").generate("a cat", seed=3).pictures()`.

    Args:
        port: a port folder, or any pipeline folder in the diffusers layout.
        options: fields of `runtime.registry.RunOptions` (dtype, device, executor, quality, attention …).

    Raises:
        PorterError: see `runtime.registry.load`.
    """
    return importlib.import_module("runtime.registry").load(port, **options)
