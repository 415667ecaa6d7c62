"""`porter parity` with cases, other references, levels, dtypes and inputs: real files and processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from conversions.flux1.case import transformer_inputs
from porter.cli import main

ROOT = Path(__file__).resolve().parents[2]
PAIR = "import sys\nsys.path.insert(0, {root!r})\nfrom tests.parity.pair import case\n"
WRONG = PAIR + (
    "from dataclasses import replace\nfrom tests.parity.pair import Port\n\n\n"
    "def wrong(config):\n    port = Port(config)\n"
    "    port.layers[1].norm_a.eps = 1e-3\n    return port\n\n\n"
    "bad = replace(case, candidate=replace(case.candidate, build=wrong))\n"
)


@pytest.fixture
def case_file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(WRONG.format(root=str(ROOT)))
    return path


def read(folder: Path) -> dict[str, object]:
    document: dict[str, object] = json.loads((folder / "parity.json").read_text())
    return document


def test_a_case_passes_and_a_fault_is_named(
    case_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report"
    assert main(["parity", "--case", str(case_file), "-o", str(out)]) == 0
    assert "PASS max|Δ|" in capsys.readouterr().out
    document = read(out)
    assert document["holds"] is True
    assert (
        main(
            [
                "parity",
                "--case",
                f"{case_file}:bad",
                "--level",
                "block",
                "-o",
                str(out),
                "--junit",
                str(tmp_path / "j.xml"),
            ]
        )
        == 1
    )
    printed = capsys.readouterr()
    assert "layers.1" in printed.out + printed.err
    assert "<failure" in (tmp_path / "j.xml").read_text()


def test_a_recorded_trace_takes_the_reference_s_place(case_file: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.safetensors"
    assert main(["parity", "record", str(case_file), "-o", str(trace), "--quiet"]) == 0
    words = ["parity", "--case", str(case_file), "--against", "trace", str(trace), "-o", str(tmp_path / "r"), "--quiet"]
    assert main(words) == 0
    assert main([*words[:2], f"{case_file}:bad", *words[3:]]) == 1


@pytest.mark.slow
def test_low_precision_is_judged_by_the_truth(case_file: Path, tmp_path: Path) -> None:
    words = ["-o", str(tmp_path / "r"), "--quiet", "--dtype", "bfloat16"]
    assert main(["parity", "--case", str(case_file), *words]) == 0
    code = case_file.read_text() + (
        "\n\nclass Rough(Port):\n    def forward(self, *args):\n"
        "        return {k: (v * 8).round() / 8 for k, v in super().forward(*args).items()}\n\n\n"
        "rough = replace(case, candidate=replace(case.candidate, build=Rough))\n"
    )
    case_file.write_text(code)
    assert main(["parity", "--case", f"{case_file}:rough", *words]) == 1
    assert "differs (precision)" in (tmp_path / "r" / "parity.json").read_text()


FAST = ["--component", "transformer", "--against", "diffusers", "--quiet"]


@pytest.mark.slow
def test_inputs_of_a_run_and_of_a_file(tiny_port: Path, tmp_path: Path) -> None:
    out = ["-o", str(tmp_path / "r")]
    assert main(["parity", str(tiny_port), *FAST, "--inputs", "captured", "--steps", "3", *out]) == 0
    keys = (tmp_path / "r" / "parity.json").read_text()
    assert "forward@0" in keys and "forward@2" in keys
    given = transformer_inputs(tiny_port / "transformer", 5)["forward"]
    save_file({name: tensor.contiguous() for name, tensor in given.items()}, tmp_path / "given.safetensors")
    assert main(["parity", str(tiny_port), *FAST, "--inputs", str(tmp_path / "given.safetensors"), *out]) == 0


@pytest.mark.slow
def test_levels_and_lossy_components(tiny_port: Path, tmp_path: Path) -> None:
    out = ["-o", str(tmp_path / "r")]
    counts = {}
    for level in ("component", "block", "module"):
        assert main(["parity", str(tiny_port), *FAST, "--level", level, *out]) == 0
        (found,) = json.loads((tmp_path / "r" / "parity.json").read_text())["components"]
        counts[level] = found["counts"]["compared"]
    assert counts["component"] < counts["block"] < counts["module"]
    assert main(["parity", str(tiny_port), *FAST, "--dtype", "bfloat16", *out]) == 0


def test_a_named_reference(tiny_port: Path, tmp_path: Path) -> None:
    """The port's own diffusers model is no reference of other names: nothing answers, and that is no pass."""
    (tmp_path / "theirs.py").write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport torch\n\n\nclass Theirs(torch.nn.Module):\n"
        "    def forward(self, **given):\n        return torch.zeros(2, 12, 16)\n\n\n"
        "def build():\n    return Theirs()\n"
    )
    words = ["--component", "transformer", "--against", f"{tmp_path / 'theirs.py'}:build", "-o", str(tmp_path / "r")]
    assert main(["parity", str(tiny_port), *words, "--quiet"]) in (1, 6)


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--case", "no.py"], 4, "no such case file"),
        ([], 2, "nothing to compare"),
        (["PORT", "--against", "nobody"], 2, "unknown reference"),
        (["PORT", "--device", "cuda", *FAST], 2, "CUDA is not available"),
        (["PORT", "--inputs", "captured", "--against", "trace"], 2, "has no effect"),
        (["PORT", "--inputs", "no.safetensors", *FAST], 4, "no such file"),
        (["--case", "CASE", "--level", "step"], 2, "no pipeline"),
        (["--case", "CASE", "--against", "diffusers"], 2, "its own reference"),
        (["--case", "CASE", "--limit", "0.05"], 6, "did not finish"),
        (["PORT", "--case", "CASE"], 2, "draws its weights"),
    ],
)
def test_bad_input(
    words: list[str], code: int, says: str, tiny_port: Path, case_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = [str(tiny_port) if w == "PORT" else str(case_file) if w == "CASE" else w for w in words]
    if torch.cuda.is_available() and "cuda" in words:
        pytest.skip("CUDA is available")
    assert main(["parity", *named]) == code
    printed = capsys.readouterr()
    assert says in printed.err and "Traceback" not in printed.err
