"""The two public functions that need more than one call: `porter.parity` and `porter.load`."""

from __future__ import annotations

import importlib
import shlex
from pathlib import Path
from typing import Any

from porter.core.errors import BadInputError
from porter.core.family import family_named, resolve
from porter.core.port import PARITY, Port


def parity(port: str | Path, *, out: str | Path | None = None, **options: Any) -> dict[str, Any]:
    """Compares a port with its reference, writes parity.json and report.html, and returns the document.

    Args:
        port: the port folder.
        out: folder of the results; the port's own `parity/` by default.
        options: fields of `parity.run.Options`: components, against, reference_repo, source, gate, seed, prompt, steps.

    Raises:
        BadInputError: the port's family is unknown, so nothing is known to compare it with.
        PorterError: see `parity.run.run_parity`. A port that differs raises nothing: `document["passed"]` says so.
    """
    run, report = importlib.import_module("parity.run"), importlib.import_module("parity.report")
    opened = Port.open(port)
    name = opened.manifest.get("family")
    cases = family_named(name).cases if name else None
    if cases is None:
        raise BadInputError(f"nothing is known to compare {port} with", found=f"family {name}", hint="porter families")
    settings = run.Options(**options)
    outcome = run.run_parity(opened, name, resolve(cases), settings)
    command = shlex.join(["porter", "parity", str(port)])
    folder = Path(out) if out else opened.path / PARITY.parent / ("partial" if outcome.partial else "")
    report.write(outcome, command, folder)
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
