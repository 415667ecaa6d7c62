"""`porter generate`: images and videos from a port."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from porter.commands._options import DTYPES, output_options
from porter.commands._render import escape, notes, print_json
from porter.core.errors import UsageError


@click.command(name="generate", short_help="Generate images and videos from a port.")
@click.argument("port", metavar="PORT")
@click.argument("prompt", required=False)
@click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A prompt per line, or .jsonl: an object per line with prompt, seed, name and settings of its own.",
)
@click.option(
    "--from-metadata",
    "metadata_of",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Repeat a result: an image, a video or a sidecar that porter wrote.",
)
@click.option("--negative-prompt", metavar="TEXT", help="What to steer away from; needs guidance above 1.")
@click.option(
    "--image",
    "images",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A picture to edit or to animate; several where the model takes several.",
)
@click.option(
    "--mask", type=click.Path(path_type=Path), metavar="FILE", help="White where the picture is painted anew."
)
@click.option("--last-image", type=click.Path(path_type=Path), metavar="FILE", help="Where a video is to end.")
@click.option("--seed", type=int, metavar="N", help="Seed of the first image; image i uses seed + i. Default: 0.")
@click.option("--num-images", type=click.IntRange(min=1), default=1, show_default=True, help="How many of each prompt.")
@click.option("--batch-size", type=click.IntRange(min=1), default=1, show_default=True, help="How many at once.")
@click.option(
    "--steps",
    "--num-inference-steps",
    "num_inference_steps",
    type=click.IntRange(min=1),
    metavar="N",
    help="Denoising steps. Default: the model's.",
)
@click.option("--guidance-scale", type=float, metavar="X", help="Guidance; 0 means 0. Default: the model's.")
@click.option("--guidance-scale-2", type=float, metavar="X", help="Guidance of the second of two denoisers.")
@click.option("--true-cfg-scale", type=float, metavar="X", help="Classifier-free guidance, two passes a step.")
@click.option("--max-sequence-length", type=click.IntRange(min=1), metavar="N", help="Tokens of the text encoder.")
@click.option("--height", type=int, metavar="PX", help="Default: the model's.")
@click.option("--width", type=int, metavar="PX", help="Default: the model's.")
@click.option("--num-frames", type=click.IntRange(min=1), metavar="N", help="Frames of a video. Default: the model's.")
@click.option("--fps", type=click.IntRange(min=1, max=240), metavar="N", help="Frames a second of the file.")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="NAME=VALUE",
    help="A setting that only this model has; VALUE as JSON, or text, or @FILE for a picture.",
)
@click.option("--scheduler", metavar="CLASS", help="A scheduler of diffusers in the place of the port's.")
@click.option(
    "--lora", "loras", multiple=True, metavar="FILE[:SCALE]", help="A LoRA of any known format; several add up."
)
@click.option(
    "--executor",
    type=click.Choice(("auto", "native", "diffusers")),
    default="auto",
    show_default=True,
    help="Whose code runs the pipeline; auto: native where there is a native port.",
)
@click.option(
    "--quality",
    type=click.Choice(("exact", "lossless", "lossy")),
    default="lossless",
    show_default=True,
    help="exact: the reference's arithmetic; lossless: up to rounding; lossy: allows approximations.",
)
@click.option(
    "--attention",
    metavar="BACKEND",
    default="sdpa",
    show_default=True,
    help="Which kernel computes attention; an unknown one is answered with the list.",
)
@click.option(
    "--offload",
    type=click.Choice(("none", "component", "layer")),
    default="none",
    show_default=True,
    help="Weights on the device only while they are used: by component, or of its blocks two at a time.",
)
@click.option(
    "--weights", metavar="fp8|gguf:FILE", help="The denoiser's weights in 8 bits, or a GGUF file's. Needs lossy."
)
@click.option("--vae-tiling", is_flag=True, help="Decode in tiles: less memory.")
@click.option("--vae-slicing", is_flag=True, help="Decode a batch one by one: less memory.")
@click.option("--compile", "compiled", is_flag=True, help="Compile the denoiser's blocks; pays off over many images.")
@click.option(
    "--tp",
    type=click.IntRange(min=1),
    default=1,
    metavar="N",
    help="Tensor parallel: torchrun --nproc-per-node N -m porter.cli generate … --tp N",
)
@click.option(
    "--ulysses", type=click.IntRange(min=1), default=1, metavar="N", help="Share tokens, and in attention heads."
)
@click.option("--ring", type=click.IntRange(min=1), default=1, metavar="N", help="Share tokens, and pass keys around.")
@click.option("--cfg-parallel", is_flag=True, help="Prompt and negative prompt side by side, on two processes each.")
@click.option("--dtype", type=click.Choice(DTYPES), help="Default: bfloat16 on CUDA, float32 elsewhere.")
@click.option("--device", metavar="NAME", help="cpu, cuda, cuda:1 … Default: cuda where there is one.")
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="Folder, or one file. Default: images/ or videos/",
)
@click.option(
    "--format",
    "image_format",
    type=click.Choice(("png", "webp", "mp4")),
    help="Default: png, of videos mp4; png of a video is a folder of frames.",
)
@click.option(
    "--preview",
    "preview_every",
    type=click.IntRange(min=1),
    metavar="N",
    help="Show a preview beside the result after every N steps.",
)
@click.option("--overwrite", is_flag=True, help="Replace results that are already there.")
@click.option("--no-metadata", is_flag=True, help="No text inside the file, and no sidecar JSON.")
@output_options
def command(
    port: str,
    prompt: str | None,
    prompts: Path | None,
    metadata_of: Path | None,
    seed: int | None,
    num_images: int,
    batch_size: int,
    images: tuple[Path, ...],
    mask: Path | None,
    last_image: Path | None,
    settings: tuple[str, ...],
    loras: tuple[str, ...],
    dtype: str | None,
    out: Path | None,
    image_format: str | None,
    preview_every: int | None,
    overwrite: bool,
    no_metadata: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **rest: Any,
) -> None:
    """Generate images or videos of PROMPT with PORT, a folder that `porter convert` wrote.

    The same command gives the same bytes. Each result carries the port, its manifest, its parity verdict and all
    settings, and so does the JSON file beside it.
    """
    ways = [way for way in (prompt is not None, prompts is not None, metadata_of is not None) if way]
    if len(ways) != 1:
        raise UsageError(
            "what is to be made is said once", expected="PROMPT, --prompts FILE or --from-metadata FILE",
            found=f"{len(ways)} of them", hint='porter generate PORT "a red circle"',
        )  # fmt: skip
    from runtime.generate import run_job
    from runtime.jobs import FIELDS, Ask, GenerateJob, asks_of_metadata, dtype_of, read_prompts, read_settings
    from runtime.parallel.mesh import Parallel, start
    from runtime.registry import RunOptions

    fields = {name: rest.pop(name) for name in FIELDS}
    fields = {name: value for name, value in fields.items() if value is not None}
    extra, options = read_settings(settings), {**rest, "dtype": dtype}
    repeats: dict[str, Any] | None = None
    if metadata_of is not None:
        asks, repeats = asks_of_metadata(metadata_of)
        asks = [Ask(ask.prompt, ask.seed if seed is None else seed, fields={**ask.fields, **fields}) for ask in asks]
        extra = {**dict(repeats.get("settings") or {}), **extra}
        options = repeated(options, repeats, click.get_current_context())
    elif prompts is not None:
        asks = read_prompts(prompts, fields)
    else:
        asks = [Ask(str(prompt), fields=fields)]
    options["dtype"] = dtype_of(options["dtype"])
    sizes = {name: options.pop(name) for name in ("tp", "ulysses", "ring")}
    options["parallel"] = parallel = Parallel(**sizes, cfg=2 if options.pop("cfg_parallel") else 1)
    job = GenerateJob(
        port=port,
        asks=asks,
        seed=seed,
        num_images=num_images,
        batch_size=batch_size,
        images=images,
        mask=mask,
        last_image=last_image,
        extra=extra,
        options=RunOptions(**options),
        loras=tuple(lora_of(text) for text in loras),
        out=out,
        image_format=image_format,
        overwrite=overwrite,
        metadata=not no_metadata,
        preview_every=preview_every or 0,
        repeats=repeats,
    )
    with start(parallel, options["device"]) as run:
        alone, screen = run is None or run.main, notes()  # of several processes the first one is heard

        def warn(line: str) -> None:
            screen.print(f"[yellow]warning:[/] {escape(line)}")

        with step_progress(len(asks) * num_images, quiet=quiet or not alone) as progress:
            # One line, whatever --quiet says: a picture from an unproven port must not pass for a proven one.
            document = run_job(job, progress=progress, warn=warn)
        if alone:
            show(document, as_json=as_json, verbose=verbose)


def show(document: dict[str, Any], *, as_json: bool, verbose: bool) -> None:
    """What was made: the document, or the files' names."""
    if as_json:
        print_json(document)
        return
    for image in document["images"]:
        click.echo(image["file"])
    if verbose:
        seconds, versions = document["seconds"], ", ".join(f"{k} {v}" for k, v in document["versions"].items())
        step = f", {seconds['step']:.3f} s a step" if seconds["step"] is not None else ""
        notes().print(
            f"loaded in {seconds['load']:.1f} s, generated in {seconds['generate']:.1f} s{step}, "
            f"{document['executor']}, {document['quality']}, {document['device']} {document['dtype']}, {versions}"
        )


