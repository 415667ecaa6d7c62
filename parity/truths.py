"""References that never read the port: the committed trace, and the original code run live on the original files."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from parity.case import ComponentCase
from parity.foreign import run_module
from parity.live import named_reference
from parity.outcome import Options
from parity.trace import Trace
from porter.core.errors import MissingError, UsageError
from porter.core.port import Port


def applicable(cases: Sequence[ComponentCase], port: Port) -> list[ComponentCase]:
    """Of each component's cases those whose trace ran on the port's own weights; the first, where none did."""
    found: dict[str, list[ComponentCase]] = {}
    for case in cases:
        found.setdefault(case.component, []).append(case)
    chosen: list[ComponentCase] = []
    for same in found.values():
        own = [case for case in same if _ran_on(Trace.open(case.trace), case, port)] if len(same) > 1 else same
        chosen += own or same[:1]
    return chosen


def _sources(case: ComponentCase, port: Port) -> set[str]:
    """sha256 of the files that the port's component was made from."""
    record = port.manifest["components"][case.component]
    sources = port.manifest["base" if record.get("base") else "source"]["files"]
    used = record.get("sources") or list(sources)
    return {sources[name]["sha256"] for name in used if name in sources}


def _ran_on(trace: Trace, case: ComponentCase, port: Port) -> bool:
    return trace.meta["source"]["sha256"] in _sources(case, port)


def truths(
    case: ComponentCase, port: Port, options: Options, wanted: tuple[str, ...]
) -> Iterator[tuple[str, Trace | str, list[str]]]:
    """The references that never read the port: (name, trace or why there is none, what a reader must know).

    A trace recorded on other weights says nothing about this port; the original code live then takes its place.
    """

    def bound(trace: Trace, hint: str) -> Trace | str:
        source = trace.meta["source"]
        if _ran_on(trace, case, port):
            return trace
        return (
            f"the reference ran on {source['file']} (sha256 {source['sha256'][:12]}), "
            f"this port was converted from other weights; {hint}"
        )

    for text in wanted:
        if text.startswith("trace:"):
            yield text, bound(Trace.open(Path(text.removeprefix("trace:"))), "record it on the port's own source"), []
        elif ":" in text:
            source = (
                options.source if options.source is not None and options.source.is_file() else _one_source(case, port)
            )
            for named in named_reference(text, Trace.open(case.trace), source, options):
                yield text, bound(named, "name the file that it loads: --source FILE"), []
    live = "original" in wanted and options.reference_repo is not None and case.record is not None
    warnings, recorded = [], Trace.open(case.trace)
    if "trace" in wanted:
        trace = bound(recorded, "compare with the original code: --reference-repo <checkout>")
        if isinstance(trace, str) and live and "trace" not in options.against:
            warnings.append("the recorded trace is of other weights; compared with the original code live instead")
        else:
            yield "trace", trace, []
    if live:
        with tempfile.TemporaryDirectory(prefix="porter-parity-") as folder:
            fresh = run_original(case, port, options, Path(folder))
            here, known = (t.meta["reference"] for t in (fresh, recorded))
            if here["commit"] != known["commit"]:
                at = here["commit"] or "an unknown commit"
                warnings.append(f"the checkout is at {at}, the recorded trace at {known['commit']}")
            elif here.get("files") != known.get("files"):
                warnings.append(f"the checkout's code is not that of {known['commit']}: it was edited")
            yield "original", bound(fresh, "name its source: --source <folder>"), warnings


def run_original(case: ComponentCase, port: Port, options: Options, out: Path) -> Trace:
    """Run the original code in a process of its own; it reads the original files and never the port.

    Raises:
        MissingError, BadInputError, ResourceError: see `parity.foreign.record_elsewhere`.
    """
    assert case.record is not None and options.reference_repo is not None
    arguments = case.record(options.source or _source_folder(port), options.reference_repo, options.seed, out)
    run_module(arguments, python=options.reference_python, limit=options.time_limit)
    return Trace.open(out / f"{case.component}.safetensors")


def _source_folder(port: Port) -> Path:
    """Where the original files lie, by the manifest."""
    spec = str(port.manifest["source"]["spec"])
    if spec.startswith("builtin:"):
        from porter.builtin import locate

        folder = locate(spec.removeprefix("builtin:"))
    else:
        folder = Path(spec).parent if Path(spec).is_file() else Path(spec)
    if folder is None or not folder.is_dir():
        raise MissingError(
            f"the original files of this port are not here: {spec}",
            hint="porter parity PORT --reference-repo <checkout> --source <folder with the original files>",
        )
    return folder


def _one_source(case: ComponentCase, port: Port) -> Path:
    """The file that a component was made from, by the manifest.

    Raises:
        MissingError, UsageError: it is not here, or there are several.
    """
    record = port.manifest["components"][case.component]
    names = list(record.get("sources") or port.manifest["base" if record.get("base") else "source"]["files"])
    if len(names) != 1:
        raise UsageError(
            f"{case.component} was made from {len(names)} files", hint="--source FILE names what the reference loads"
        )
    place = _source_folder(port) / str(names[0])
    if not place.is_file():
        raise MissingError(f"the original file is not here: {place}", hint="--source FILE")
    return place


def origin(trace: Trace) -> str:
    """`flux.model:Flux at 802fb47`; the name alone where it is in no git checkout."""
    reference = trace.meta["reference"]
    commit = reference.get("commit", "")
    return f"{reference['name']} at {commit[:7]}" if commit else str(reference["name"])
