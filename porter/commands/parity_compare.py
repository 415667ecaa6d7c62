"""`porter parity compare`: two recorded traces, without running anything."""

from __future__ import annotations

from pathlib import Path

import click

from porter.commands._options import output_options


@click.command(name="compare", short_help="Compare two recorded traces, reference first.")
@click.argument("reference", metavar="A", type=click.Path(path_type=Path))
@click.argument("candidate", metavar="B", type=click.Path(path_type=Path))
@click.option("--case", metavar="CASE", help="Case whose conversion matches the modules; else by their names.")
@click.option(
    "--weights", type=click.Path(path_type=Path), metavar="FILE",
    help="Weights that B was recorded with, to be checked against A's, converted.",
)  # fmt: skip
@click.option(
    "--gate", type=float, default=None, metavar="X", help="Outer fence on the scaled difference; default 1e-3."
)
@output_options
def command(
    reference: Path,
    candidate: Path,
    case: str | None,
    weights: Path | None,
    gate: float | None,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """Compare trace B, the candidate, with trace A, the reference. Exit code 1 unless all of it matches.

    Both must be of the same weights and inputs. Modules are matched by name, or by a case's conversion.
    """
    from parity import early
    from parity.named import case_file
    from porter.commands._render import console, print_json
    from porter.core.errors import BadInputError, CheckFailed, UsageError

    early.gate(gate)
    if weights is not None and case is None:
        raise UsageError("--weights is checked against a case's conversion", hint="add --case CASE.py")
    for path, option in ((reference, "A"), (candidate, "B"), (weights, "--weights")):
        early.file_to_read(path, option)
    file = case_file(case) if case else None

    from parity.compare import GATE
    from parity.loading import CaseError, load_case
    from parity.offline import compare_traces
    from parity.outcome import reason_of
    from parity.trace import Trace

    traces = [Trace.open(path) for path in (reference, candidate)]
    try:
        chosen = load_case(file) if file else None
    except CaseError as error:
        raise BadInputError(str(error), hint="docs/parity.md, A case of your own") from error
    result = compare_traces(traces[0], traces[1], case=chosen, weights=weights, gate=GATE if gate is None else gate)
    screen, headline, counts = console(), result.headline, result.counts
    if as_json:
        print_json({
            "schema": "porter.traces/1", "a": str(reference), "b": str(candidate), "reference": result.reference,
            "candidate": result.candidate, "status": result.status, "passed": result.passed,
            "reason": "" if result.passed else reason_of(result), "counts": counts,
            "guilty": str(result.guilty) if result.guilty else None, "warnings": result.warnings, "notes": result.notes,
            "outputs": [v.to_json() for v in result.outputs],
            "modules": [{"key": t.key, **t.free.to_json(brief=True)} for t in result.taps],
        })  # fmt: skip
    elif not quiet:
        screen.print(f"A         {result.reference} ({reference})", markup=False)
        screen.print(f"B         {result.candidate} ({candidate})", markup=False)
        screen.print("          " + ", ".join(f"{number} {key}" for key, number in counts.items()), markup=False)
        for text in (*result.warnings, *(result.notes if verbose else ())):
            screen.print(text, markup=False)
    if result.passed:
        assert headline is not None
        if not as_json:
            line = f"PASS {result.status}: max|Δ| = {headline.max_abs:.2g} (floor {headline.floor:.2g})"
            screen.print(line, markup=False, style="bold green")
        return
    why = reason_of(result)
    if not as_json:
        screen.print(f"FAIL {result.status}: {why}", markup=False, style="bold red")
    raise CheckFailed(
        f"{candidate} does not hold against {reference}: {result.status}", found=why,
        hint="porter parity compare A B --json lists every module",
    )  # fmt: skip
