"""`porter parity`: parse, call, render."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import ClassVar

import click

from porter.commands._options import DTYPES, output_options
from porter.commands._parts import WithParts


class Parity(WithParts):
    """`porter parity PORT`, `porter parity record`, `porter parity compare`."""

    parts: ClassVar[dict[str, str]] = {
        "record": "Record what a reference computes, or write out what does so elsewhere.",
        "compare": "Compare two recorded traces, reference first.",
    }

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """`--against trace FILE` is `--against trace:FILE`, where FILE cannot be the port."""
        for at in range(len(args) - 2):
            if args[at : at + 2] == ["--against", "trace"] and args[at + 2].endswith(".safetensors"):
                args = [*args[: at + 1], f"trace:{args[at + 2]}", *args[at + 3 :]]
                break
        return super().parse_args(ctx, args)


@click.command(name="parity", cls=Parity)
@click.argument("port", metavar="[PORT]", type=click.Path(path_type=Path), required=False)
@click.option("--component", "components", multiple=True, metavar="C", help="Only this component (may be repeated).")
@click.option(
    "--against",
    multiple=True,
    metavar="REFERENCE",
    help="Only this reference (may be repeated): trace (the recorded original), diffusers (on the port), original "
    "(live), trace FILE (one of your own), module:function or file.py:function (returns the reference's module).",
)
@click.option(
    "--case",
    metavar="FILE.py[:NAME]|FAMILY[:NAME]",
    help="Compare what this case, or one of this family's, declares; without PORT, on drawn weights. docs/parity.md",
)
@click.option(
    "--reference-repo",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Checkout of the original code, to run live.",
)
@click.option("--reference-python", metavar="EXE", help="Interpreter that the reference runs in; it needs no porter.")
@click.option(
    "--shims", is_flag=False, flag_value="", metavar="[NAMES]",
    help="CPU equivalents of flash_attn, xformers, apex and timm for the reference of a case, where they are missing, "
    "and of cuda; or of these, by commas.",
)  # fmt: skip
@click.option(
    "--limit",
    type=float,
    default=1800.0,
    metavar="SECONDS",
    show_default=True,
    help="Time limit of a reference, and of a case's candidate.",
)
@click.option(
    "--level", type=click.Choice(["component", "block", "module", "step", "pipeline"]), default=None,
    help="How deep: outputs of components, their blocks (then inside the guilty one), their modules; or the pipeline's "
    "stages, or each of its steps. Default: everything.",
)  # fmt: skip
@click.option("--device", default="cpu", show_default=True, help="Where the candidate's components run.")
@click.option(
    "--inputs", default="random", metavar="random|captured|FILE", show_default=True,
    help="Of live references: drawn, captured while the pipeline runs, or named tensors of a safetensors file.",
)  # fmt: skip
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
    type=click.Choice(DTYPES),
    default="float32",
    show_default=True,
    help="What both sides run in; below float32, each side's error to the reference's float64 run decides.",
)
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder of the report; default PORT/parity, or ./parity-<case>.",
)
@click.option(
    "--junit", type=click.Path(path_type=Path), metavar="FILE", help="Also write every comparison as JUnit XML to FILE."
)
@click.option("--markdown", is_flag=True, help="Print Markdown, made to paste into a pull request.")
@output_options
def command(
    port: Path | None,
    components: tuple[str, ...],
    against: tuple[str, ...],
    case: str | None,
    reference_repo: Path | None,
    reference_python: str | None,
    shims: str | None,
    limit: float,
    level: str | None,
    device: str,
    inputs: str,
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
    from parity import early
    from parity.named import Pinned, case_file
    from porter.commands._parity_view import comparisons, inside, remarks
    from porter.commands._render import console, notes, print_json
    from porter.core.errors import CheckFailed, MissingError, UsageError, visible
    from porter.core.planned import is_plan, port_of

    if markdown and as_json:
        raise UsageError("--markdown and --json both want stdout", hint="one of them; parity.json is written anyway")
    if port is None and case is None:
        raise UsageError("nothing to compare", expected="a port, or --case FILE", hint="porter parity PORT")
    if port is not None and is_plan(port):
        port = port_of(port)
    if prompt and any("\ud800" <= letter <= "\udfff" for letter in prompt):
        raise UsageError("the prompt is not UTF-8", found=ascii(prompt), hint="type it again in a UTF-8 terminal")
    loads = case is not None or any(":" in reference for reference in against)
    if source is not None and reference_repo is None and not loads:
        raise UsageError("--source names the original files for the original code", hint="add --reference-repo DIR")
    if source is not None and not (source.exists() if loads else source.is_dir()):
        kind = "file or folder" if loads else "folder"
        raise MissingError(f"no such {kind}: {source}", hint="--source names the folder of the original files")
    for written, name in ((out, "-o"), (junit, "--junit")):
        if written is not None and port is not None and inside(written, port):
            raise UsageError(
                f"{written} lies among the port's own files", expected=f"{port}/parity, or a place outside",
                hint=f"another {name}",
            )  # fmt: skip
    # All that can be refused is refused before torch is imported, and before anything runs.
    early.checkout(reference_repo)
    early.interpreter(reference_python)
    early.time_limit(limit)
    early.gate(gate)
    early.junit_file(junit)
    early.report_folder(out if out is not None or port is not None else Path())
    names = early.shim_names(shims)
    traces = [Path(name.removeprefix("trace:")) for name in against if name.startswith("trace:")]
    for trace in traces:
        early.file_to_read(trace, "--against trace")
    if case is not None:
        Pinned.of(case_file(case)).require(case, reference_repo, recorded=bool(traces))

    from parity import junit as junit_xml
    from parity.compare import GATE
    from parity.document import document, write
    from parity.markdown import to_markdown
    from parity.outcome import Options

    options = Options(
        components=components, against=against, reference_repo=reference_repo, source=source,
        gate=GATE if gate is None else gate, seed=0 if seed is None else seed, prompt=prompt, steps=steps, dtype=dtype,
        level=level or "", device=device, inputs=inputs, reference_python=reference_python, time_limit=limit,
        shims=names,
    )  # fmt: skip
    bare = as_json or markdown
    note = (lambda text: None) if quiet or bare else (lambda text: notes().print(f"[dim]{text}[/dim]"))
    if case is not None:
        from parity.casefile import compare_case_file

        outcome = compare_case_file(case, port, options, progress=note)
    else:
        from parity.run import compare_port

        assert port is not None
        outcome = compare_port(port, options, progress=note)
    named = [str(port)] if port is not None else ["--case", str(case)]
    words = sys.argv[1:] if sys.argv[1:2] == ["parity"] else ["parity", *named]
    repeat = shlex.join(["porter", *words])
    screen = console()
    data = document(outcome, repeat)
    if as_json:
        print_json(data)
    elif markdown:
        click.echo(to_markdown(data), nl=False)
    elif not quiet:
        rows, rest = comparisons(outcome, screen.width)
        screen.print(rows)
        if rest:
            screen.print(rest, style="dim")
        for line in remarks(data, verbose):
            screen.print(line, markup=False)
    # Last: a folder that cannot be written costs the report, not the result.
    if junit is not None:
        junit_xml.save(data, junit)
    paths = write(outcome, repeat, out or outcome.folder)
    if not bare:
        if not quiet:
            screen.print(f"report: {paths[1]}", markup=False)
        screen.print(visible(outcome.conclusion()), markup=False, style="bold green" if outcome.holds else "bold red")
    if not outcome.holds:
        why = f": {outcome.conclusion().removeprefix('FAIL ')}" if bare else ""  # else it was just said
        raise CheckFailed(f"parity of {port or case} does not hold{why}", hint=f"open {paths[1]}")
