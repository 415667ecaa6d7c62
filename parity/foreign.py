"""The reference side in a process of its own: another interpreter if wished, a time limit, its prints kept away.

A checkout goes on the process's `sys.path` and is never written to. All that comes back is the trace file; what the
process printed is shown, in part, when it fails.
"""

from __future__ import annotations

import os
import re
import selectors
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from parity.casename import split_case
from parity.early import SHIMMED, checkout, interpreter, time_limit
from parity.reference import MARK
from parity.state import ALSO
from parity.trace import Trace
from porter.core.errors import BadInputError, MissingError, PorterError, ResourceError

# What the recording side needs; these files import torch, numpy, safetensors, the standard library and each other.
KIT = (
    "__init__.py", "asserts.py", "case.py", "casename.py", "drawn.py", "exact.py", "halves.py", "loading.py",
    "perturb.py", "recorder.py", "reference.py", "shims.py", "shims_cuda.py", "shims_engine.py", "shims_flash.py",
    "shims_kernels.py", "shims_others.py", "shims_timm.py", "state.py", "stubs.py", "tied.py",
)  # fmt: skip
LIMIT = 1800.0  # seconds
ROOT = Path(__file__).resolve().parent.parent
# Runs a module with this file's folder as sys.path[0]: neither the working folder nor the kit's own files can hide what
# the reference imports.
LAUNCHER = """import runpy, sys
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""
_KEPT = 1 << 16  # bytes of each output stream that are kept
_SHOWN = 12  # lines of it in an error
_GPU = re.compile(
    r"CUDA|cuda|NVIDIA|flash_?attn|FLASH_ATTN|xformers|[Tt]riton"
    r"|sdpa_kernel|SDPBackend|No (available kernel|viable backend)"
)
_LACKS = re.compile(r"CPU stand-in (?:\(parity/shims.py\) has no|of) (\w+)")
_MEMORY = re.compile(r"MemoryError|can't allocate memory|Cannot allocate memory|std::bad_alloc|OutOfMemoryError")


def record_elsewhere(
    case_name: str,
    *,
    python: str | None = None,
    repo: Path | None = None,
    seed: int = 0,
    level: str = "module",
    inside: str = "",
    shims: Sequence[str] | None = None,
    limit: float = LIMIT,
    out: Path | None = None,
    weights: Path | None = None,
    dtype: str = "float32",
) -> Trace:
    """Record the reference of a case in another process -> its trace.

    Args:
        case_name: `FILE.py` or `FILE.py:NAME`.
        python: interpreter, with torch, safetensors and numpy; porter need not be there. None: this one.
        repo: checkout of the original code, for the process's `sys.path`.
        level, inside: see `parity.reference`.
        shims: packages to stand in for (see `parity.shims.install`); empty for the usual ones, None for none.
        limit: seconds until the process and all it started are killed.
        out: where the trace stays; None keeps none.
        weights: the reference's, in place of the case's.
        dtype: a lossy one to run in too.

    Raises:
        MissingError: no such case, interpreter or checkout, or a module that it lacks.
        BadInputError: the reference fails, ends, hangs, or leaves no whole trace.
        ResourceError: it ran out of memory, or `out` cannot be written.
    """
    file, _ = split_case(case_name)
    if not file.is_file():
        raise MissingError(f"no such case file: {file}", expected="CASE.py or CASE.py:NAME", hint="docs/parity.md")
    arguments = ["parity.reference", case_name, "--seed", str(seed), "--level", level]
    arguments += ["--inside", inside] if inside else []
    arguments += ["--weights", str(weights.absolute())] if weights is not None else []
    arguments += ["--dtype", dtype] if dtype != "float32" else []
    if repo is not None:
        checkout(repo)
        arguments += ["--reference-repo", str(repo.absolute())]
    if shims is not None:
        arguments.append(f"--shims={','.join(shims)}")
    return run_recorder(arguments, python=python, limit=limit, out=out)


def run_recorder(
    arguments: Sequence[str], *, python: str | None = None, limit: float = LIMIT, out: Path | None = None
) -> Trace:
    """Run `python -m` with `arguments`, a module of the kit first, and `-o`; raises as `record_elsewhere`."""
    with tempfile.TemporaryDirectory(prefix="porter-reference-") as scratch:
        folder = Path(scratch)
        exe = interpreter(python)
        if exe != sys.executable:
            write_kit(folder / "kit")
        part = folder / "trace.safetensors"
        root = folder / "kit" if exe != sys.executable else ROOT
        said = run_module([*arguments, "-o", str(part)], python=python, limit=limit, root=root)
        if not part.is_file():
            raise BadInputError(
                "the reference ended without a trace, as if all were well: something in it calls exit",
                expected="a trace file", found=said or "exit code 0 and no output", hint=_again(exe, arguments),
            )  # fmt: skip
        trace = Trace.open(part)
        if not trace.events:
            raise BadInputError(
                "the reference's trace is empty", expected="recorded tensors", hint=_again(exe, arguments)
            )
        if out is not None:
            _publish(part, out)
        return trace


def _publish(part: Path, out: Path) -> None:
    """Copy a finished trace to its place, where it appears complete or not at all; raises ResourceError."""
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        shutil.copyfile(part, partial)
        partial.replace(out)
    except OSError as error:
        raise ResourceError(f"cannot write {out}: {error.strerror}", hint="-o names another file") from error
    finally:
        with suppress(OSError):
            partial.unlink()


def run_module(arguments: Sequence[str], *, python: str | None = None, limit: float = LIMIT, root: Path = ROOT) -> str:
    """Run `python -m` with `arguments`, a module below `root` first -> what it said; raises as `record_elsewhere`."""
    time_limit(limit)
    exe = interpreter(python)
    with tempfile.TemporaryDirectory(prefix="porter-launch-") as scratch:
        launcher = Path(scratch) / "launch.py"
        launcher.write_text(LAUNCHER, encoding="utf-8")
        done = _run([exe, str(launcher), *arguments], _environment(root, exe), limit)
    if done.code != 0:
        raise _failure(done, exe, arguments, limit)
    return done.said()


def write_kit(folder: Path) -> list[Path]:
    """Put the files that record elsewhere into `folder`/parity -> them."""
    target = folder / "parity"
    target.mkdir(parents=True, exist_ok=True)
    here = Path(__file__).parent
    return [Path(shutil.copyfile(here / name, target / name)) for name in KIT]


def _environment(root: Path, exe: str) -> dict[str, str]:
    """The process's environment: `parity` importable, nothing written beside sources, no settings of this Python."""
    own = exe == sys.executable
    kept = {k: v for k, v in os.environ.items() if own or k not in ("PYTHONHOME", "PYTHONPATH", "VIRTUAL_ENV")}
    before = kept.get("PYTHONPATH", "")
    return kept | {
        "PYTHONPATH": os.pathsep.join([str(root), *([before] if before else [])]),
        "PYTHONDONTWRITEBYTECODE": "1",
        "TORCH_COMPILE_DISABLE": "1",  # compiling takes minutes, and only rounds otherwise
        "PYTHONFAULTHANDLER": "1",
        "TORCHDYNAMO_DISABLE": "1",  # hooks see no module inside of a compiled function
        "PYTHONIOENCODING": "utf-8:backslashreplace",
    }


