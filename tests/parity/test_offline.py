"""Two traces compared offline, and the commands that make and compare them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from parity.compare import DIFFERS, OVER, ROUNDING, SKIPPED
from parity.component import ComponentResult
from parity.drawn import draw
from parity.loading import load_case
from parity.offline import compare_traces
from parity.outcome import reason_of
from parity.recorder import Watch, file_sha256, record
from parity.reference import record_reference
from parity.trace import Trace
from porter.cli import main
from tests.parity.cases import write_case
from tests.parity.pair import CONFIG, Original, Port, convert
from tests.parity.pair import case as pair

Edit = Callable[[dict[str, Any], dict[str, torch.Tensor]], object]


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A reference's trace, and one of the same written another way that rounds differently."""
    folder = tmp_path_factory.mktemp("traces")
    other = "class Other(Net):\n    def forward(self, x):\n        return super().forward(x.flip(0)).flip(0)\n"
    other += "Reference = Other"
    for name, code in (("a", "Reference = Net"), ("b", other)):
        record_reference(load_case(write_case(folder, code, f"{name}.py")), 0).save(folder / f"{name}.safetensors")
    return folder / "a.safetensors", folder / "b.safetensors"


def edited(path: Path, edit: Edit, out: Path) -> Path:
    """A copy of a trace with its metadata and tensors changed."""
    with safe_open(str(path), "pt") as f:
        document = json.loads(f.metadata()["trace"])
        tensors = {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118
    edit(document, tensors)
    save_file({k: t.contiguous() for k, t in tensors.items()}, out, metadata={"trace": json.dumps(document)})
    return out


def compared(a: Path, b: Path, **options: Any) -> ComponentResult:
    return compare_traces(Trace.open(a), Trace.open(b), **options)


def test_two_traces_of_the_same(traces: tuple[Path, Path]) -> None:
    result = compared(traces[0], traces[0])
    assert result.passed and result.status == "identical" and result.counts["compared"] == 14
    assert result.counts["skipped"] == result.counts["missing"] == 0


def scaled(key: str, by: float) -> Edit:
    """Change one recorded tensor, in float32 and float64 alike."""

    def edit(document: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        row = next(row for row in document["events"] if row[0] == key)
        tensors[key], tensors[key + "|delta"] = tensors[row[4]] * by, tensors[row[4] + "|delta"] * by
        row[4] = key

    return edit


def test_a_difference_is_named(traces: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "b.safetensors"
    result = compared(traces[0], edited(traces[0], scaled("forward/blocks.1.up#0.out.0", 1 + 1e-5), out))
    assert result.status == DIFFERS and str(result.guilty).startswith("blocks.1.up") and "float64" in reason_of(result)
    result = compared(traces[0], edited(traces[0], scaled("forward/=.out.0", 1.1), out))
    assert result.status == OVER
    assert compared(traces[0], edited(traces[0], scaled("forward/=.out.0", float("nan")), out)).status == DIFFERS


def drop(document: dict[str, Any], tensors: dict[str, torch.Tensor], *, part: str) -> None:
    document["events"] = [row for row in document["events"] if part not in row[0]]


DAMAGE: dict[str, tuple[Edit, str]] = {
    "other weights": (lambda d, t: d["source"].update(sha256="0" * 64), "other weights"),
    "no weights named": (lambda d, t: d.pop("source"), "does not say which weights"),
    "a module missing": (lambda d, t: drop(d, t, part="blocks.1.up#"), "has nothing of it"),
    "an output missing": (lambda d, t: drop(d, t, part="forward/=.out"), "has nothing of it"),
    "a pass missing": (lambda d, t: drop(d, t, part="forward~x/"), "no such pass"),
    "all of it missing": (lambda d, t: d.update(events=[]), "nothing in common"),
    "other inputs": (scaled("forward/=.in.x", 1.5), "other inputs: x"),
    "no inputs": (lambda d, t: drop(d, t, part="forward/=.in"), "has the inputs x, the other none"),
    "it never ran": (lambda d, t: d.update(idle=["head"]), "never ran: head"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_what_lacks_is_no_pass(traces: tuple[Path, Path], tmp_path: Path, name: str) -> None:
    edit, says = DAMAGE[name]
    result = compared(traces[0], edited(traces[0], edit, tmp_path / "b.safetensors"))
    assert result.status == SKIPPED and not result.passed and says in reason_of(result)


def test_more_than_the_reference_has_is_no_pass(traces: tuple[Path, Path], tmp_path: Path) -> None:
    out = edited(traces[0], lambda d, t: drop(d, t, part="blocks.1.up#"), tmp_path / "a.safetensors")
    result = compared(out, traces[0])
    assert result.status == SKIPPED and "recorded nothing of 1 modules: blocks.1.up" in reason_of(result)


def test_nothing_in_common(traces: tuple[Path, Path], tmp_path: Path) -> None:
    def renamed(document: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        for row in document["events"]:
            row[0] = row[0].replace("forward/", "other/").replace("forward~x/", "other~x/")

    result = compared(traces[0], edited(traces[0], renamed, tmp_path / "b.safetensors"))
    assert result.status == SKIPPED and result.reason == "the two traces have nothing in common"


def test_samples(tmp_path: Path) -> None:
    """A whole tensor answers for any sample of it; two other samples of it cannot be compared."""
    net = torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.Linear(64, 2))
    passes = {"forward": (lambda m, i: m(i["x"]), {"x": torch.ones(3, 4)})}
    made = {n: Trace.of(record(net, passes, [Watch(r"\d", n)], {"source": {"sha256": "x"}})) for n in (None, 50, 70)}
    assert compare_traces(made[50], made[None]).passed and compare_traces(made[50], made[50]).passed
    for a, b in ((50, 70), (70, 50), (None, 50)):
        result = compare_traces(made[a], made[b])
        assert result.status == SKIPPED and "elements of it" in reason_of(result)


BROKEN: dict[str, tuple[Callable[[Path], object], int, str]] = {
    "cut short": (lambda p: p.write_bytes(p.read_bytes()[:-100]), 6, "is not a readable trace"),
    "empty": (lambda p: p.write_bytes(b""), 6, "is not a readable trace"),
    "no trace": (lambda p: save_file({"x": torch.ones(1)}, p), 6, "is not a trace"),
    "another version": (lambda p: edited(p, lambda d, t: d.update(schema="porter.trace/7"), p), 6, "porter.trace/7"),
    "rows of another kind": (lambda p: edited(p, lambda d, t: d.update(events=[[1]]), p), 6, "cannot be used"),
    "no rows": (lambda p: edited(p, lambda d, t: d.pop("events"), p), 6, "cannot be used"),
    "a shape that lies": (
        lambda p: edited(p, lambda d, t: d["events"][3].__setitem__(1, [1, 1]), p),
        6,
        "cannot be used",
    ),
    "a count that lies": (lambda p: edited(p, lambda d, t: d["events"][3].__setitem__(3, 2), p), 6, "cannot be used"),
    "a name that is none": (lambda p: edited(p, lambda d, t: d["events"][3].__setitem__(0, "x"), p), 6, "event key"),
    "weights of another kind": (lambda p: edited(p, lambda d, t: d.update(source=["x"]), p), 6, "cannot be used"),
    "lost tensors": (lambda p: edited(p, lambda d, t: [t.pop(k) for k in list(t)[:2]], p), 6, "lacks tensors"),
    "gone": (lambda p: p.unlink(), 4, "does not exist"),
    "a folder": (lambda p: (p.unlink(), p.mkdir()), 4, "is a folder"),
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("side", ["A", "B"])
def test_a_file_that_is_no_trace(
    traces: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, side: str
) -> None:
    damage, code, says = BROKEN[name]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(traces[0].read_bytes())
    damage(path)
    given = [str(path), str(traces[0])] if side == "A" else [str(traces[0]), str(path)]
    assert main(["parity", "compare", *given]) == code
    said = capsys.readouterr()
    assert says in said.err and "next:" in said.err and "PASS" not in said.out


@pytest.fixture
def pair_case(tmp_path: Path) -> str:
    path = tmp_path / "pair_case.py"
    path.write_text("from tests.parity.pair import case\n")
    return str(path)


def recorded_port(tmp_path: Path, edit: Callable[[Any], object] = lambda m: None) -> tuple[Path, Path, Path]:
    """The reference's trace, the port's, and the file of weights that the port was recorded with."""
    reference = tmp_path / "a.safetensors"
    record_reference(pair, 0).save(reference)
    with torch.device("cpu"):
        state = {n: torch.from_numpy(draw(n, tuple(t.shape), 0)) for n, t in Original(CONFIG).state_dict().items()}
    weights, port = tmp_path / "port.safetensors", Port(CONFIG)
    converted = {n: t.clone().contiguous() for n, t in convert(state).items()}
    port.load_state_dict(converted)
    save_file(converted, weights)
    edit(port)
    watch = [Watch("|".join(p.replace(".", r"\.") for p, m in port.named_modules() if p))]
    passes = {}
    for name in Trace.open(reference).passes:
        passes[name] = (pair.candidate.passes["forward"], Trace.open(reference).inputs(name))
    meta = {"source": {"file": weights.name, "sha256": file_sha256(weights)}, "reference": {"name": "Port"}}
    candidate = tmp_path / "b.safetensors"
    record(port, passes, watch, meta).save(candidate)
    return reference, candidate, weights


def test_aligned_by_a_case(tmp_path: Path, pair_case: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Other names, fused against split, other layouts: matched as the conversion moves the weights."""
    a, b, weights = recorded_port(tmp_path)
    assert main(["parity", "compare", str(a), str(b)]) == 1
    assert "other weights" in capsys.readouterr().out
    assert main(["parity", "compare", str(a), str(b), "--case", pair_case]) == 1
    assert "--weights FILE shows it" in capsys.readouterr().out
    assert main(["parity", "compare", str(a), str(b), "--case", pair_case, "--weights", str(weights)]) == 0
    said = capsys.readouterr().out
    assert f"PASS {ROUNDING}" in said and "0 skipped, 0 missing" in said
    other = tmp_path / "other.safetensors"
    save_file({"x": torch.ones(1)}, other)
    assert main(["parity", "compare", str(a), str(b), "--case", pair_case, "--weights", str(other)]) == 1
    assert "was not recorded with other.safetensors" in capsys.readouterr().out
    other.write_bytes(b"none")
    assert main(["parity", "compare", str(a), str(b), "--case", pair_case, "--weights", str(other)]) == 6
    assert main(["parity", "compare", str(b), str(a), "--case", pair_case]) == 6
    assert main(["parity", "compare", str(a), str(b), "--weights", str(weights)]) == 2
    assert main(["parity", "compare", str(a), str(b), "--case", str(other)]) == 4


def test_a_fault_found_offline(tmp_path: Path, pair_case: str, capsys: pytest.CaptureFixture[str]) -> None:
    def eps(port: Any) -> None:
        port.layers[2].norm_b.eps = 1e-5

    a, b, weights = recorded_port(tmp_path, eps)
    given = ["parity", "compare", str(a), str(b), "--case", pair_case, "--weights", str(weights)]
    assert main([*given, "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "porter.traces/1" and not document["passed"] and document["status"] == DIFFERS
    assert document["guilty"].startswith("layers.2.norm_b ↔ blocks.2.norm2"), document["guilty"]
    assert all(len(m["key"]) > 0 for m in document["modules"]) and document["outputs"]


def test_record_and_compare_on_the_command_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    case = write_case(tmp_path, "def call(m, i):\n    print('noise')\n    return m(**i)\nReference = Net")
    assert main(["parity", "record", case, "--json"]) == 0
    document = json.loads(capfd.readouterr().out)
    assert document["trace"] == "trace.safetensors" and document["modules"] == 6 and document["passes"][0] == "forward"
    assert main(["parity", "record", case, "-o", "again.safetensors", "--seed", "0"]) == 0
    said = capfd.readouterr().out
    assert "noise" not in said and "again.safetensors: " in said
    assert main(["parity", "compare", "trace.safetensors", "again.safetensors"]) == 0
    assert "PASS identical" in capfd.readouterr().out
    assert main(["parity", "record", case, "--limit", "0"]) == 2
    assert main(["parity", "record", "nowhere.py"]) == 4


USAGE = [
    [],
    ["case.py", "--module", "x.py:build"],
    ["case.py", "--inputs", "x"],
    ["--module", "x.py:build"],
    ["--module", "x.py:build", "--inputs", "a", "--source", "a", "--watch", ".*", "--shims"],
    ["case.py", "--write", "kit", "-o", "x"],
    ["case.py", "--level", "deep"],
]


@pytest.mark.parametrize("given", USAGE, ids=" ".join)
def test_words_that_do_not_go_together(given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_case(tmp_path)
    assert main(["parity", "record", *given]) == 2 and [p.name for p in tmp_path.iterdir()] == ["case.py"]


def test_a_module_recorded_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.py").write_text(
        "import torch\ndef build():\n    return torch.nn.Sequential(torch.nn.Linear(3, 2))\n"
    )
    inputs = tmp_path / "inputs.safetensors"
    save_file({"input": torch.ones(1, 3)}, inputs)
    out = tmp_path / "trace.safetensors"
    given = [
        "parity",
        "record",
        "--module",
        f"{tmp_path}/mine.py:build",
        "--inputs",
        str(inputs),
        "--source",
        str(inputs),
    ]
    assert main([*given, "--watch", "0@1", "-o", str(out)]) == 0
    assert Trace.open(out).value("forward/0#0.out.0").low.numel() == 1


def test_the_recorder_written_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its own README's command runs there, without porter, and the trace is the same as here."""
    case, kit = write_case(tmp_path), tmp_path / "kit"
    assert main(["parity", "record", case, "--write", str(kit)]) == 0
    readme = (kit / "README.md").read_text()
    line = next(line for line in readme.splitlines() if "record.py parity.reference" in line).strip()
    words = line.split(" ")[2:]
    assert words[:3] == ["record.py", "parity.reference", "case.py"]
    command = [sys.executable, "-S", *[w for w in words if w not in ("--reference-repo", "CHECKOUT")]]
    script = (
        "import runpy, sys; sys.path += {!r}; sys.argv = sys.argv[1:]; runpy.run_path('record.py', run_name='__main__')"
    )
    site = [p for p in sys.path if p.endswith("-packages")]
    done = subprocess.run(
        [command[0], "-S", "-c", "import sys; sys.path[:0] = ['.']\n" + script.format(site), *command[2:]],
        cwd=kit, capture_output=True, text=True, env={},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    own = tmp_path / "own.safetensors"
    record_reference(load_case(case), 0).save(own)
    assert compared(kit / "trace.safetensors", own).status == "identical"
    assert main(["parity", "record", case, "--write", str(kit)]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert main(["parity", "record", "nowhere.py", "--write", str(tmp_path / "k")]) == 4


def test_a_port_called_record_is_reached_by_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "record").mkdir()
    assert main(["parity", "./record"]) in (4, 6) and "manifest" in capsys.readouterr().err
    assert main(["parity", "record"]) == 2 and "nothing to record" in capsys.readouterr().err


@pytest.mark.parametrize("part", [[], ["record"], ["compare"]], ids=str)
def test_help_imports_no_torch(part: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code = (
        f"import sys; from porter.cli import main; main({['parity', *part, '--help']!r}); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("False\n") and "Usage: porter parity" in done.stdout
    assert part or ("record" in done.stdout and "compare" in done.stdout)


def test_code_between_two_modules_is_said_to_be_the_one_around_them(traces: tuple[Path, Path], tmp_path: Path) -> None:
    def spoil(document: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        row = next(row for row in document["events"] if row[0] == "forward/blocks.1.down#0.in.input")
        tensors["spoilt"], tensors["spoilt|delta"] = (tensors[row[4] + end].clone() for end in ("", "|delta"))
        tensors["spoilt"].view(-1)[3] = float("nan")
        row[4] = "spoilt"

    guilty = compared(traces[0], edited(traces[0], spoil, tmp_path / "c.safetensors")).guilty
    assert guilty is not None and (guilty.candidate, guilty.reference) == ("blocks.1", "blocks.1")
