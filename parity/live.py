"""A reference that the user names as `module:function` or `file.py:function`, run by the stand-alone recorder."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors.torch import save_file

from parity.foreign import run_recorder
from parity.outcome import Options
from parity.trace import Trace


def named_reference(spec: str, recorded: Trace, source: Path, options: Options) -> Iterator[Trace]:
    """Run what `spec` builds on the inputs of a recorded trace, in a process of its own -> one trace a pass.

    Args:
        spec: returns the reference's module with its weights loaded; a pass is its method of that name.
        source: the weights that it loads; the trace is bound to them.

    Raises:
        BadInputError, MissingError, ResourceError: see `foreign.run_recorder`.
    """
    for name in recorded.passes:
        with tempfile.TemporaryDirectory(prefix="porter-parity-") as folder:
            inputs = Path(folder) / "inputs.safetensors"
            save_file({k: v.contiguous() for k, v in recorded.inputs(name).items()}, inputs)
            yield run_recorder(
                [
                    "parity.recorder", "--module", spec, "--call", name, "--inputs", str(inputs),
                    "--source", str(source), "--seed", str(options.seed),
                ],
                python=options.reference_python, limit=options.time_limit,
            )  # fmt: skip
