"""`porter parity`: parse, call, render."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any, ClassVar

import click

from porter.commands._options import output_options
from porter.commands._parts import WithParts


class Parity(WithParts):
    """`porter parity PORT`, `porter parity record`, `porter parity compare`."""

    parts: ClassVar[dict[str, str]] = {
        "record": "Record what a reference computes, or write out what does so elsewhere.",
        "compare": "Compare two recorded traces, reference first.",
    }


@click.command(name="parity", cls=Parity)
@click.argument("port", metavar="PORT", type=click.Path(path_type=Path))
@click.option("--component", "components", multiple=True, metavar="C", help="Only this component (may be repeated).")
@click.option(
    "--against",
    multiple=True,
    type=click.Choice(["trace", "diffusers", "original"]),
    help="Only this reference (may be repeated): the recorded original, diffusers on the port, the original live.",
)
@click.option(
    "--reference-repo",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Checkout of the original code, to run live.",
)
@click.option(
    "--source", type=click.Path(path_type=Path), metavar="DIR", help="Original files, where the manifest's are gone."
)
@click.option(
    "--gate", type=float, default=None, metavar="X", help="Outer fence on the scaled difference; default 1e-3."
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**63 - 1),
    default=None,
    help="Seed of random inputs and of the pipeline's noise; default 0.",
)
@click.option("--prompt", default=None, help="Prompt of the pipeline comparison.")
@click.option("--steps", "--num-inference-steps", type=click.IntRange(min=1), default=None, help="Its denoising steps.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
    help="What the pipelines run in; below float32, each side's error to the reference's float64 run decides.",
)
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), metavar="DIR", help="Folder of the report; default PORT/parity."
)
@click.option(
    "--junit", type=click.Path(path_type=Path), metavar="FILE", help="Also write every comparison as JUnit XML to FILE."
)
@click.option("--markdown", is_flag=True, help="Print Markdown, made to paste into a pull request.")
@output_options
def command(
    port: Path,
    components: tuple[str, ...],
    against: tuple[str, ...],
    reference_repo: Path | None,
    source: Path | None,
    gate: float | None,
    seed: int | None,
    prompt: str | None,
    steps: int | None,
    dtype: str,
    out: Path | None,
    junit: Path | None,
    markdown: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """Compare a port with its reference and write the report.

    Every converted component is compared with what the original code answered on the original weights, then native and
    diffusers implementations with each other, then the whole pipeline, step by step. Exit code 1 when anything differs.
    """
    from parity import junit as junit_xml
    from parity.compare import GATE
    from parity.document import document, write
    from parity.markdown import to_markdown
    from parity.outcome import Options
    from parity.run import compare_port
    from porter.commands._render import console, notes, print_json
    from porter.core.errors import CheckFailed, MissingError, UsageError
    from porter.core.planned import is_plan, port_of

    if markdown and as_json:
        raise UsageError("--markdown and --json both want stdout", hint="one of them; parity.json is written anyway")
    if is_plan(port):
        port = port_of(port)
    if prompt and any("\ud800" <= letter <= "\udfff" for letter in prompt):
        raise UsageError("the prompt is not UTF-8", found=ascii(prompt), hint="type it again in a UTF-8 terminal")
    if source is not None and reference_repo is None:
        raise UsageError("--source names the original files for the original code", hint="add --reference-repo DIR")
    if source is not None and not source.is_dir():
        raise MissingError(f"no such folder: {source}", hint="--source names the folder of the original files")
    if out is not None and _inside(out, port):
        raise UsageError(
            f"{out} lies among the port's own files", expected=f"{port}/parity, or a folder outside", hint="another -o"
        )
    if junit is not None:
        if _inside(junit, port):
            raise UsageError(f"{junit} lies among the port's own files", hint="another --junit FILE")
        junit_xml.usable(junit)
    if gate is not None and not 0 < gate < float("inf"):
        raise UsageError("--gate must be positive and finite", found=str(gate))
    options = Options(
        components=components,
        against=against,
        reference_repo=reference_repo,
        source=source,
        gate=GATE if gate is None else gate,
        seed=0 if seed is None else seed,
        prompt=prompt,
        steps=steps,
        dtype=dtype,
    )
    bare = as_json or markdown
    note = (lambda text: None) if quiet or bare else (lambda text: notes().print(f"[dim]{text}[/dim]"))
    outcome = compare_port(port, options, progress=note)
    repeat = (
        shlex.join(["porter", *sys.argv[1:]])
        if sys.argv[1:2] == ["parity"]
        else shlex.join(["porter", "parity", str(port)])
    )
    screen = console()
    data = document(outcome, repeat)
    if as_json:
        print_json(data)
    elif markdown:
        click.echo(to_markdown(data), nl=False)
    elif not quiet:
        rows, rest = _table(outcome, screen.width)
        screen.print(rows)
        if rest:
            screen.print(rest, style="dim")
        for line in _remarks(outcome, verbose):
            screen.print(line, markup=False)
    # Last: a folder that cannot be written costs the report, not the result.
    if junit is not None:
        junit_xml.save(data, junit)
    paths = write(outcome, repeat, out or outcome.folder)
    if not bare:
        if not quiet:
            screen.print(f"report: {paths[1]}", markup=False)
        screen.print(outcome.conclusion(), markup=False, style="bold green" if outcome.holds else "bold red")
    if not outcome.holds:
        raise CheckFailed(
            f"parity of {port} does not hold: {outcome.conclusion().removeprefix('FAIL ')}", hint=f"open {paths[1]}"
        )


def _inside(out: Path, port: Path) -> bool:
    """Whether a report in `out` would lie among the files that the manifest answers for."""
    place, root = out.resolve(), port.resolve()
    return place.is_relative_to(root) and not place.is_relative_to(root / "parity")


def _table(outcome: Any, width: int) -> tuple[Any, str]:
    """One line a comparison, and what the table leaves out; numbers are never cut."""
    from parity.pipeline import PipelineResult
    from parity.wording import ratio_text
    from porter.commands._render import table

    names = ("component", "against", "verdict")
    rows = []
    for result in outcome.results:
        v = result.headline
        whole = isinstance(result, PipelineResult)
        called = "pipeline (native)" if whole else f"{result.component} ({result.candidate})"
        numbers = (f"{v.max_abs:.1e}", f"{v.floor:.1e}", ratio_text(v.ratio)) if v else ("–", "–", "–")
        counts = {key: str(result.counts[key]) for key in ("compared", "skipped", "missing")}
        against = "diffusers" if whole else result.against
        texts = (called, against, result.status)
        rows.append(dict(zip((*names, "max|Δ|", "floor", "ratio"), (*texts, *numbers), strict=True)) | counts)
    lacking = [key for key in ("skipped", "missing") if rows and all(row[key] == "0" for row in rows)]
    shown = [key for key in (rows[0] if rows else names) if key not in lacking]
    for spare in ("floor", "ratio"):  # what a narrow screen can do without; the report has all of it
        if sum(2 + max(len(row[key]) for row in (*rows, {key: key})) for key in shown if key not in names) > width - 30:
            shown = [key for key in shown if key != spare]
    built = table(*shown, right=[key for key in shown if key not in names], fold=names)
    for row, result in zip(rows, outcome.results, strict=True):
        colored = row | {"verdict": f"[{'green' if result.passed else 'red'}]{row['verdict']}[/]"}
        built.add_row(*(colored[key] for key in shown))
    return built, f"{' and '.join(lacking)}: 0 everywhere" if lacking else ""


def _remarks(outcome: Any, verbose: bool) -> list[str]:
    """Why something fails, and what a reader must know about what passes."""
    from parity.outcome import describe, reason_of

    lines = []
    for result in outcome.results:
        if not result.passed:
            guilty = getattr(result, "guilty", None)
            lines.append(f"{describe(result)}: {guilty or reason_of(result)}")
            if guilty:
                lines.append(f"  {guilty.why}")
        lines += [f"warning: {result.component}: {text}" for text in getattr(result, "warnings", [])]
        lines += [f"{describe(result)}: {text}" for text in getattr(result, "notes", []) if verbose]
    return list(dict.fromkeys(lines))