class _Tail(threading.Thread):
    """Reads a stream to its end, and keeps its last bytes.

    Told to stop, it takes what is there and leaves: a process that left the group may hold the pipe for ever.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        super().__init__(daemon=True)
        self.stream, self.kept, self.count = stream, b"", 0
        self.last = threading.Event()
        self.start()

    def run(self) -> None:
        with self.stream, selectors.DefaultSelector() as ready:
            ready.register(self.stream, selectors.EVENT_READ)
            while True:
                if not ready.select(0.1):
                    if self.last.is_set():
                        return
                    continue
                chunk = os.read(self.stream.fileno(), _KEPT)
                if not chunk:
                    return
                self.count += len(chunk)
                self.kept = (self.kept + chunk)[-_KEPT:]

    def text(self) -> str:
        return self.kept.decode("utf-8", "backslashreplace")


@dataclass(frozen=True)
class _Done:
    """How the process ended: exit code (negative: the signal), None after the time limit; the ends of its output."""

    code: int | None
    error: str
    output: str
    count: int

    def said(self) -> str:
        """The last lines that it printed, errors before other output."""
        text = self.error.strip() or self.output.strip()
        lines = [line[:300] for line in text.splitlines() if line.strip()]
        more = [f"… ({self.count} bytes of output)"] if len(lines) > _SHOWN or self.count > _KEPT else []
        return "\n".join([*more, *lines[-_SHOWN:]])


def _run(command: list[str], environment: dict[str, str], limit: float) -> _Done:
    """Run to the end or to the limit, then kill whatever of its group is left."""
    try:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            start_new_session=True,
        )  # fmt: skip
    except OSError as refused:
        raise MissingError(
            f"{command[0]} cannot be started", found=refused.strerror,
            expected="a Python with torch, safetensors and numpy", hint="--reference-python <environment>/bin/python",
        ) from refused  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    output, error = _Tail(process.stdout), _Tail(process.stderr)
    code: int | None = None
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        pass
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its workers too, which may hold the pipes
        process.wait()
        for tail in (output, error):
            tail.last.set()
            tail.join(5)
    return _Done(code, error.text(), output.text(), output.count + error.count)


def _again(exe: str, arguments: Sequence[str]) -> str:
    """How to see it fail, without porter in between."""
    words = list(arguments)
    if "-o" in words[:-1]:  # the folder of this run is gone
        words[words.index("-o") + 1] = "trace.safetensors"
    command = ["python" if exe == sys.executable else exe, "-m", *words]
    return "see it alone: " + shlex.join(command)


def _failure(done: _Done, exe: str, arguments: Sequence[str], limit: float) -> PorterError:
    """What a failed process means."""
    said = done.said() or "no output"
    if done.code is None:
        return BadInputError(
            f"the reference did not finish within {limit:g} s, and was killed", found=said,
            hint=f"--limit {2 * limit:g} gives it more time; a smaller `config` in the case needs less",
        )  # fmt: skip
    if done.code == -signal.SIGKILL or _MEMORY.search(done.error):
        how = "ran out of memory" if done.code > 0 else "was killed, most often for want of memory"
        return ResourceError(
            f"the reference {how}", found=said, hint="a smaller `config` in the case, or --level block",
        )  # fmt: skip
    if done.code < 0:
        name = signal.strsignal(-done.code) or f"signal {-done.code}"
        return BadInputError(f"the reference crashed: {name}", found=said, hint=_again(exe, arguments))
    missing = re.search(r"No module named '([\w.]+)'", done.error)
    if missing:
        name = missing[1]
        also = re.search(re.escape(ALSO) + r"([\w, ]+)", done.error)
        others = also[1].split(", ") if also else []
        where = "the reference's interpreter" if exe != sys.executable else "this interpreter"
        bare = "Side(..., bare=(PACKAGE,)) does not run what only an __init__ imports"
        return MissingError(
            f"{where} has no module {', '.join([name, *others])}", found=said,
            hint=f"{_remedy(name, *others)}; {bare}",
            expected="torch, safetensors, numpy and what the reference needs",
        )  # fmt: skip
    _, mark, words = done.error.rpartition(MARK)
    if mark:
        first, _, rest = words.strip().partition("\n")
        gpu = _GPU.search(first) and not any(a.startswith("--shims") for a in arguments)
        hint = "--shims runs on the CPU what asks for a GPU; or " if gpu else ""
        if lacks := _LACKS.search(first):
            hint = f"if nothing is computed with it: Side(..., stubs=({lacks[1]!r},)) in the case; or "
        if not hint and "AssertionError" in first:
            hint = "Side(..., asserts=False) in the case leaves its assertions out; or "
        return BadInputError(first[:500], found=rest[:2000] or None, hint=hint + _again(exe, arguments))
    if done.code == MissingError.exit_code:  # a recording program of porter's own says what it lacks
        return MissingError("the reference lacks something", found=said, hint=_again(exe, arguments))
    return BadInputError(f"the reference ended with exit code {done.code}", found=said, hint=_again(exe, arguments))


def _remedy(*missing: str) -> str:
    names = list(dict.fromkeys(name.partition(".")[0] for name in missing))
    shimmed = [name for name in names if name in SHIMMED]
    told = [f"--shims={','.join(shimmed)} stands in for it on the CPU"] if shimmed else []
    if rest := tuple(name for name in names if name not in SHIMMED):
        told += [
            "--reference-repo <checkout> if it is the original code, else --reference-python <a Python that has it>",
            f"if it is imported and nothing is computed with it: Side(..., stubs={rest!r}) in the case",
        ]
    return "; ".join(told)
