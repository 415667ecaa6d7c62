"""Compare two implementations of a model that does not fit into memory, block after block.

    python -m parity.scale CASE.py[:NAME] [--seed N] [--gate X] [--threads N] [-o DIR]

prints what it does, and writes DIR/parity-scale.json: verdicts, seconds and the process's peak memory.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import resource
import shlex
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from parity.compare import GATE, Verdict
from parity.loading import CaseError, load_case
from parity.outcome import reason_of
from parity.scaled import Scaled, compare_scaled
from porter.core.atomic import replace_bytes
from porter.core.errors import BadInputError, PorterError, ResourceError, UsageError
from porter.core.version import VERSION

SCHEMA = "porter.parity-scale/1"
NAME = "parity-scale.json"


def document(scaled: Scaled, *, command: str, case: str, seed: int, gate: float, seconds: float) -> dict[str, Any]:
    """The result as plain data."""
    result = scaled.result
    packages = ("torch", "diffusers", "numpy", "safetensors")
    return {
        "schema": SCHEMA,
        "porter": VERSION,
        "command": command,
        "case": case,
        "component": result.component,
        "reference": result.reference,
        "candidate": result.candidate,
        "passed": result.passed,
        "status": result.status,
        "conclusion": conclusion(scaled),
        "guilty": None if result.guilty is None else {**vars(result.guilty), "others": list(result.guilty.others)},
        "counts": result.counts,
        "gate": gate,
        "seed": seed,
        "dtype": "float32, chosen blocks judged in float64",
        "device": "cpu",
        "seconds": round(seconds),
        "peak_resident_bytes": peak_bytes(),
        "figures": scaled.figures,
        "environment": {
            "python": platform.python_version(), "platform": f"{platform.system()} {platform.machine()}",
            "cores": os.cpu_count(), "threads": torch.get_num_threads(), **{name: version(name) for name in packages},
        },
        "notes": result.notes,
        "unused": result.unused,
        "outputs": [verdict.to_json() for verdict in result.outputs],
        "modules": [
            {"key": t.key, "reference": t.module, "kind": t.kind, "free": t.free.to_json(brief=True),
             "reset": t.reset.to_json(brief=True) if t.reset else None}
            for t in result.taps
        ],
    }  # fmt: skip


def conclusion(scaled: Scaled) -> str:
    """How it went, in one line."""
    result = scaled.result
    if not result.passed:
        return f"FAIL {f'first guilty module: {result.guilty}: ' if result.guilty else ''}{_why(scaled)}"
    blocks = [tap.reset for tap in result.taps if tap.reset and tap.kind == "out"]
    floors = [verdict.floor for verdict in blocks if math.isfinite(verdict.floor)]
    free, reset = (max((v.max_abs for v in found), default=0.0) for found in (result.outputs, blocks))
    return f"PASS {result.status}: output max|Δ| {free:.2g}, blocks by themselves {reset:.2g} (floor {max(floors):.2g})"


def _why(scaled: Scaled) -> str:
    guilty = scaled.result.guilty
    return guilty.why if guilty else reason_of(scaled.result)


def peak_bytes() -> int:
    """The most memory that this process had resident."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def table(scaled: Scaled) -> list[str]:
    """One line for each block that was judged in float64, and for the outputs."""

    def line(name: str, v: Verdict) -> str:
        return f"{name:44}{v.status:>12}{v.max_abs:11.1e}{v.max_abs64:11.1e}{v.floor:11.1e}"

    exact = [
        tap for tap in scaled.result.taps if tap.kind == "out" and tap.reset and math.isfinite(tap.reset.max_abs64)
    ]
    rows = [line(tap.key.partition("/")[2], tap.reset) for tap in exact if tap.reset]
    rows += [line("output" if math.isfinite(v.max_abs64) else "output, as it ran", v) for v in scaled.result.outputs]
    return [f"{'in float64':44}{'verdict':>12}{'max|Δ|':>11}{'float64':>11}{'floor':>11}", *rows]


def main(argv: Sequence[str] | None = None) -> int:
    """Compare a case block after block -> 0 when it passes, 1 when not."""
    began = time.monotonic()
    parser = argparse.ArgumentParser(prog="python -m parity.scale", description="Compare a model larger than memory.")
    parser.add_argument("case", help="FILE.py or FILE.py:NAME")
    parser.add_argument("--seed", type=int, default=0, help="of weights and inputs (default: 0)")
    parser.add_argument("--gate", type=float, default=GATE, help="outer fence on the scaled difference (default: 1e-3)")
    parser.add_argument("--threads", type=int, help="torch's and those that draw weights (default: torch's)")
    parser.add_argument("-o", "--out", type=Path, default=Path("parity-scale"), help="folder; needs about 2 GB of room")
    given = sys.argv[1:] if argv is None else list(argv)
    options = parser.parse_args(given)
    if not 0 < options.gate < math.inf or options.seed < 0 or (options.threads or 1) < 1:
        raise UsageError("--gate must be positive and finite, --seed not negative, --threads at least 1")
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        case = load_case(options.case)
    except CaseError as error:
        raise BadInputError(str(error), hint="docs/parity.md, A model larger than memory") from error

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:6.0f} s {peak_bytes() / 2**30:5.2f} GiB  {text}", file=sys.stderr, flush=True)

    scaled = compare_scaled(case, options.out, seed=options.seed, gate=options.gate, say=say)
    data = document(
        scaled, command=shlex.join(["python", "-m", "parity.scale", *given]), case=options.case, seed=options.seed,
        gate=options.gate, seconds=time.monotonic() - began,
    )  # fmt: skip
    try:
        replace_bytes(options.out / NAME, (json.dumps(data, indent=1, ensure_ascii=False) + "\n").encode())
    except OSError as error:
        raise ResourceError(f"the result cannot be written to {options.out}", found=str(error)) from error
    print("\n".join([*table(scaled), conclusion(scaled)]))
    print(f"{data['seconds']} s, peak {data['peak_resident_bytes'] / 2**30:.2f} GiB; {options.out / NAME}")
    return 0 if scaled.result.passed else 1


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except PorterError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
