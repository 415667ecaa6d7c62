"""`porter recipe`: the catalogue's rules in words, and the account of one file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from porter.commands._options import hub_options, model_argument, output_options
from porter.commands._render import console, escape, hang, human_bytes, print_json
from porter.core.errors import UsageError


@click.group(name="recipe", short_help="Show a recipe's rules, or its account of a file.")
def command() -> None:
    """The rules that move weights between layouts."""


@command.command(name="show", short_help="Print a recipe's rules; without NAME, the recipes' names.")
@click.argument("name", required=False)
@click.option("--recipe", "file", type=click.Path(path_type=Path), metavar="FILE.py", help="A recipe file of your own.")
@output_options
def show(name: str | None, file: Path | None, as_json: bool, quiet: bool, verbose: bool) -> None:
    """Print a recipe's rules, why each is there, and what undoes it; without NAME, the recipes' names.

    NAME is a recipe's, a family's, or FAMILY/COMPONENT.
    """
    from porter.core.cookbook import catalogue, in_words, recipes_named
    from porter.core.userrecipe import read_recipes

    if name is None and file is None:
        known = catalogue()
        if as_json:
            listed = [{"name": key, "reference": k.reference, "users": list(k.users)} for key, k in known.items()]
            print_json({"schema": "porter.recipes/1", "recipes": listed})
            return
        for key, each in known.items():
            layouts = f"{each.recipe.source_layout} → {each.recipe.target_layout}"
            if quiet:
                click.echo(key)
            else:
                told = f"{layouts}, {len(each.recipe.rules)} rules: {', '.join(each.users)}"
                hang(console(), f"{key:<31} ", told)
        return
    if file is not None:
        recipes = read_recipes(file, name or "component")
        chosen = [recipes[name]] if name is not None and name in recipes else list(recipes.values())
    else:
        chosen = [each.recipe for each in recipes_named(str(name))]
    documents = [in_words(recipe) for recipe in chosen]
    if as_json:
        print_json({"schema": "porter.recipe/1", "recipes": documents})
        return
    for document in documents:
        _print_rules(document, verbose=verbose)


@command.command(name="check", short_help="Account for every tensor of MODEL, rule by rule.")
@model_argument
@click.option("--component", metavar="NAME", help="Only this component.")
@click.option("--config", type=click.Path(path_type=Path), metavar="FILE", help="The component's config.json.")
@click.option("--recipe", "file", type=click.Path(path_type=Path), metavar="FILE.py", help="A recipe file of your own.")
@click.option("--base", metavar="MODEL", help="A pipeline that gives what MODEL lacks.")
@click.option("--dtype", metavar="DTYPE", help="As for porter convert.")
@click.option("--ema", is_flag=True, help="Take the averaged (EMA) weights.")
@hub_options
@output_options
def check(
    model: str,
    component: str | None,
    config: Path | None,
    file: Path | None,
    base: str | None,
    dtype: str | None,
    ema: bool,
    revision: str | None,
    token: str | None,
    offline: bool | None,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """Account for every tensor of MODEL and of what it becomes, rule by rule; nothing is read but headers."""
    from porter.commands.convert import UNCHECKED, left_line, read_config_option
    from porter.core.convert import convert
    from porter.core.cookbook import in_words

    ready = convert(
        model, Path("nothing"), component=component, config=read_config_option(config), recipe=file, base=base,
        dtype=dtype, averaged=ema, dry_run=True, revision=revision, token=token, offline=offline,
    ).preparation  # fmt: skip
    if not ready.jobs:
        raise UsageError(f"no recipe takes anything of {model}", hint=f"porter plan {model}")
    documents = []
    for job in ready.jobs:
        words = in_words(job.recipe)
        inverses = {(tuple(rule["sources"]), tuple(rule["targets"])): rule["inverse"] for rule in words["rules"]}
        account = job.coverage
        for rule in account["rules"]:
            rule["inverse"] = inverses.get((tuple(rule["sources"]), tuple(rule["targets"])), "")
        documents.append({**job.to_json(), "coverage": account, "digest": words["digest"]})
    if as_json:
        left = {name: len(names) for name, names in ready.left.items()}
        print_json({"schema": "porter.recipe-check/1", "components": documents, "left_tensors": left})
        return
    screen = console()
    for part in documents:
        totals = part["coverage"]["totals"]
        screen.print(
            f"[bold]{escape(part['name'])}[/]  {escape(part['recipe']['name'])}: {totals['source']} tensors →"
            f" {totals['target']}, {human_bytes(part['bytes_in'])} → {human_bytes(part['bytes_out'])},"
            f" {part['exactness']}; every tensor of both sides stands in one rule"
        )
        for rule in part["coverage"]["rules"] if not quiet else ():
            _print_rule(rule, f"{rule['source_tensors']:>5} → {rule['target_tensors']:<5} ", verbose=verbose)
        for item in part["coverage"]["dropped"] if not quiet else ():
            screen.print(f"  dropped {escape(item['tensor'])}: {escape(item['reason'])}")
        if not part["targets_checked"]:
            screen.print(UNCHECKED)
    for name, names in ready.left.items():
        screen.print(left_line(name, len(names), names[0]))


def _print_rules(document: dict[str, Any], *, verbose: bool) -> None:
    screen = console()
    screen.print(
        f"[bold]{escape(document['name'])}[/]  {escape(document['source_layout'])} →"
        f" {escape(document['target_layout'])}, {len(document['rules'])} rules, digest {document['digest'][:12]}"
    )
    for rule in document["rules"]:
        _print_rule(rule, "  ", verbose=verbose)
    for pattern in document["keep_dtype"]:
        screen.print(f"  a cast leaves {escape(pattern)} as it is", soft_wrap=True)


def _print_rule(rule: dict[str, Any], start: str, *, verbose: bool) -> None:
    """One rule; where it does more than rename: its ops, its reason, and what undoes it."""
    from porter.core.cookbook import line_of
    from porter.core.recipe import Rule

    screen = console()
    hang(screen, start, line_of(rule))
    if rule["ops"] != "rename" or verbose:
        cost = "" if rule["exactness"] == "exact" else rule["exactness"]
        why = "; ".join(word for word in (rule["why"] if rule["why"] != Rule.why else "", cost) if word)
        inner = " " * len(start)
        if why:
            hang(screen, f"{inner}  why   ", why, first_style="dim", style="dim")
        hang(screen, f"{inner}  back  ", rule["inverse"], first_style="dim", style="dim")
