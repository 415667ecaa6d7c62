"""Options that several verbs share, written once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

DTYPES = ("float32", "bfloat16", "float16")  # what models run in
F = TypeVar("F", bound=Callable[..., Any])


def hub_options(function: F) -> F:
    """--revision, --token, --offline."""
    for option in (
        click.option("--offline", is_flag=True, default=None, help="Use only what is already on this machine."),
        click.option("--token", metavar="TOKEN", help="Hub token; default: HF_TOKEN or `hf auth login`."),
        click.option("--revision", metavar="REV", help="Branch, tag or commit of a hub repository."),
    ):
        function = option(function)
    return function


def output_options(function: F) -> F:
    """--json, --quiet, --verbose."""
    for option in (
        click.option("-v", "--verbose", is_flag=True, help="More detail; tracebacks of errors."),
        click.option("-q", "--quiet", is_flag=True, help="Only results and errors."),
        click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else on stdout."),
    ):
        function = option(function)
    return function


model_argument = click.argument("model", metavar="MODEL")
out_file = click.option(
    "-o", "--out", "out", type=click.Path(path_type=Path), metavar="FILE", help="Also save the result here."
)
