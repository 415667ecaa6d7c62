"""`porter bench`: measurements as ratios against their peers, in one run."""

from __future__ import annotations

from pathlib import Path

import click

from porter.commands._options import DTYPES, output_options
from porter.commands._render import notes, print_json


@click.group(name="bench", short_help="Measure ports beside their peers.")
def command() -> None:
    """Measure ports beside their peers, in one run on this machine."""


@command.command(name="runtime")
@click.argument("family", nargs=-1)
@click.option("--full", is_flag=True, help="Released sizes on a CPU too; default there: a shrunk model.")
@click.option("--shrunk", is_flag=True, help="The shrunk model on a GPU too.")
@click.option(
    "--system",
    "systems",
    multiple=True,
    metavar="NAME",
    help="Measure only this one: diffusers, diffusers compiled, porter, porter compiled.",
)
@click.option("--repeats", type=click.IntRange(min=3), default=10, show_default=True, help="Measured steps of each.")
@click.option("--warmup", type=click.IntRange(min=1), default=3, show_default=True, help="Steps before them.")
@click.option("--quality", type=click.Choice(("exact", "lossless")), default="lossless", show_default=True)
@click.option("--attention", default="sdpa", show_default=True, metavar="BACKEND", help="Ours; see porter generate.")
@click.option("--dtype", type=click.Choice(DTYPES), help="Default: bfloat16 on CUDA, float32 elsewhere.")
@click.option("--device", metavar="NAME", help="Default: cuda where there is one.")
@click.option("-o", "--out", type=click.Path(path_type=Path), metavar="DIR", help="Write JSON and a chart here.")
@output_options
def runtime(
    family: tuple[str, ...], full: bool, shrunk: bool, systems: tuple[str, ...], repeats: int, warmup: int,
    quality: str, attention: str, dtype: str | None, device: str | None, out: Path | None,
    as_json: bool, quiet: bool, verbose: bool,
) -> None:  # fmt: skip
    """Time a denoiser's step: diffusers eager and compiled, ours eager and compiled, in one run.

    The weights are random and made on the device, the sizes a released model's (on a CPU shrunk ones). FAMILY: names
    of `porter families`; without one, all that declare a benchmark.
    """
    import torch

    from runtime.bench.command import measured
    from runtime.bench.document import rows, write

    screen = notes()
    document = measured(
        family, full=full, shrunk=shrunk, systems=systems, repeats=repeats, warmup=warmup, quality=quality,
        attention=attention, dtype=getattr(torch, dtype) if dtype else None, device=device,
        progress=(lambda line: None) if quiet else lambda line: screen.print(f"[dim]{line}[/]"),
    )  # fmt: skip
    files = write(document, out) if out is not None else []
    if as_json:
        print_json(document)
        return
    for case in document["cases"]:
        click.echo(f"{case['name']}: {case['tflop_per_step']:.3g} TFLOP a step, bound {case['bound_ms']:.4g} ms")
        for name, ms, times, first, peak in rows(case):
            line = f"{ms:>10.4g} ms a step  {times:5.2f} x bound  first call {first:6.2f} s  peak {peak:.2f} GB"
            click.echo(f"  {name:<20} {line}")
        for name, value in case["ratios"].items():
            click.echo(f"  {name}: {value:.3f}")
    for file in files:
        click.echo(str(file))
