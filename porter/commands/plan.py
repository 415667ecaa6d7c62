"""`porter plan`: what a model holds and what each component needs."""

from __future__ import annotations

from pathlib import Path

import click

from porter.commands._options import hub_options, model_argument, out_file, output_options
from porter.commands._render import console, escape, human_bytes, human_count, notes, print_json, table
from porter.core.atomic import write_json
from porter.core.plan import STATUS_MEANING, PortPlan, plan

RISKS = 6  # shown without --verbose
_COLORS = {"native": "green", "reuse": "green", "convert": "cyan", "port": "yellow", "missing": "red"}


@click.command(name="plan", short_help="Show what a model holds and what each component needs.")
@model_argument
@out_file
@hub_options
@output_options
def command(
    model: str,
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
    result = plan(model, revision=revision, token=token, offline=offline)
    if out:
        write_json(out, result.to_json())
    if as_json:
        print_json(result.to_json())
    elif quiet:
        click.echo("\n".join(result.next))
    else:
        print_plan(result, verbose=verbose)
    if out and not quiet:
        notes().print(f"saved {escape(str(out))}")


def print_plan(result: PortPlan, *, verbose: bool) -> None:
    """Prints a plan for people."""
    screen = console()
    revision = f" at {result.revision}" if result.revision else ""
    screen.print(f"[bold]{escape(result.source)}[/bold]{escape(revision)}  ({result.kind}, {result.files} files)")
    screen.print(
        f"pipeline  {escape(result.pipeline_class or 'none named')}, family {escape(result.family or 'unknown')}"
    )
    screen.print(f"style     {result.style}: {escape(result.style_reason)}\n")
    rows = table(
        "component", "class", "params", "dtypes", "size", "status", "files", right=("params", "size"), cut=("files",)
    )
    for part in result.components:
        rows.add_row(
            escape(part.name),
            escape(part.class_name or "?"),
            human_count(part.parameters) if part.layout != "none" else "–",
            " ".join(part.dtypes) or "–",
            human_bytes(part.bytes),
            f"[{_COLORS[part.status]}]{part.status}[/]",
            escape(part.files[0] + (f" +{len(part.files) - 1}" if len(part.files) > 1 else "") if part.files else "–"),
        )
    screen.print(rows)
    total = f"{human_count(result.parameters)} parameters" if result.parameters is not None else "parameters unknown"
    screen.print(f"\ntotal     {total}, {human_bytes(result.bytes)}")
    for part in result.components:
        if part.recipe:
            screen.print(f"recipe    {escape(part.name)}: {escape(part.recipe)}")
        if part.model:
            screen.print(f"model     {escape(part.name)}: {escape(part.model)}")
        for guess in part.guesses if part.layout == "unknown" or verbose else ():
            told = f"; {escape(guess['tells'][0])} speaks for it" if guess["tells"] else ""
            near = f"{guess['family'] or 'shared'} {guess['component']} ({guess['layout']})"
            screen.print(f"like      {escape(part.name)}: {guess['score']:.0%} of {escape(near)}{told}")
        if part.note:
            screen.print(f"note      {escape(part.name)}: {escape(part.note)}")
        if verbose and part.config:
            shown = ", ".join(f"{key} {value}" for key, value in part.config.items())
            screen.print(f"config    {escape(part.name)}: {escape(shown)}")
    for status in sorted({part.status for part in result.components}):
        screen.print(f"{status:<9} = {STATUS_MEANING[status]}", style="dim")
    risks = result.risks if verbose else result.risks[:RISKS]
    for risk in risks:
        value = str(risk.value) if len(str(risk.value)) < 40 else str(risk.value)[:37] + "…"
        where = f"{risk.component}.{risk.key} = {value}"
        screen.print(f"[magenta]risk {risk.pitfall:<4}[/] {escape(where)}: {escape(risk.text)}")
    if len(risks) < len(result.risks):
        screen.print(f"          and {len(result.risks) - len(risks)} more: --verbose, or --json", style="dim")
    for line in result.warnings:
        screen.print(f"[yellow]warning[/]   {escape(line)}")
    for line in result.next:
        screen.print(f"[bold]next[/]      {escape(line)}")
