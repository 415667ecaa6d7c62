"""The frame: the verb table, exit codes, what is printed where, and what is never imported."""

from __future__ import annotations

import errno
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest

import porter
from porter import cli
from porter.core import errors

ROOT = Path(__file__).parents[2]


def run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """`porter …` as a user runs it."""
    return subprocess.run(
        [sys.executable, "-m", "porter.cli", *arguments],
        capture_output=True, text=True, timeout=60, cwd=ROOT, env={**os.environ, **env},
    )  # fmt: skip


def test_help_lists_every_verb_and_imports_none_of_them() -> None:
    code = (
        "import sys; from porter.cli import main; code = main(['--help']);"
        "print([m for m in sys.modules if m.startswith(('porter.commands.', 'conversions', 'parity', 'runtime'))"
        " or m in ('torch', 'diffusers', 'transformers', 'numpy', 'rich', 'huggingface_hub')], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stderr.strip() == "[]"
    for verb, line in cli.VERBS.items():
        assert verb in done.stdout and line in done.stdout


def test_the_verb_table_is_what_design_says_and_every_verb_is_there() -> None:
    assert list(cli.VERBS) == ["plan", "convert", "recipe", "parity", "generate", "bench", "families", "demo"]


@pytest.mark.parametrize("verb", list(cli.VERBS))
def test_every_verb_has_help_with_the_conventions(verb: str) -> None:
    command = importlib.import_module(f"porter.commands.{verb}").command
    assert isinstance(command, click.Command)
    assert command.help and not command.help.startswith("None")
    for part in command.commands.values() if isinstance(command, click.Group) else (command,):
        options = {name for parameter in part.params for name in parameter.opts}
        assert {"--quiet", "-q", "--verbose", "-v"} <= options
        assert part.help and not part.help.startswith("None")


@pytest.mark.parametrize("verb", ["plan", "families"])
def test_reading_verbs_import_no_torch(verb: str) -> None:
    arguments = [verb, *(["builtin:tiny-flux"] if verb == "plan" else [])]
    code = (
        f"import sys; from porter.cli import main; code = main({arguments!r});"
        "heavy = [m for m in ('torch', 'diffusers', 'transformers', 'numpy') if m in sys.modules];"
        "print(code, heavy, file=sys.stderr)"
    )
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stderr.strip() == "0 []"
    assert time.perf_counter() - began < 5  # 0.2 s alone on this machine's cores; the bound is for a crowded runner


def test_json_is_one_document_on_stdout_and_nothing_else() -> None:
    for arguments, schema in ((("plan", "builtin:tiny-flux"), "porter.plan/1"), (("families",), "porter.families/1")):
        done = run(*arguments, "--json")
        assert (done.returncode, done.stderr) == (0, "")
        assert json.loads(done.stdout)["schema"] == schema


def test_errors_go_to_stderr_even_with_json() -> None:
    done = run("plan", "/no/such/place", "--json")
    assert (done.returncode, done.stdout) == (4, "")
    assert "no such path" in done.stderr and "next:" in done.stderr and "Traceback" not in done.stderr


def test_colour_only_where_it_is_wanted() -> None:
    plain = {"NO_COLOR": "", "FORCE_COLOR": ""}
    for env, coloured in (({**plain, "NO_COLOR": "1"}, False), ({**plain, "FORCE_COLOR": "1"}, True), (plain, False)):
        failed, planned = run("plan", "/no/such", **env), run("plan", "builtin:tiny-flux", **env)
        assert ("\x1b[" in failed.stderr) == coloured, env
        assert ("\x1b[" in planned.stdout) == coloured, env


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ((), "Usage"),
        (("bake",), "no verb is called 'bake'"),
        (("plan",), "MODEL"),
        (("plan", "a", "b"), "unexpected"),
        (("plan", "--frobnicate", "x"), "--frobnicate"),
        (("convert", "builtin:tiny-flux", "--to", "mars", "-o", "x"), "mars"),
        (("convert", "builtin:tiny-flux"), "-o PORT"),
    ],
)
def test_usage_errors_end_in_2(arguments: tuple[str, ...], word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    shown = capsys.readouterr()
    assert word in shown.err and shown.out == ""


CASES = [
    (errors.CheckFailed("it failed", expected="a", found="b", hint="porter parity x"), 1, "expected:"),
    (errors.UsageError("u"), 2, "u"),
    (errors.AccessError("gated"), 3, "gated"),
    (errors.MissingError("gone"), 4, "gone"),
    (errors.ResourceError("full"), 5, "full"),
    (errors.CheckpointError("bad"), 6, "bad"),
    (errors.RecipeError("rule"), 6, "rule"),
    (MemoryError(), 5, "out of memory"),
    (OSError(errno.ENOSPC, "No space left on device", "/x/y"), 5, "/x/y"),
    (ZeroDivisionError("oops"), 7, "internal error: ZeroDivisionError: oops"),
    (KeyboardInterrupt(), 130, "stopped"),
    (click.Abort(), 130, "stopped"),
]


@pytest.mark.parametrize(("error", "code", "text"), CASES, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("verbose", [False, True])
def test_every_error_ends_in_its_code(
    error: BaseException, code: int, text: str, verbose: bool,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The verb's own work raises; everything from parsing to the exit code is the real thing."""

    def broken(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("porter.commands.plan.make_plan", broken)
    assert cli.main(["plan", "builtin:tiny-flux", *(["-v"] if verbose else [])]) == code
    shown = capsys.readouterr()
    assert text in shown.err and shown.out == ""
    assert ("Traceback" in shown.err) == (verbose and code != 130)
    if code == 7:
        assert porter.__version__ in shown.err and "test_cli.py:" in shown.err


def test_ctrl_c_ends_in_130_without_a_traceback(tmp_path: Path) -> None:
    """A real interrupt in a real process that waits for a hub which never answers."""
    import signal
    import socket

    with socket.create_server(("127.0.0.1", 0)) as hub:
        env = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
        env |= {"HF_ENDPOINT": f"http://127.0.0.1:{hub.getsockname()[1]}", "HF_HOME": str(tmp_path)}
        command = [sys.executable, "-m", "porter.cli", "plan", "acme/tiny"]
        with subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True) as process:
            connection, _ = hub.accept()
            with connection:
                process.send_signal(signal.SIGINT)
                _, told = process.communicate(timeout=30)
    assert process.returncode == 130, told
    assert "Traceback" not in told


def test_a_reader_that_goes_away_ends_in_141_without_a_word() -> None:
    command = f"{sys.executable} -m porter.cli plan builtin:tiny-flux | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT, check=True)
    assert (done.stdout.strip(), done.stderr) == ("141", "")


def test_version() -> None:
    done = run("--version")
    assert done.stdout.strip() == f"porter, version {porter.__version__}"


def test_the_public_api_is_lazy_and_closed() -> None:
    code = (
        "import sys, porter; assert 'porter.core.plan' not in sys.modules;"
        "assert {'plan', 'convert', 'parity', 'load'} <= set(dir(porter));"
        "assert callable(porter.plan) and callable(porter.convert);"
        "assert 'torch' not in sys.modules;"
        "getattr(porter, 'nothing', None) is None or sys.exit('made up')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    assert callable(porter.parity) and callable(porter.load)


def test_a_traceback_ends_before_the_message_and_has_no_foreign_frames(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "/no/such/place", "-v"]) == 4
    shown = capsys.readouterr().err
    assert shown.count("no such path") == 1 and shown.count("next:") == 1
    assert "Traceback" in shown and "/click/" not in shown and "open_source" in shown