def lora_of(text: str) -> tuple[Path, float]:
    """`FILE` or `FILE:SCALE`. Raises UsageError: the scale is no number."""
    name, colon, scale = text.rpartition(":")
    if not colon or Path(text).is_file():
        return Path(text), 1.0
    try:
        value = float(scale)
    except ValueError:
        return Path(text), 1.0  # a colon in a name; a file that is not there is refused as such
    if value != value or abs(value) > 1000:
        raise UsageError("the LoRA's scale is no number to multiply with", expected="-1000 to 1000", found=scale)
    return Path(name), value


def repeated(options: dict[str, Any], about: dict[str, Any], context: click.Context) -> dict[str, Any]:
    """Options with what a repeated result was made with, where the command line does not say otherwise."""
    kept = dict(options)
    for name in ("executor", "quality", "attention", "dtype", "offload", "weights"):
        given = context.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE
        if not given and isinstance(about.get(name), str):
            kept[name] = about[name]
    return kept


@contextmanager
def step_progress(images: int, *, quiet: bool) -> Iterator[Callable[[int, int, int], None] | None]:
    """A bar of denoising steps on stderr; None where stderr is no terminal or the user wants quiet."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[pace]}"),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=notes(), transient=True) as bar:
        task, since = bar.add_task("loading", total=None, pace=""), [0.0]

        def show(image: int, step: int, steps: int) -> None:
            label = f"image {image + 1}/{images}" if images > 1 else "denoising"
            now = time.monotonic()
            pace = f"{now - since[0]:.2f} s/step" if step else ""
            since[0] = now
            bar.update(task, description=label, completed=image * steps + step, total=images * steps, pace=pace)

        yield show
