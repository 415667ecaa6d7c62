"""`porter parity record`: the reference's answers, recorded in a process of its own, here or elsewhere."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from porter.commands._options import DTYPES, output_options


@click.command(name="record", short_help="Record what a reference computes, or write out what does so elsewhere.")
@click.argument("case", metavar="[CASE]", required=False)
@click.option("--module", metavar="WHERE:FUNCTION", help="Without a case: file.py:function that returns the module.")
@click.option("--inputs", type=click.Path(path_type=Path), metavar="FILE", help="Its inputs, as safetensors.")
@click.option("--watch", multiple=True, metavar="REGEX", help="Its modules to record; @N samples N elements.")
@click.option(
    "--source", type=click.Path(path_type=Path), metavar="FILE", help="Its weights; the trace is bound to them."
)
@click.option("--call", default="forward", metavar="METHOD", help="Its method to run; default forward.")
@click.option("--reference-python", metavar="EXE", help="Interpreter to run in; it needs no porter.")
@click.option("--reference-repo", type=click.Path(path_type=Path), metavar="DIR", help="Checkout of the original code.")
@click.option(
    "--shims", is_flag=False, flag_value="", metavar="[NAMES]",
    help="CPU equivalents of flash_attn, xformers, apex and timm where they are missing, and of cuda; or of these, by "
    "commas.",
)  # fmt: skip
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=0, help="Seed of weights and inputs; default 0.")
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    default="float32",
    show_default=True,
    help="Run in it too and keep what it loses, for `porter parity --dtype` with --against trace.",
)
@click.option(
    "--level", type=click.Choice(["component", "block", "module"]), default="module", help="How deep to record."
)
@click.option("--limit", type=float, default=1800.0, show_default=True, metavar="SECONDS", help="Time limit.")
@click.option("--write", "kit", type=click.Path(path_type=Path), metavar="DIR", help="Write the stand-alone recorder.")
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), metavar="FILE", help="The trace; default trace.safetensors."
)
@output_options
def command(
    case: str | None,
    module: str | None,
    inputs: Path | None,
    watch: tuple[str, ...],
    source: Path | None,
    call: str,
    reference_python: str | None,
    reference_repo: Path | None,
    shims: str | None,
    seed: int,
    dtype: str,
    level: str,
    limit: float,
    kit: Path | None,
    out: Path | None,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """Record the reference of a case, or a module, with its inputs and outputs in float32 and float64.

    It runs in a process of its own, and leaves a trace file, which `porter parity compare` and `--against trace` read.
    --write DIR writes the recorder out instead, to be run on another machine.
    """
    from parity import early
    from parity.named import Pinned, case_file
    from porter.commands._render import console, print_json
    from porter.core.errors import UsageError

    hint = "porter parity record CASE.py, or --module file.py:function --inputs FILE --watch REGEX --source FILE"
    if case is not None and module is not None:
        raise UsageError("a case and --module name two references", expected="one of them", hint=hint)
    shown, case = case, case_file(case) if case else None
    if kit is not None:
        if module is not None or reference_python or out is not None:
            raise UsageError(
                "--write only writes the recorder; it runs nothing", hint="porter parity record CASE.py --write DIR"
            )
        from parity.kit import write_out

        files = write_out(kit, case)
        if as_json:
            print_json({"schema": "porter.recorder/1", "folder": str(kit), "files": files})
        elif not quiet:
            console().print(f"{len(files)} files in {kit}; {kit}/README.md says how to run them", markup=False)
        return
    if case is None and module is None:
        raise UsageError("nothing to record", expected="a case, or --module", hint=hint)
    if case is not None and (inputs or watch or source):
        raise UsageError("--inputs, --watch and --source go with --module; a case has its own", hint=hint)
    if module is not None:
        if inputs is None or source is None or not watch:
            raise UsageError("--module needs --inputs, --source and at least one --watch", hint=hint)
        if shims is not None or reference_repo is not None or dtype != "float32":
            raise UsageError(
                "--shims, --reference-repo and --dtype go with a case", hint="a module's file can do the same itself"
            )
    out = out or Path("trace.safetensors")
    early.trace_file(out)
    early.checkout(reference_repo)
    early.interpreter(reference_python)
    early.time_limit(limit)
    names = early.shim_names(shims)
    for path, option in ((inputs, "--inputs"), (source, "--source")):
        early.file_to_read(path, option)
    if case is not None:
        Pinned.of(case).require(str(shown), reference_repo)
    from parity.foreign import record_elsewhere, run_recorder

    if case is not None:
        trace = record_elsewhere(
            case,
            python=reference_python,
            repo=reference_repo,
            seed=seed,
            level=level,
            shims=names,
            limit=limit,
            out=out,
            dtype=dtype,
        )
    else:
        assert module is not None and inputs is not None and source is not None
        arguments = ["parity.recorder", "--module", module, "--inputs", str(inputs), "--source", str(source)]
        arguments += ["--call", call, "--seed", str(seed), *(f"--watch={pattern}" for pattern in watch)]
        trace = run_recorder(arguments, python=reference_python, limit=limit, out=out)
    modules = sorted({path for name in trace.passes for path in trace.modules(name)})
    if as_json:
        print_json({
            "schema": "porter.recorded/1", "trace": str(out), "reference": trace.meta["reference"],
            "source": trace.meta["source"], "passes": trace.passes, "modules": len(modules),
            "events": len(trace.events), "shims": trace.meta.get("shims", []), "notes": trace.meta.get("notes", []),
        })  # fmt: skip
        return
    screen = console()
    for note in trace.meta.get("notes", []):
        screen.print(note, markup=False)
    if not quiet:
        counts = f"{len(trace.events)} tensors of {len(modules)} modules in {len(trace.passes)} passes"
        screen.print(f"{out}: {counts}", markup=False)
        screen.print(f"next: porter parity compare {shlex.quote(str(out))} OTHER.safetensors", markup=False)
