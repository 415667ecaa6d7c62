"""`porter convert`: a port folder in another layout, with its manifest."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import click

from porter.commands._options import hub_options, model_argument, output_options
from porter.commands._render import byte_progress, console, escape, fact, hang, human_bytes, print_json
from porter.core.errors import BadInputError, UsageError
from porter.core.lanes import DEFAULT_WORKERS


@click.command(name="convert", short_help="Write a port folder in another layout, with its manifest.")
@model_argument
@click.option("-o", "--out", "out", type=click.Path(path_type=Path), metavar="PORT", help="The folder to write.")
@click.option("--to", type=click.Choice(["diffusers", "original", "comfyui"]), default="diffusers",
              show_default=True,
              help="The layout to write; the last two take a port or any pipeline in diffusers' layout.")  # fmt: skip
@click.option("--component", "components", multiple=True, metavar="NAME", help="Convert only this component.")
@click.option("--base", metavar="MODEL",
              help="A pipeline that gives what MODEL lacks; with --to original, the original weights.")  # fmt: skip
@click.option("--config", type=click.Path(path_type=Path), metavar="FILE",
              help="The component's config.json, for what its tensors do not hold.")  # fmt: skip
@click.option("--recipe", type=click.Path(path_type=Path), metavar="FILE.py",
              help="Run this Python file; its RECIPE or RECIPES replace the catalogue's.")  # fmt: skip
@click.option("--dtype", metavar="DTYPE", help="Cast converted weights, e.g. bfloat16; default: as they are.")
@click.option("--shard-size", metavar="SIZE", help="The largest a weights file may be, e.g. 5GB; default: one file.")
@click.option("--ema", is_flag=True, help="Take the averaged (EMA) weights of a training checkpoint.")
@click.option("--workers", type=click.IntRange(min=1), default=DEFAULT_WORKERS, show_default=True,
              metavar="N", help="Threads; the bytes written do not depend on it.")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Account for every tensor, write nothing.")
@click.option("--overwrite", is_flag=True, help="Replace a finished port.")
@click.option(
    "--verify", is_flag=True, help="Load the result with its real class, make it again with torch, and undo it."
)
@hub_options
@output_options
def command(
    model: str,
    out: Path | None,
    to: str,
    components: tuple[str, ...],
    base: str | None,
    config: Path | None,
    recipe: Path | None,
    dtype: str | None,
    shard_size: str | None,
    ema: bool,
    workers: int,
    dry_run: bool,
    overwrite: bool,
    verify: bool,
    revision: str | None,
    token: str | None,
    offline: bool | None,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """Convert MODEL into the folder PORT.

    The folder appears whole or not at all. A killed run is continued by running the same command again.
    """
    if len(components) > 1:
        raise UsageError("one --component at a time", found=" ".join(components), hint="leave it out to convert all")
    if out is None and not dry_run:
        raise UsageError(
            "name the folder to write", expected="-o PORT, or --dry-run", hint=f"porter convert {model} -o PORT"
        )
    from porter.core.convert import convert

    with byte_progress("converting", quiet=quiet or as_json) as bar:
        result = convert(
            model,
            out or Path("port"),
            to=to,  # type: ignore[arg-type]
            component=components[0] if components else None,
            base=base,
            config=read_config_option(config),
            recipe=recipe,
            dtype=dtype,
            shard_size=shard_size,
            averaged=ema,
            workers=workers,
            dry_run=dry_run,
            overwrite=overwrite,
            verify=verify,
            revision=revision,
            token=token,
            offline=offline,
            progress=(lambda _, count: bar.advance(count)) if bar else None,
            started=bar.start if bar else None,
        )
    document = result.to_json()
    if as_json:
        print_json(document)
    elif not quiet or dry_run:
        print_conversion(document, verbose=verbose or dry_run)
    if quiet and result.output and not as_json:
        click.echo(str(out))


UNCHECKED = "  not checked: which tensors its class has; the recipe does not say, `porter convert --verify` loads it"


def read_config_option(path: Path | None) -> dict[str, Any] | None:
    """What `--config FILE` holds; None without it."""
    if path is None:
        return None
    from porter.core.files import read_json

    document = read_json(path)
    if not isinstance(document, dict):
        raise BadInputError(f"{path} is not a config", expected="a JSON object", found=type(document).__name__)
    return document


def print_conversion(document: dict[str, Any], *, verbose: bool) -> None:
    """Prints what was converted, or would be, for people."""
    screen = console()
    for part in document["components"]:
        cover = part["coverage"]
        totals = cover["totals"]
        screen.print(
            f"[bold]{escape(part['name'])}[/bold]  {escape(part['recipe']['name'])}: {totals['source']} tensors →"
            f" {totals['target']}, {human_bytes(part['bytes_in'])} → {human_bytes(part['bytes_out'])},"
            f" {part['exactness']}, digest {part['recipe']['digest'][:12]}"
        )
        for rule in cover["rules"] if verbose else ():
            hang(screen, f"{rule['source_tensors']:>5} → {rule['target_tensors']:<5} ", _rule_line(rule))
        for item in cover["dropped"]:
            screen.print(f"  dropped {escape(item['tensor'])}: {escape(item['reason'])}")
        if part["assumed"]:
            words = ", ".join(f"{key}: {value}" for key, value in part["assumed"].items())
            screen.print(f"  assumed {escape(words)}: no tensor shows it, and nobody gave it")
        if not part["targets_checked"] and not document["verified"] and document["direction"] == "diffusers":
            screen.print(UNCHECKED)
        if len(part["targets"]) > 1:
            screen.print(f"  {len(part['targets'])} shards and their index")
    for file, left in document["left_tensors"].items():
        screen.print(left_line(file, left["count"], left["first"]))
    if document["copied"]:
        screen.print(f"copied    {many(len(document['copied']), 'file')} unchanged")
        if verbose:
            screen.print("          " + escape(", ".join(document["copied"])), style="dim")
    reasons: dict[str, list[str]] = {}
    for name, why in document["not_carried"].items():
        reasons.setdefault(why, []).append(name)
    for why, names in reasons.items():
        shown = f"{len(names)} files" if len(names) > 3 else ", ".join(names)
        fact(screen, "left out", f"{shown}: {why}")
    for name, found in document["verified"].items():
        back = found["round_trip"]
        undone = f"{back} source tensors restored byte for byte" if isinstance(back, int) else back
        loaded = f"{found['class']} loads it strictly, " if found["class"] else ""
        made = f"{found['computed']} of {found['tensors']} tensors are what torch makes of the source"
        screen.print(f"verified  {escape(name)}: {loaded}{made}; {undone}")
    if document["resumed"]:
        screen.print(f"resumed   {many(len(document['resumed']), 'file')} of an interrupted run kept")
    lost = _loss(document)
    said = f"{lost}; manifest.json says which" if lost and not document["dry_run"] else lost
    fact(screen, "loss", said or "none: every element is kept")
    if document["dry_run"]:
        screen.print(f"dry run   {human_bytes(document['bytes'])} would be written; nothing was")
        return
    port = shlex.quote(str(document["output"]))
    screen.print(f"wrote     {escape(str(document['output']))}  ({human_bytes(document['bytes'])})")
    verb = "parity" if document["direction"] == "diffusers" else "plan"
    screen.print(f"[bold]next[/]      porter {verb} {escape(port)}")


def left_line(file: str, count: int, first: str) -> str:
    """The line for the tensors of a source file that are not converted."""
    return f"left out  {count} tensors of {escape(file)} that are not converted here: {escape(first)} …"


def _loss(document: dict[str, Any]) -> str:
    """What the result no longer holds; empty where nothing is lost."""
    rules = [rule for part in document["components"] for rule in part["coverage"]["rules"] if rule["targets"]]
    counts = {
        "dropped": len(document["loss"]["dropped"]),
        "rounded": sum(rule["source_tensors"] for rule in rules if rule["exactness"] == "lossy"),
        "folded into others": sum(rule["source_tensors"] for rule in rules if rule["exactness"] == "needs-base"),
    }
    return ", ".join(f"{many(count, 'tensor')} {what}" for what, count in counts.items() if count)


def many(count: int, thing: str) -> str:
    """`1 file`, `2 files`."""
    return f"{count} {thing}{'' if count == 1 else 's'}"


def _rule_line(rule: dict[str, Any]) -> str:
    """One rule: `source → targets  split [h, h, h]`."""
    ops = "" if rule["ops"] == "rename" else f"  {rule['ops']}"
    cost = "" if rule["exactness"] == "exact" else f"  {rule['exactness']}"
    return f"{_pattern(rule['sources'])} → {_pattern(rule['targets'])}{ops}{cost}"


def _pattern(patterns: list[str]) -> str:
    """Patterns that differ in one part as one, without the types of their variables: `attn.(to_q, to_k).{p}`."""
    plain = [re.sub(r"{(\w+):[^}]*}", r"{\1}", pattern).split(".") for pattern in patterns]
    if len({len(parts) for parts in plain}) != 1:
        return " + ".join(".".join(parts) for parts in plain) or "nothing"
    columns = [list(dict.fromkeys(column)) for column in zip(*plain, strict=True)]
    return ".".join(column[0] if len(column) == 1 else f"({', '.join(column)})" for column in columns)
