"""`porter generate`: images from a port on the native runtime."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from porter.commands._options import output_options
from porter.commands._render import escape, notes, print_json

DTYPES = ("float32", "bfloat16", "float16")


@click.command(name="generate", short_help="Generate images from a port on the native runtime.")
@click.argument("port", metavar="PORT")
@click.argument("prompt")
@click.option("--negative-prompt", metavar="TEXT", help="What to steer away from; needs --true-cfg-scale above 1.")
@click.option("--seed", type=int, metavar="N", help="Seed of the first image; image i uses seed + i. Default: 0.")
@click.option("--num-images", type=click.IntRange(min=1), default=1, show_default=True, help="How many images.")
@click.option(
    "--steps",
    "--num-inference-steps",
    "num_inference_steps",
    type=click.IntRange(min=1),
    metavar="N",
    help="Denoising steps. Default: the model's.",
)
@click.option("--guidance-scale", type=float, metavar="X", help="Guidance; 0 means 0. Default: the model's.")
@click.option("--true-cfg-scale", type=float, metavar="X", help="Classifier-free guidance, two passes a step.")
@click.option("--height", type=int, metavar="PX", help="Default: the model's.")
@click.option("--width", type=int, metavar="PX", help="Default: the model's.")
@click.option("--dtype", type=click.Choice(DTYPES), help="Default: bfloat16 on CUDA, float32 elsewhere.")
@click.option("--device", metavar="NAME", help="cpu, cuda, cuda:1 … Default: cuda where there is one.")
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), metavar="PATH", help="Folder, or one .png file. Default: images/"
)
@click.option("--overwrite", is_flag=True, help="Replace pictures that are already there.")
@click.option("--no-metadata", is_flag=True, help="No text inside the PNG, and no sidecar JSON.")
@output_options
def command(
    port: str,
    prompt: str,
    seed: int | None,
    num_images: int,
    dtype: str | None,
    device: str | None,
    out: Path | None,
    overwrite: bool,
    no_metadata: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **fields: Any,
) -> None:
    """Generate images of PROMPT with the native pipeline of PORT, a folder that `porter convert` wrote.

    The same command gives the same bytes. Each PNG carries the port, its manifest, its parity verdict and all
    settings, and so does the JSON file beside it.
    """
    import torch

    from runtime.generate import GenerateJob, run_job

    screen = notes()

    def warn(line: str) -> None:
        screen.print(f"[yellow]warning:[/] {escape(line)}")

    job = GenerateJob(
        port=port,
        prompt=prompt,
        seed=seed,
        num_images=num_images,
        fields=fields,
        dtype=getattr(torch, dtype) if dtype else None,
        device=device,
        out=out,
        overwrite=overwrite,
        metadata=not no_metadata,
    )
    with step_progress(num_images, quiet=quiet) as progress:
        # One line, whatever --quiet says: a picture from an unproven port must not pass for a proven one.
        document = run_job(job, progress=progress, warn=warn)
    if as_json:
        print_json(document)
        return
    for image in document["images"]:
        click.echo(image["file"])
    if verbose:
        seconds, versions = document["seconds"], ", ".join(f"{k} {v}" for k, v in document["versions"].items())
        screen.print(
            f"loaded in {seconds['load']:.1f} s, generated in {seconds['generate']:.1f} s, "
            f"{document['device']} {document['dtype']}, {versions}"
        )


@contextmanager
def step_progress(images: int, *, quiet: bool) -> Iterator[Callable[[int, int, int], None] | None]:
    """A bar of denoising steps on stderr; None where stderr is no terminal or the user wants quiet."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=notes(), transient=True) as bar:
        task = bar.add_task("loading", total=None)

        def show(image: int, step: int, steps: int) -> None:
            label = f"image {image + 1}/{images}" if images > 1 else "denoising"
            bar.update(task, description=label, completed=image * steps + step, total=images * steps)

        yield show
