"""`porter plan`: what a model holds and what each component needs."""

from __future__ import annotations

from pathlib import Path

import click

from porter.commands._options import hub_options, model_argument, out_file, output_options
from porter.commands._plan_text import print_plan
from porter.commands._render import escape, notes, print_json
from porter.core.atomic import write_json
from porter.core.checkpoint import dtype_code
from porter.core.errors import PorterError, UsageError, visible
from porter.core.planning import make_plan
from porter.core.source import open_source
from porter.core.targets import TARGETS
from porter.core.workload import ELEMENT, parse_bytes

SIZE = click.IntRange(1, 100_000)


def _dtype(name: str) -> str:
    """The code of a dtype that a model can run in.

    Raises:
        UsageError: there is none such.
    """
    try:
        code = dtype_code(name)
    except PorterError:
        code = ""
    if code not in ELEMENT:
        raise UsageError(f"--dtype {name} is no dtype to run in", expected="bfloat16, float16, float32 or float64")
    return code


@click.command(name="plan", short_help="Show what a model holds and what each component needs.")
@model_argument
@click.option("--subfolder", metavar="DIR", help="Look at this folder of MODEL alone.")
@click.option("--target", metavar="NAME", help="Add the checklist of porter, diffusers, sglang or fastvideo.")
@click.option("--dtype", metavar="DTYPE", help="Of the memory estimate: bfloat16 (default), float16, float32, float64.")
@click.option("--height", type=SIZE, metavar="PX", help="Of the memory estimate; default: the pipeline's own.")
@click.option("--width", type=SIZE, metavar="PX", help="Of the memory estimate; default: the pipeline's own.")
@click.option("--frames", type=SIZE, metavar="N", help="Of the memory estimate; default: the pipeline's own.")
@click.option("--device-memory", metavar="SIZE", help="Say whether it fits a device of SIZE, such as 24GB or 80GiB.")
@click.option("--markdown", is_flag=True, help="Print Markdown, made to paste into a pull request.")
@out_file
@hub_options
@output_options
def command(
    model: str,
    subfolder: str | None,
    target: str | None,
    dtype: str | None,
    height: int | None,
    width: int | None,
    frames: int | None,
    device_memory: str | None,
    markdown: bool,
    out: Path | None,
    revision: str | None,
    token: str | None,
    offline: bool | None,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """Show what MODEL holds and what each component needs.

    Reads file lists, JSON files and the headers of weights; never weights. Imports no torch.
    """
    if markdown and as_json:
        raise UsageError("--markdown and --json both want stdout", hint="one of them; -o FILE saves the JSON too")
    code = _dtype(dtype) if dtype is not None else None
    room = parse_bytes(device_memory) if device_memory is not None else None
    if target is not None and target not in TARGETS:
        raise UsageError(f"no target is called {target!r}", expected=" | ".join(TARGETS), hint=f"porter plan {model}")
    work = {"dtype": code, "height": height, "width": width, "frames": frames}
    source = open_source(model, revision=revision, subfolder=subfolder, token=token, offline=offline)
    result = make_plan(source, workload=work, device_memory=room, target=target)
    if out:
        write_json(out, result.to_json())
    if as_json:
        print_json(result.to_json())
    elif markdown:
        from porter.commands._plan_markdown import to_markdown

        click.echo(to_markdown(result), nl=False)
    elif quiet:
        click.echo("\n".join(visible(line).replace("\n", " ") for line in result.next))
    else:
        print_plan(result, verbose=verbose)
    if out and not quiet:
        notes().print(f"saved {escape(str(out))}")
