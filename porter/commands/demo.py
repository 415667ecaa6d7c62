"""`porter demo`: the four verbs on the embedded model, then once more with a fault planted in the recipe."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import time
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from porter.builtin.demo import BROKEN_RECIPE, CAPTIONS, FAULT, MODEL, PROMPT, SEED
from porter.commands._options import output_options
from porter.commands._render import console, print_json
from porter.core.errors import CheckFailed, ResourceError, UsageError
from porter.core.port import PARITY

SHEET, BESIDE = "contact-sheet.png", "good-and-broken.png"
MARK = ".porter-demo"  # tells a folder of ours, which may be replaced, from somebody else's


@click.command(name="demo")
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), default=Path("porter-demo"), show_default=True, metavar="DIR",
    help="Folder for everything the demo writes; an earlier demo's folder is replaced.",
)  # fmt: skip
@output_options
def command(out: Path, as_json: bool, quiet: bool, verbose: bool) -> None:
    """Plan, convert, prove and generate with the embedded model; then plant a fault and watch parity find it.

    Each command is printed as you would type it.
    """
    began = time.monotonic()
    with redirect_stdout(sys.stderr if as_json else sys.stdout):
        failure = _play(out, ["-q"] if quiet else ["-v"] if verbose else [])
    conclusion, report = _conclusion(out / "port")
    document = {
        "schema": "porter.demo/1",
        "conclusion": conclusion,
        "planted_fault_found": failure,
        "contact_sheet": str(out / SHEET),
        "good_beside_broken": str(out / BESIDE),
        "report_of_the_port": str(report),
        "report_of_the_fault": str(_conclusion(out / "broken-port")[1]),
        "seconds": round(time.monotonic() - began, 1),
    }
    if as_json:
        print_json(document)
        return
    _title(f"Done in {document['seconds']:.0f} s")
    for key in ("contact_sheet", "good_beside_broken", "report_of_the_port", "report_of_the_fault"):
        _say(f"{key.replace('_', ' '):21} {document[key]}")
    _say(f"planted fault found   {failure}")
    console().print(conclusion, style="bold green", markup=False)


def _play(out: Path, detail: list[str]) -> str:
    """Everything the demo does -> what parity said of the planted fault."""
    _empty(out)
    port, broken, recipe = out / "port", out / "broken-port", out / "broken_recipe.py"

    _title("1. What is there, and what does a port take?")
    _run("plan", MODEL, *detail)
    _title("2. Convert the original layout to diffusers'")
    _run("convert", MODEL, "-o", str(port), "--overwrite", *detail)
    _title("3. Does the port compute what the original computes?")
    _run("parity", str(port), *detail)
    _title("4. Generate with the proven port")
    _run("generate", str(port), PROMPT, "--seed", str(SEED), "-o", str(out / "good.png"), "--overwrite", *detail)
    _contact_sheet(port, out / SHEET)
    _say(f"contact sheet: {out / SHEET}")

    _title(f"5. The same with one fault planted: {FAULT}")
    recipe.write_text(BROKEN_RECIPE, encoding="utf-8")
    _say(f"wrote {recipe}")
    _run("convert", MODEL, "--recipe", str(recipe), "-o", str(broken), "--overwrite", "--quiet")
    _must_fail("parity", str(broken), *detail)
    failure: str = json.loads((broken / PARITY).read_text(encoding="utf-8"))["conclusion"].removeprefix("FAIL ")
    _run("generate", str(broken), PROMPT, "--seed", str(SEED), "-o", str(out / "broken.png"), "--overwrite", *detail)
    _beside(out / "good.png", out / "broken.png", out / BESIDE)
    return failure


def _empty(out: Path) -> None:
    """Make `out` an empty folder; only a folder that an earlier demo made is replaced."""
    if out.exists() and not (out / MARK).is_file():
        raise UsageError(
            f"{out} is there already and is not a demo's folder", expected="a new folder",
            hint="porter demo -o ANOTHER-FOLDER",
        )  # fmt: skip
    try:
        shutil.rmtree(out, ignore_errors=False) if out.exists() else None
        out.mkdir(parents=True)
        (out / MARK).touch()
    except OSError as error:
        raise ResourceError(f"cannot write to {out}", found=str(error), hint="porter demo -o ANOTHER-FOLDER") from error


def _run(verb: str, *arguments: str) -> None:
    """Print one command as a user would type it, and run it in this process."""
    console().print(f"\n$ {shlex.join(['porter', verb, *arguments])}", style="bold cyan", markup=False, soft_wrap=True)
    module: Any = import_module(f"porter.commands.{verb}")
    module.command.main(args=list(arguments), prog_name=f"porter {verb}", standalone_mode=False)


def _must_fail(verb: str, *arguments: str) -> None:
    """Run a command whose check must fail.

    Raises:
        CheckFailed: the check passed.
    """
    try:
        _run(verb, *arguments)
    except CheckFailed as failure:
        _say(f"exit code {failure.exit_code}")
    else:
        raise CheckFailed(
            "the planted fault was not found", hint="report this: porter --version, and the command above"
        )


def _contact_sheet(port: Path, path: Path) -> None:
    from runtime.image import contact_sheet, to_pil
    from runtime.registry import load

    batch = load(port, device="cpu").generate(list(CAPTIONS), seed=SEED)
    assert batch.output is not None
    contact_sheet(to_pil(batch.output), CAPTIONS, columns=4).save(path)


def _beside(good: Path, broken: Path, path: Path) -> None:
    from PIL import Image

    from runtime.image import contact_sheet

    with Image.open(good) as left, Image.open(broken) as right:
        contact_sheet([left, right], ["the port", "with the planted fault"], columns=2, cell=320).save(path)


def _conclusion(port: Path) -> tuple[str, Path]:
    """The last line of a port's parity document, and its report."""
    import json

    document = json.loads((port / "parity" / "parity.json").read_text(encoding="utf-8"))
    return str(document["conclusion"]), port / "parity" / "report.html"


def _title(text: str) -> None:
    console().print(f"\n{text}", style="bold", markup=False)


def _say(text: str) -> None:
    console().print(text, markup=False)
