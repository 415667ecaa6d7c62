"""`porter parity --case FILE`: the reference in a process of its own, then the candidate here."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from parity.case import Case
from parity.casename import split_case
from parity.foreign import record_elsewhere
from parity.limit import bounded
from parity.loading import CaseError, load_case
from parity.named import Pinned, case_file
from parity.outcome import Options, Outcome
from parity.own import run_case
from parity.trace import Trace
from porter.core.errors import BadInputError, CheckpointError, UsageError
from porter.core.port import Port


def compare_case_file(
    name: str, port: Path | None, options: Options, *, progress: Callable[[str], None] = lambda _: None
) -> Outcome:
    """Compare what a case file declares.

    Args:
        name: `FILE.py`, `FILE.py:NAME`, `FAMILY` or `FAMILY:NAME`.
        port: a port whose component has the candidate's weights; None: the candidate gets them through the conversion.

    Raises:
        UsageError: options that a case does not take, or a checkout that it needs.
        BadInputError, MissingError, CheckpointError, ResourceError: the case, its reference, a trace, or the port.
    """
    traces = [text.removeprefix("trace:") for text in options.against if text.startswith("trace:")]
    if len(traces) != len(options.against) or len(traces) > 1:
        raise UsageError(
            "a case has its own reference", expected="--against trace FILE, or none", found=", ".join(options.against)
        )
    if options.level in ("pipeline", "step") or options.inputs == "captured":
        raise UsageError("a case has no pipeline", expected="--level component | block | module", hint="leave it out")
    _fits(options, port)
    weights = options.source
    shown, name = name, case_file(name)
    pinned = Pinned.of(name)
    pinned.require(shown, options.reference_repo, recorded=bool(traces))
    repo = pinned.folder(options.reference_repo) if options.reference_repo is not None else None
    progress(f"{shown}: the reference")

    def recorded(level: str, inside: str = "") -> Trace:
        return record_elsewhere(
            name, python=options.reference_python, repo=repo, seed=options.seed, level=level,
            inside=inside, shims=options.shims, limit=options.time_limit, weights=weights, dtype=options.dtype,
        )  # fmt: skip

    trace = Trace.open(Path(traces[0])) if traces else recorded(options.level or "module")
    file, wanted = split_case(name)
    file = file.absolute()  # also where the candidate changes the working folder
    with bounded(options.time_limit, "the candidate") as watch:

        def inner(block: str) -> Trace:
            with watch.paused():
                return recorded("module", block)

        try:
            case = load_case(name)
        except CaseError as error:
            raise BadInputError(str(error), hint="docs/parity.md, A case of your own") from error
        case = replace(case, weights=weights) if weights is not None else case
        progress(f"{shown}: the candidate")
        sys.path.append(str(file.parent))  # for what it imports while it builds, as in the other process
        own = _port_state(case, port, options) if port is not None else None
        outcome = run_case(case, options, trace, file, own, inner)
    outcome.family = _title(shown, file, wanted)
    ran = trace.meta["reference"].get("commit") or ""
    if pinned.commit and ran != pinned.commit:
        found = f"ran at {ran}" if ran else "is in no git checkout"
        outcome.components[0].notes.append(f"the case was written for {pinned}; the original code {found}")
    return outcome


def _title(shown: str, file: Path, wanted: str) -> str:
    """A case in reports: `some_family:transformer`, `my_case.py`, `my_case.py:small`."""
    if shown.endswith(".py") or ".py:" in shown:
        return f"{file.name}:{wanted}" if wanted else file.name
    return f"{shown.partition(':')[0]}:{wanted}"


def _fits(options: Options, port: Path | None) -> None:
    """Refuse options that would be ignored.

    Raises:
        UsageError: one of them, or a device that is not there.
    """
    ignored = {
        f"--inputs {options.inputs}": options.inputs != "random",
        "--prompt": options.prompt is not None,
        "--steps": options.steps is not None,
        "--component": bool(options.components) and port is None,
    }
    if named := [name for name, given in ignored.items() if given]:
        raise UsageError(f"{named[0]} has no effect with a case", hint="leave it out")
    options.check_device()


def _port_state(case: Case, folder: Path, options: Options) -> dict[str, Tensor]:
    """The weights of a port's component in float32.

    Raises:
        UsageError: the case draws its weights, which no port has; or it is not clear which component is meant.
        CheckpointError: its files.
    """
    if case.weights is None:
        raise UsageError(
            "the case draws its weights, and a port has real ones", expected="the original's weights",
            hint="--source FILE, or weights=FILE in the case",
        )  # fmt: skip
    port = Port.open(folder)
    names = list(options.components) or [case.name]
    if len(names) != 1 or names[0] not in port.components:
        raise UsageError(
            f"the port has no {names[0]}",
            expected=" | ".join(port.components),
            hint="--component, or name= in the case",
        )
    state: dict[str, Tensor] = {}
    for file in sorted(port.component_dir(names[0]).glob("*.safetensors")):
        try:
            state |= load_file(file)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} cannot be read", found=str(error)) from error
    return {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in state.items()}
