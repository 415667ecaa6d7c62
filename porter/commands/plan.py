"""`porter plan`: what a model holds and what each component needs."""

from __future__ import annotations

from pathlib import Path

import click

from porter.commands._options import hub_options, model_argument, out_file, output_options
from porter.commands._plan_text import print_plan
from porter.commands._render import escape, notes, print_json
from porter.core.atomic import write_json
from porter.core.errors import UsageError
from porter.core.plan import make_plan
from porter.core.source import open_source


@click.command(name="plan", short_help="Show what a model holds and what each component needs.")
@model_argument
@click.option("--subfolder", metavar="DIR", help="Look at this folder of MODEL alone.")
@click.option("--markdown", is_flag=True, help="Print Markdown, made to paste into a pull request.")
@out_file
@hub_options
@output_options
def command(
    model: str,
    subfolder: str | None,
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
    source = open_source(model, revision=revision, subfolder=subfolder, token=token, offline=offline)
    result = make_plan(source)
    if out:
        write_json(out, result.to_json())
    if as_json:
        print_json(result.to_json())
    elif markdown:
        from porter.commands._plan_markdown import to_markdown

        click.echo(to_markdown(result), nl=False)
    elif quiet:
        click.echo("\n".join(result.next))
    else:
        print_plan(result, verbose=verbose)
    if out and not quiet:
        notes().print(f"saved {escape(str(out))}")
