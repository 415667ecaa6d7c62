"""The `porter` command: a table of verbs, loaded when they are used, and the one place where errors end.

Exit codes: 0 done and holds, 1 a check failed, 2 usage, 3 no access, 4 missing or unreachable, 5 out of memory or disk,
6 bad input, 7 internal error; 130 after Ctrl-C, 141 when the reader of the output went away. `porter.core.errors` draws
the tree.
"""

from __future__ import annotations

import errno
import gc
import importlib
import io
import os
import platform
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import click

import porter
from porter.core.errors import PorterError, ResourceError, UsageError, visible

# verb → its line in `porter --help`. The module is porter.commands.<verb>, its click command is called `command`.
VERBS = {
    "plan": "Show what a model holds and what each component needs.",
    "convert": "Write a port folder in another layout, with its manifest.",
    "recipe": "Show a recipe's rules, or its account of a file.",
    "parity": "Compare a port with its reference and write the report.",
    "generate": "Generate images and videos from a port.",
    "bench": "Measure ports beside their peers.",
    "families": "List the catalogue and what each family is proven against.",
    "demo": "Run the four verbs on the embedded model, then plant a fault.",
}


# Headers and layouts are many small objects without cycles: looking for some every 700 takes a sixth of a plan's time.
_OBJECTS = 50_000


class VerbTable(click.Group):
    """A group whose commands are imported one by one, on use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        command = importlib.import_module(f"porter.commands.{cmd_name}").command
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in VERBS and not args[0].startswith("-"):
            raise click.UsageError(f"no verb is called {args[0]!r}; the verbs are {', '.join(VERBS)}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl(list(VERBS.items()))


@click.group(cls=VerbTable, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(porter.__version__, prog_name="porter")
def app() -> None:
    """Move diffusion models between codebases, with proof.

    MODEL is a Hugging Face id, a folder, a checkpoint file, or builtin:tiny-flux.
    """


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code.

    Args:
        arguments: what follows `porter`; the process's own by default.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if arguments is None:
        gc.set_threshold(_OBJECTS)
    if sys.stdout is None:  # closed by the caller (`porter plan … >&-`)
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 (lives as long as the process)
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file name may hold what the terminal cannot show
    try:
        if any("\0" in word for word in given):
            raise UsageError("an argument holds a NUL character", hint="type it again")
        if "_PORTER_COMPLETE" in os.environ:  # the shell asks for completions
            app.main(args=given, prog_name="porter")
        # Not `app.main`: it turns a closed pipe into exit code 1, which here means that a check failed.
        with app.make_context("porter", given) as context:
            result = app.invoke(context)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except BaseException as error:
        try:
            return _end(error, given)
        except OSError:  # stderr cannot be written (`2>/dev/full`): the exit code must do
            return _code(error)


def _code(error: BaseException) -> int:
    """The exit code of an error whose message could not be printed."""
    if isinstance(error, KeyboardInterrupt | click.exceptions.Abort):
        return 130
    if isinstance(error, click.ClickException):
        return 2
    shown = error if isinstance(error, PorterError) else _resource(error)
    return shown.exit_code if shown else 7


def _end(error: BaseException, given: Sequence[str]) -> int:
    """Prints what went wrong on stderr and returns the exit code."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if isinstance(error, BrokenPipeError):
        # The reader of our output has gone (`porter plan … | head`): nothing more can be said to it.
        # It is not "done and holds": 128 + SIGPIPE, as other programs end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    if isinstance(error, click.exceptions.Exit):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt | click.exceptions.Abort):
        click.echo("stopped; nothing half-written was left where a result belongs", err=True)
        return 130
    if _verbose(given) and not isinstance(error, click.ClickException):
        click.echo(_frames(error), err=True, nl=False)
    if isinstance(error, click.ClickException):
        error.show(sys.stderr)
        return 2
    shown = error if isinstance(error, PorterError) else _resource(error)
    if shown is None:
        click.echo(f"porter: internal error: {type(error).__name__}: {visible(str(error))}", err=True)
        click.echo(f"  report:   {_where(error)}", err=True)
        click.echo("  next:     run it again with --verbose for the traceback, and report both", err=True)
        return 7
    shown.hint = shown.hint or f"porter {given[0]} --help"
    first, *rest = shown.lines()
    click.echo(click.style("error: ", fg="red", bold=True) + first, err=True, color=_color())
    for line in rest:
        click.echo(line, err=True)
    return shown.exit_code


def _frames(error: BaseException) -> str:
    """Where an error came from, without the frames of the command line's library and without its message."""
    told = traceback.TracebackException.from_exception(error)
    each: traceback.TracebackException | None = told
    while each is not None:
        each.stack = traceback.StackSummary.from_list([frame for frame in each.stack if not _foreign(frame.filename)])
        each = each.__cause__ or each.__context__
    return visible("".join(told.format()).removesuffix("".join(told.format_exception_only())))


def _foreign(file: str) -> bool:
    return Path(file).parent == Path(click.__file__).parent


def _verbose(given: Sequence[str]) -> bool:
    """Whether -v or --verbose stands among the arguments; read here, as the error may come from parsing them."""
    options = given[: given.index("--")] if "--" in given else given
    return any(word in ("-v", "--verbose") for word in options)


def _resource(error: BaseException) -> ResourceError | None:
    """Running out of memory or disk, raised by someone who does not know our errors."""
    refused = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)  # torch's, by name
    if isinstance(error, MemoryError) or refused:
        found = str(error).splitlines()[0] if str(error) else None
        return ResourceError("out of memory", found=found, hint="free memory, or use a smaller --dtype")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceError(f"the disk is full: {error.filename or error}", hint="free space, then run the same again")
    return None


def _where(error: BaseException) -> str:
    """The line to report: version, Python, place and error, in one line."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f"{frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno}" if frames else "?"
    return f"`porter {porter.__version__}, Python {platform.python_version()}, {place}, {type(error).__name__}`"


def _color() -> bool | None:
    """NO_COLOR forbids, FORCE_COLOR demands, otherwise click looks at the terminal."""
    if os.environ.get("NO_COLOR"):
        return False
    return True if os.environ.get("FORCE_COLOR") else None


if __name__ == "__main__":
    sys.exit(main())
