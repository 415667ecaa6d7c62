"""`porter families`: the catalogue, and what each family is proven against."""

from __future__ import annotations

import click

from porter.commands._options import output_options
from porter.commands._render import console, escape, print_json
from porter.core.architectures import architectures
from porter.core.family import Family, families, proof


@click.command(name="families", short_help="List the catalogue and what each family is proven against.")
@output_options
def command(as_json: bool, quiet: bool, verbose: bool) -> None:
    """List the model families: components, layouts, recipes, native or not, proven or unproven and against what."""
    known = families().values()
    if as_json:
        print_json({"schema": "porter.families/1", "families": [_document(family) for family in known]})
        return
    screen = console()
    names = max(len(part.name) for family in known for part in family.components)
    for family in known:
        if quiet:
            click.echo(family.name)
            continue
        traces = proof(family)
        pipelines = ", ".join(family.pipeline_classes)
        screen.print(f"[bold]{escape(family.name)}[/]  {escape(family.title)}, {escape(pipelines)}")
        screen.print(f"  style    {family.style}: {escape(family.style_reason)}")
        verdict = "[green]proven[/] against" if traces else "[yellow]unproven[/]: no reference trace of"
        screen.print(f"  {verdict} {escape(family.reference_code or 'any original code')}")
        for trace in traces if verbose else ():
            screen.print(f"    {escape(trace)}")
        if family.native_pipelines:
            screen.print(f"  native   {escape(', '.join(family.native_pipelines))}")
        layouts = sorted({known.layout for known in architectures() if known.family == family.name})
        screen.print(f"  layouts  recognised: {escape(', '.join(layouts) or 'by class name only')}")
        for part in family.components if any(part.recipe for part in family.components) or verbose else ():
            how = f"recipe {', '.join(part.layouts.values())}" if part.layouts else "reused as it is"
            native = f"; native {part.native}" if part.native else ""
            screen.print(f"  {escape(part.name):<{names}}  {escape(part.class_names[0])}: {escape(how + native)}")
        if family.originals:
            screen.print(f"  case     porter parity --case {escape(family.name)} --reference-repo <the original code>")
        if family.license_hint:
            screen.print(f"  licence  {escape(family.license_hint)}")


def _document(family: Family) -> dict[str, object]:
    traces = proof(family)
    return {
        "name": family.name,
        "title": family.title,
        "pipeline_classes": list(family.pipeline_classes),
        "native_pipelines": list(family.native_pipelines),
        "style": family.style,
        "style_reason": family.style_reason,
        "proven": bool(traces),
        "proven_against": family.reference_code if traces else None,
        "traces": traces,
        "originals": list(family.originals),
        "licence": family.license_hint,
        "components": [
            {
                "name": part.name,
                "library": part.library,
                "class": part.class_names[0],
                "original_files": list(part.original_files),
                "recipe": part.recipe,
                "recipes": part.layouts,
                "native": part.native,
            }
            for part in family.components
        ],
    }
