"""What a case declares or builds that proves nothing, or cannot be used: no silent pass, no internal error."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from parity import stubs
from parity.case import Case, Side
from parity.compare import SKIPPED
from parity.foreign import record_elsewhere
from parity.loading import load_case
from parity.outcome import reason_of
from parity.own import compare_case
from parity.state import CaseError, built
from porter.cli import main
from porter.core.errors import BadInputError
from tests.parity.cases import write_case
from tests.parity.pair import case
from tests.repeated import some

ROOT = Path(__file__).resolve().parents[2]


class Constant(nn.Module):
    """Answers the same whatever it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(3, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor | None = None) -> Tensor:
        out: Tensor = self.head(self.table.weight)
        return out


def of(build: Any, **given: Any) -> Case:
    inputs = given.pop("inputs", lambda config, draw: {"x": draw("x", 2, 4)})
    return Case(Side(lambda config: build()), Side(lambda config: build()), inputs, **given)


def test_an_answer_that_depends_on_nothing_is_not_compared() -> None:
    for given, says in (
        ({"free": ("x",)}, "changing all inputs changes nothing"),
        ({"inputs": lambda config, draw: {}}, "it has no input that could be changed"),
    ):
        result = compare_case(of(Constant, **given))
        assert result.status == SKIPPED and says in reason_of(result)
    assert compare_case(of(lambda: nn.Sequential(nn.Linear(4, 4)), free=("input",), inputs=_one)).passed


def _one(config: Any, draw: Any) -> dict[str, Tensor]:
    return {"input": draw("input", 2, 4)}


def test_an_input_that_cannot_be_changed_is_said() -> None:
    class Picky(nn.Sequential):
        def forward(self, x: Tensor, size: Tensor) -> Tensor:
            if int(size) != 4:
                raise ValueError("only four")
            out: Tensor = super().forward(x)
            return out

    def inputs(config: Any, draw: Any) -> dict[str, Tensor]:
        return {"x": draw("x", 2, 4), "size": torch.tensor(4)}

    result = compare_case(of(lambda: Picky(nn.Linear(4, 4)), inputs=inputs))
    assert result.passed
    said = [note for note in result.notes if "with size changed" in note]
    assert len(said) == 1 and "only four" in said[0]


def test_names_that_name_nothing_are_said() -> None:
    with pytest.raises(BadInputError, match="`free` names 'msk'; the inputs are mask, t, text, x"):
        compare_case(replace(case, free=("msk",)))
    result = compare_case(replace(case, skip="blok.*", keep="frequencies"))
    assert result.passed
    assert {"`skip` matches nothing: 'blok.*'", "`keep` matches nothing: 'frequencies'"} <= set(result.warnings)
    assert not compare_case(replace(case, keep=r"layers\.0\.norm_a\.bias")).warnings  # a name of the candidate's


class Spectral(nn.Module):
    """Complex weights, which start at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.irfft(torch.fft.rfft(x, 6) * self.weight, 6)[..., :4]


class Filtered(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 4), Spectral(), nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x)
        return out


def test_complex_parameters_are_drawn_and_compared() -> None:
    spectral = of(Filtered)
    result = compare_case(spectral)
    assert result.passed and not result.warnings, (reason_of(result), result.warnings)
    assert "1" in {tap.module for tap in result.taps}

    def conjugated(module: Any) -> None:
        module[1].weight.data = module[1].weight.data.conj().resolve_conj()

    (found,) = compare_case(spectral, edit=conjugated).faults
    assert (found.candidate, found.reference, found.step) == ("1", "1", False)


def test_what_torch_takes_for_eps_none_is_a_setting() -> None:
    class Norm(nn.Module):
        def __init__(self, eps: float | None) -> None:
            super().__init__()
            self.norm, self.head = nn.RMSNorm(4, eps=eps), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.norm(x))
            return out

    same = of(lambda: Norm(None))
    result = compare_case(replace(same, candidate=Side(lambda config: Norm(1e-5))))
    assert "eps 1.19209" in str(result.guilty and result.guilty.why) and "1e-05 in the candidate" in str(
        result.faults[0]
    )
    assert compare_case(replace(same, candidate=Side(lambda config: Norm(torch.finfo(torch.float32).eps)))).passed


def test_a_module_without_numbers_is_refused() -> None:
    def empty(config: Any) -> nn.Module:
        with torch.device("meta"):
            return case.candidate.build(config)

    result = compare_case(replace(case, candidate=replace(case.candidate, build=empty)))
    assert result.status == SKIPPED and "on the device meta" in result.reason and "build it on the CPU" in result.reason
    result = compare_case(replace(case, candidate=replace(case.candidate, build=lambda config: [1])))  # type: ignore
    assert "the candidate's build returns list, not a torch.nn.Module" in result.reason
    with pytest.raises(BadInputError, match="on the device meta"):
        compare_case(replace(case, reference=replace(case.reference, build=empty)))


def test_a_trial_with_stubs_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is missing next is tried with empty packages; the next case of the process finds none of them."""
    (tmp_path / "code_on_trial.py").write_text("import package_of_nobody\nfrom other_of_nobody import thing\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    missing = "def Reference():\n    import code_on_trial\n    return Net()\n"
    with pytest.raises(CaseError, match=r"package_of_nobody.*also missing: other_of_nobody"):
        built(load_case(write_case(tmp_path, missing)), 0)
    assert not [name for name in sys.modules if "of_nobody" in name or name == "code_on_trial"]
    with pytest.raises(ModuleNotFoundError):
        __import__("package_of_nobody")
    assert not {"package_of_nobody", "other_of_nobody"} & stubs._FINDER.names


def test_attention_kernels_of_a_gpu_point_to_the_shims(tmp_path: Path) -> None:
    for text in ("No available kernel. Aborting execution.", "No viable backend for scaled_dot_product_attention"):
        with pytest.raises(BadInputError) as caught:
            record_elsewhere(write_case(tmp_path, f"def call(m, i): raise RuntimeError({text!r})\nReference = Net"))
        assert "--shims" in str(caught.value.hint)


HANG = """
Reference = Net
class Slow(Net):
    def forward(self, x):
        {}
Net = Slow
class Reference(nn.Module):
    pass
Reference = Slow.__mro__[1]
"""


@pytest.mark.parametrize("how", some(["time.sleep(300)", "while True: pass", "__import__('threading').Lock().acquire() "
                                      "and __import__('threading').Event().wait()"], 1))  # fmt: skip
def test_a_candidate_that_hangs_is_ended(tmp_path: Path, how: str) -> None:
    """Whatever it waits for, with its place, the exit code of a reference that hangs, and nothing on the disk."""
    name = write_case(tmp_path, HANG.format(how))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "porter.cli", "parity", "--case", name, "--limit", "20"]
    began = time.monotonic()
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 6 and time.monotonic() - began < 60, done.stderr
    assert "error: the candidate did not finish within 20 s" in done.stderr and "--limit 40" in done.stderr
    assert how[:20] in done.stderr and not done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["case.py"]


