"""The reference in a process of its own: another interpreter, a checkout, limits, and everything that may go wrong."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import venv
from pathlib import Path

import pytest
import torch

import parity
from parity import foreign
from parity.foreign import KIT, record_elsewhere, run_recorder
from parity.loading import load_case
from parity.reference import record_reference
from parity.trace import Trace
from porter.core.errors import BadInputError, MissingError, PorterError, ResourceError, UsageError
from tests.parity.cases import write_case


def error_of(kind: type[PorterError], case: str, **options: object) -> str:
    """The message of the error that recording ends in; every one has a next command."""
    with pytest.raises(kind) as caught:
        record_elsewhere(case, **options)  # type: ignore[arg-type]
    assert type(caught.value) is kind and caught.value.hint and "Traceback" not in caught.value.what
    return str(caught.value)


def test_it_answers_as_it_does_here(tmp_path: Path) -> None:
    case = write_case(tmp_path)
    here = Trace.of(record_reference(load_case(case), 3))
    out = tmp_path / "trace.safetensors"
    there = record_elsewhere(case, seed=3, out=out)
    assert list(here.events) == list(there.events) == list(Trace.open(out).events) and len(there.events) == 16
    assert all(torch.equal(here.value(k).high, there.value(k).high) for k in here.events)
    assert here.meta["source"] == there.meta["source"] and there.meta["case"]["file"] == "case.py"
    assert record_elsewhere(case, seed=4).meta["source"] != there.meta["source"]
    inner = record_elsewhere(case, level="block", inside="blocks.1").modules("forward")
    assert set(inner) == {"blocks.1.up", "blocks.1.down"}


def test_an_interpreter_without_porter(bare_python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the working folder and PYTHONPATH hold a `parity` of their own."""
    (tmp_path / "parity").mkdir()
    (tmp_path / "parity" / "__init__.py").write_text("raise SystemExit('the wrong parity')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    said = "import importlib.util, sys\nassert importlib.util.find_spec('porter') is None\nname = sys.prefix\n"
    case = write_case(tmp_path, f"{said}class Reference(Net): pass\nReference.__qualname__ = name")
    trace = record_elsewhere(case, python=bare_python)
    assert trace.meta["reference"]["name"].endswith(str(Path(bare_python).parent.parent))
    assert len(trace.modules("forward")) == 6
    monkeypatch.setenv("PATH", str(Path(bare_python).parent), prepend=os.pathsep)
    assert record_elsewhere(case, python="python").meta["reference"] == trace.meta["reference"]


def test_the_kit_is_complete_and_self_contained(bare_python: str, tmp_path: Path) -> None:
    """Nothing but the kit is imported of the project, and each of its files is used."""
    foreign.write_kit(tmp_path)
    assert {p.name for p in (tmp_path / "parity").iterdir()} == set(KIT)
    code = (
        "import sys; import parity.reference, parity.shims; print(*sorted(m for m in sys.modules if m[:6] == 'parity'))"
    )
    done = subprocess.run([bare_python, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True, env={})
    assert done.stdout.split() == sorted(["parity", *(f"parity.{n[:-3]}" for n in KIT if n != "__init__.py")])


def test_the_kit_speaks_an_older_python() -> None:
    """Syntax and names of Python 3.9, as far as ruff knows them."""
    files = [str(Path(parity.__file__).parent / name) for name in KIT]
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--target-version", "py39", "--select", "F"]
    done = subprocess.run([*command, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def checkout(folder: Path) -> Path:
    """A checkout with a package that imports flash_attn, and a commit."""
    package = folder / "checkout" / "theirs"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "model.py").write_text(
        "import torch\nfrom torch import nn\nfrom flash_attn import flash_attn_func\n\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n"
        "        self.qkv, self.out = nn.Linear(4, 24), nn.Linear(8, 4)\n"
        "    def forward(self, x):\n"
        "        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).unbind(-3)\n"
        "        return self.out(flash_attn_func(q, k, v, causal=True).flatten(-2))\n"
    )
    git = ["git", "-C", str(package.parent), "-c", "user.name=t", "-c", "user.email=t@example.org"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "first"]):
        subprocess.run([*git, *words], check=True)
    return package.parent


THEIRS = """
def Reference():
    from theirs.model import Net as Theirs
    return Theirs()
"""


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()
    }


@pytest.mark.slow
def test_a_checkout_is_read_and_never_written(
    bare_python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPU-only imports are stood in for on request, and the trace says which were called."""
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    repo, case = checkout(tmp_path), write_case(tmp_path, THEIRS)
    before = snapshot(repo)
    text = error_of(MissingError, case, repo=repo)
    assert "no module flash_attn" in text and "--shims=flash_attn" in text
    assert "no module theirs" in error_of(MissingError, case) and "--reference-repo" in error_of(MissingError, case)
    for python in (None, bare_python):
        trace = record_elsewhere(case, repo=repo, shims=["flash_attn"], python=python)
        assert trace.meta["shims"] == ["flash_attn.flash_attn_func"]
        assert "CPU stand-ins ran in place of flash_attn.flash_attn_func" in trace.meta["notes"]
        assert len(trace.meta["reference"]["commit"]) == 40
    assert snapshot(repo) == before
    assert "notes" not in record_elsewhere(write_case(tmp_path, name="other.py"), shims=[]).meta
    assert "no stand-in for 'numba'" in error_of(BadInputError, case, shims=["numba"])


def test_what_lies_beside_the_case_can_be_imported_late(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("width = 4")
    case = write_case(tmp_path, "def Reference():\n    import beside\n    assert beside.width == 4\n    return Net()")
    assert record_elsewhere(case).events


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("/nowhere/python", "does not exist"),
        (str(Path(__file__).parent), "is a folder"),
        (__file__, "cannot be executed"),
    ],
)
def test_no_such_interpreter(tmp_path: Path, name: str, says: str) -> None:
    text = error_of(MissingError, write_case(tmp_path), python=name)
    assert says in text and "--reference-python" in text


def test_an_interpreter_that_is_none(tmp_path: Path) -> None:
    text = error_of(MissingError, write_case(tmp_path), python="ls-of-nothing")
    assert "does not exist" in text
    script = tmp_path / "fake"
    script.write_text("#!/bin/sh\necho not a python >&2\nexit 9\n")
    script.chmod(0o755)
    text = error_of(BadInputError, write_case(tmp_path), python=str(script))
    assert "exit code 9" in text and "not a python" in text
    script.write_text("no program at all")
    assert "cannot be started" in error_of(MissingError, write_case(tmp_path), python=str(script))


def test_an_interpreter_without_torch(tmp_path: Path) -> None:
    venv.create(tmp_path / "empty", with_pip=False, symlinks=True)
    text = error_of(MissingError, write_case(tmp_path), python=str(tmp_path / "empty" / "bin" / "python"))
    assert "has no module torch" in text and "safetensors" in text and "--reference-python" in text


@pytest.mark.slow
def test_no_such_checkout_or_case(tmp_path: Path) -> None:
    assert "no such checkout" in error_of(MissingError, write_case(tmp_path), repo=tmp_path / "nowhere")
    assert "no such case file" in error_of(MissingError, str(tmp_path / "nowhere.py"))
    (tmp_path / "broken.py").write_text("def (")
    assert "SyntaxError" in error_of(BadInputError, str(tmp_path / "broken.py"))
    assert "has no case other" in error_of(BadInputError, f"{write_case(tmp_path)}:other")


CRASHES = {
    "raises": ("def call(m, i): raise KeyError('no such layer')", BadInputError, "KeyError: 'no such layer'"),
    "raises many lines": (
        "def call(m, i): raise ValueError('first\\n' + 'more\\n' * 9)",
        BadInputError,
        "ValueError: first",
    ),
    "exits with words": ("def call(m, i): sys.exit('no weights here')", BadInputError, "no weights here"),
    "exits as if well": ("def call(m, i): os._exit(0)", BadInputError, "without a trace"),
    "segfault": ("def call(m, i): os.kill(os.getpid(), signal.SIGSEGV)", BadInputError, "crashed: Segmentation fault"),
    "killed": ("def call(m, i): os.kill(os.getpid(), signal.SIGKILL)", ResourceError, "want of memory"),
    "out of memory": ("def call(m, i): return torch.empty(1 << 50)", ResourceError, "ran out of memory"),
    "no module": ("def Reference(): return 5", BadInputError, "returns int, not a torch.nn.Module"),
}


@pytest.mark.parametrize("name", CRASHES)
def test_a_reference_that_does_not_come_back(tmp_path: Path, name: str) -> None:
    code, kind, says = CRASHES[name]
    case = write_case(tmp_path, f"{code}\n" + ("" if "def Reference" in code else "Reference = Net"))
    assert says in error_of(kind, case)


def test_a_reference_that_hangs(tmp_path: Path) -> None:
    """It is killed with all that it started, even what ignores a polite request and holds its output open."""
    marker = tmp_path / "child"
    code = f"""
def call(m, i):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = os.fork()
    if not child:
        open({str(marker)!r}, "w").write(str(os.getpid()))
    print("about to hang", file=sys.stderr, flush=True)
    time.sleep(600)
Reference = Net
"""
    began = time.monotonic()
    text = error_of(BadInputError, write_case(tmp_path, code), limit=12)
    assert "did not finish within 12 s" in text and "--limit 24" in text and "about to hang" in text
    assert time.monotonic() - began < 25
    pid = int(marker.read_text())
    for _ in range(50):
        if not Path(f"/proc/{pid}").exists() or "State:\tZ" in Path(f"/proc/{pid}/status").read_text():
            break
        time.sleep(0.1)
    else:
        pytest.fail("its child lives on")


@pytest.mark.slow
def test_a_worker_that_left_holds_nobody_up(tmp_path: Path) -> None:
    """A daemon in a session of its own keeps the pipe open; the trace is there, and so is the answer."""
    marker = tmp_path / "daemon"
    code = f"""
def call(m, i):
    if not os.path.exists({str(marker)!r}) and not os.fork():
        os.setsid()
        open({str(marker)!r}, "w").write(str(os.getpid()))
        time.sleep(60)
    while not os.path.exists({str(marker)!r}):
        time.sleep(0.05)
    return m(**i)
Reference = Net
"""
    began = time.monotonic()
    try:
        assert record_elsewhere(write_case(tmp_path, code)).events
        assert time.monotonic() - began < 40
    finally:
        os.kill(int(marker.read_text()), signal.SIGKILL)


@pytest.mark.parametrize("limit", [0.0, -1.0, float("nan"), float("inf")])
def test_a_time_limit_is_a_time(tmp_path: Path, limit: float) -> None:
    assert "time limit" in error_of(UsageError, write_case(tmp_path), limit=limit)


def test_prints_stay_there(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Megabytes, binary, on both streams, from below Python too; the trace is not touched by them."""
    code = """
def call(m, i):
    os.write(1, bytes(range(256)) * 20_000)
    os.write(2, b"\\x1b[31m\\xff\\x00" * 400_000)
    print("\\ud800 ünïcode", flush=True)
    return m(**i)
Reference = Net
"""
    trace = record_elsewhere(write_case(tmp_path, code))
    assert trace.events and capfd.readouterr() == ("", "")
    text = error_of(BadInputError, write_case(tmp_path, code.replace("return m(**i)", "os._exit(2)")))
    assert len(text) < 10_000 and "\x1b" not in text and "bytes of output" in text and capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_a_trace_that_is_none(tmp_path: Path) -> None:
    """Cut short, of another kind, empty: what the process leaves is checked before it is believed."""
    patch = (
        "import parity.recorder as r\nsave = r.Recording.save\ndef cut(self, path):\n    {}\nr.Recording.save = cut\n"
    )
    patch += "Reference = Net"
    cuts = {
        "save(self, path); os.truncate(path, path.stat().st_size // 2)": "is not a readable trace",
        "save(self, path); os.truncate(path, 0)": "is not a readable trace",
        "path.write_text('hello')": "is not a readable trace",
        "r.SCHEMA = 'porter.trace/99'; save(self, path)": "porter.trace/99",
        "self.events.clear(); save(self, path)": "is empty",
        "pass": "without a trace",
    }
    for code, says in cuts.items():
        case = write_case(tmp_path, patch.format(code))
        with pytest.raises(BadInputError) as caught:
            record_elsewhere(case)
        assert says in str(caught.value), code


@pytest.mark.slow
def test_the_trace_s_place(tmp_path: Path) -> None:
    case = write_case(tmp_path)
    assert "cannot write" in error_of(ResourceError, case, out=tmp_path / "no" / "such" / "trace.safetensors")


def test_a_module_without_a_case(bare_python: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    (tmp_path / "mine.py").write_text(
        "import torch\ndef build():\n    torch.manual_seed(0)\n    return torch.nn.Linear(3, 2)\n"
    )
    save_file({"input": torch.ones(1, 3)}, tmp_path / "inputs.safetensors")
    source = str(tmp_path / "inputs.safetensors")
    arguments = ["parity.recorder", "--module", f"{tmp_path}/mine.py:build", "--inputs", source, "--source", source]
    trace = run_recorder([*arguments, "--watch", ".*"], python=bare_python)
    assert trace.value("forward/=.out.0").event.shape == (1, 2)


def test_assertions_of_imported_code_are_left_out_where_a_case_says_so(tmp_path: Path) -> None:
    (tmp_path / "strict_model.py").write_text(
        "def half(x):\n    assert str(x.dtype) == 'torch.float16'\n    return x\n"
    )
    strict = """
class Reference(Net):
    def __init__(self):
        super().__init__()
        from strict_model import half
        self.half = half
    def forward(self, x):
        return super().forward(self.half(x))
"""
    refused = error_of(BadInputError, write_case(tmp_path, strict))
    assert "strict_model.py:2: assert" in refused and "asserts=False" in refused
    path = Path(write_case(tmp_path, strict, "lenient.py"))
    path.write_text(
        path.read_text().replace("build=lambda config: Reference()", "asserts=False, build=lambda c: Reference()")
    )
    assert "forward/=.out.0" in record_elsewhere(str(path)).events


@pytest.mark.slow
def test_compiled_functions_run_as_they_are_written(tmp_path: Path) -> None:
    compiled = """
class Reference(Net):
    @torch.compile()
    def forward(self, x):
        import torch._dynamo
        assert not torch._dynamo.is_compiling()
        return super().forward(x)
"""
    trace = record_elsewhere(write_case(tmp_path, compiled))
    assert {"embed", "blocks.1.down", "head"} <= set(trace.modules("forward"))


@pytest.mark.slow
def test_a_package_whose_init_imports_too_much(tmp_path: Path) -> None:
    package = tmp_path / "big" / "models"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").write_text("import a_package_that_nobody_has\n")
    (package / "net.py").write_text("from .parts import SCALE\n")
    (package / "parts.py").write_text("SCALE = 2.0\n")
    uses = """
class Reference(Net):
    def __init__(self):
        super().__init__()
        from big.models.net import SCALE
"""
    assert "a_package_that_nobody_has" in error_of(MissingError, write_case(tmp_path, uses))
    path = Path(write_case(tmp_path, uses, "bare.py"))
    path.write_text(
        path.read_text().replace("build=lambda config: Ref", 'bare=("big", "big.models"), build=lambda c: Ref')
    )
    assert len(record_elsewhere(str(path)).modules("forward")) == 6


@pytest.mark.slow
def test_a_case_may_be_named_like_the_code_it_imports(tmp_path: Path) -> None:
    """A folder without __init__.py, which a file of its name would hide."""
    repo = tmp_path / "checkout"
    (repo / "theirs").mkdir(parents=True)
    (repo / "theirs" / "net.py").write_text("width = 4")
    text = "def Reference():\n    from theirs.net import width\n    assert width == 4\n    return Net()"
    assert record_elsewhere(write_case(tmp_path, text, "theirs.py"), repo=repo).events
    itself = "def Reference():\n    import theirs\n    assert theirs.HERE\n    return Net()\nHERE = True"
    assert record_elsewhere(write_case(tmp_path, itself, "theirs.py")).events