def test_a_report_is_named_after_its_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_case(tmp_path)
    assert main(["parity", "--case", "case.py:case", "--junit", "parity.xml", "--quiet"]) == 0
    document = json.loads(Path("parity-case-case/parity.json").read_text())
    assert document["family"] == "case.py:case"
    assert "<title>Parity of case.py:case: " in Path("parity-case-case/report.html").read_text()
    assert 'classname="case.py:case.net (Net) against reference"' in Path("parity.xml").read_text()


SAME = "Reference = Net\n"
PORT = SAME + "class Port(Net):\n    def forward(self, x):\n        {}\n        return super().forward(x)\nNet = Port\n"
GIVEN = SAME + "def inputs(config, draw): return {{{}}}\n"
LIBERTIES = {
    "exits in the conversion": (
        SAME + "more = {'convert': lambda state: sys.exit(0)}",
        6,
        "the candidate calls exit(0)",
    ),
    "exits as if well": (PORT.format("os._exit(0)"), 1, "SystemExit: 0"),
    "goes elsewhere": (PORT.format("os.chdir('/')"), 0, "PASS max|Δ| = 0"),
    "prints": (PORT.format("print('PASS of its own')"), 0, "PASS max|Δ| = 0"),
    "a name that steers the terminal": (SAME + "more = {'name': 'x\\x1b[31m [red]'}", 0, "x\\x1b[31m [red]"),
    "a reserved name": (GIVEN.format("'x/y': draw('x', 2, 3, 4)"), 6, "no name for"),
    "complex inputs": (GIVEN.format("'x': draw('x', 2, 3, 4) + 1j"), 6, "give both parts"),
}


@pytest.mark.parametrize("name", some(LIBERTIES, 2))
def test_liberties_end_in_a_verdict_or_an_error(name: str, tmp_path: Path) -> None:
    """The exit code says how it went, and standard output holds the result alone."""
    code, expected, says = LIBERTIES[name]
    text = Path(write_case(tmp_path, code)).read_text()
    (tmp_path / "case.py").write_text(text.replace('name="net", ', "") if "'name'" in code else text)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "porter.cli", "parity", "--case", "case.py", "-o", "report"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == expected and says in done.stdout + done.stderr, done.stdout + done.stderr
    assert "PASS of its own" not in done.stdout and "\x1b" not in done.stdout
    assert (tmp_path / "report" / "parity.json").is_file() == (expected < 2)


def test_small_numbers_are_judged_by_their_own_size(tmp_path: Path) -> None:
    tiny = "class Reference(Net):\n    def forward(self, x): return super().forward(x) * {}\n"
    code = (
        tiny.format("1e-30")
        + "class Port(Net):\n    def forward(self, x): return super().forward(x) * 1.001e-30\nNet = Port"
    )
    assert not compare_case(load_case(write_case(tmp_path, code))).passed
    assert compare_case(load_case(write_case(tmp_path, tiny.format("1e-30") + "Net = Reference"))).passed


def test_inputs_of_other_precisions_are_cast_once(tmp_path: Path) -> None:
    for kind in ("float64", "float16", "float8_e4m3fn"):
        code = f"def inputs(config, draw): return {{'x': draw('x', 2, 3, 4).to(torch.{kind})}}\nReference = Net"
        assert compare_case(load_case(write_case(tmp_path, code))).passed


def test_a_path_may_hold_what_regular_expressions_use(tmp_path: Path) -> None:
    code = """
init = Net.__init__
def build(self):
    init(self)
    self.add_module('a|(b[', nn.Linear(4, 4))
Net.__init__ = build
Net.forward = lambda self, x: getattr(self, 'a|(b[')(x)
more = {'skip': '(embed|blocks|head).*'}
Reference = Net
"""
    result = compare_case(load_case(write_case(tmp_path, code)))
    assert "a|(b[" in {tap.module for tap in result.taps}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"modules": {"embed": 3}}, "modules maps names to texts, and 3 is none"),
        ({"steps": {"forward": None}}, "steps maps names to texts, and None is none"),
        ({"blocks": None}, "blocks is a tuple of Block"),
        ({"name": ""}, "name is a text, not ''"),
    ],
)
def test_fields_of_another_kind(given: dict[str, Any], says: str) -> None:
    with pytest.raises(TypeError, match=says):
        replace(case, **given)
