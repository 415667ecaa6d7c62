"""References that misbehave, each as a small case file: a clear verdict or error, never a silent pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from parity.compare import DIFFERS, OVER, SKIPPED
from parity.component import ComponentResult
from parity.foreign import record_elsewhere
from parity.loading import load_case
from parity.outcome import reason_of
from parity.own import compare_case
from parity.reference import record_reference
from parity.trace import Trace
from porter.core.errors import BadInputError
from tests.parity.cases import write_case

SAME = "Reference = Net\n"


def compared(folder: Path, reference: str, **options: Any) -> ComponentResult:
    return compare_case(load_case(write_case(folder, reference)), **options)


def why(result: ComponentResult) -> str:
    """Why it is no pass; the reason is never empty."""
    assert not result.passed and reason_of(result)
    return reason_of(result)


def test_the_case_itself_passes(tmp_path: Path) -> None:
    """Without a fault all below would pass: what they find is theirs."""
    result = compared(tmp_path, SAME)
    assert result.passed, reason_of(result)
    assert result.counts == {"compared": 14, "skipped": 0, "missing": 0}


# What a module answers: the same on both sides, and another on one.
ANSWERS = {
    "tuple": "return y, {'half': y / 2}",
    "list": "return [y, y / 2]",
    "dictionary": "return {'sample': y, 'more': (y / 2, None)}",
    "dataclass": "return Answer(sample=y, more=[y / 2])",
    "model output": "from transformers.utils import ModelOutput\n        return Output(sample=y, more=y / 2)",
    "named tuple": "return Pair(y, y / 2)",
}
KINDS = """
import collections
Pair = collections.namedtuple("Pair", "sample more")
@dataclasses.dataclass
class Answer:
    sample: torch.Tensor
    more: list
"""
OUTPUT = """
from transformers.utils import ModelOutput
@dataclasses.dataclass
class Output(ModelOutput):
    sample: torch.Tensor = None
    more: torch.Tensor = None
"""


@pytest.mark.parametrize("kind", ANSWERS)
def test_answers_that_are_no_tensor(tmp_path: Path, kind: str) -> None:
    """Every tensor in an answer is compared; one that the candidate lacks, or has by another name, is not a pass."""
    body = f"""
class Answering(Net):
    def forward(self, x):
        y = super().forward(x)
        {ANSWERS[kind]}
"""
    kinds = KINDS + (OUTPUT if kind == "model output" else "")
    both = compared(tmp_path, f"{kinds}{body}Reference = Answering\nNet = Answering")
    assert both.passed and len([v for v in both.outputs if v.name == "forward"]) == 2, reason_of(both)
    alone = compared(tmp_path, f"{kinds}{body}Reference = Answering")
    assert alone.status in (SKIPPED, DIFFERS) and "returned no such output" in why(alone)
    other = body.replace("y / 2", "y / 2.002").replace("Answering", "Other")
    wrong = compared(tmp_path, f"{kinds}{body}{other}Reference = Answering\nNet = Other")
    assert wrong.status in (DIFFERS, OVER) and why(wrong)


def test_an_answer_without_tensors(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="'forward' returns nothing that can be compared"):
        compared(tmp_path, SAME + "def call(m, i):\n    m(**i)\n    return 'done', None")


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("y, y.argmax(-1)", "y, y.argmin(-1)"),
        ("y, y > 0", "y, y < 0"),
        ("y, torch.complex(y, y)", "y, torch.complex(y, -y)"),
        ("y, float(y.sum())", "y, 2 * float(y.sum())"),
        ("y, y.argmax(-1)", "y"),
    ],
)
def test_answers_beside_floating_point_tensors_are_compared(tmp_path: Path, theirs: str, ours: str) -> None:
    code = """
class {name}(Net):
    def forward(self, x):
        y = super().forward(x)
        return {answer}
"""
    reference = code.format(name="Theirs", answer=theirs)
    port = code.format(name="Ours", answer=ours)
    assert compared(tmp_path, f"{reference}Reference = Theirs\nNet = Theirs").passed
    assert not compared(tmp_path, f"{reference}{port}Reference = Theirs\nNet = Ours").passed


RAISING = {
    "in the forward": ("def call(m, i): raise RuntimeError('boom')", "does not run: RuntimeError: boom"),
    "while built": ("def Reference(): raise OSError('no file')", "does not build: OSError: no file"),
    "exit in the forward": ("def call(m, i): sys.exit(0)", "does not run: SystemExit: 0"),
    "exit while built": ("def Reference(): raise SystemExit(0)", "does not build: SystemExit: 0"),
    "no module": ("def Reference(): return [1]", "returns list, not a torch.nn.Module"),
    "inputs": ("def inputs(config, draw): raise ValueError('odd')", "inputs cannot be made: ValueError: odd"),
    "an input that is no tensor": ("def inputs(config, draw): return {'x': [1]}", "'x' of forward is list"),
    "inputs that are none": ("def inputs(config, draw): return None", "inputs cannot be made"),
    "exit at import": ("sys.exit(0)", "does not run: SystemExit"),
}


@pytest.mark.parametrize("name", RAISING)
def test_a_reference_that_raises(tmp_path: Path, name: str) -> None:
    """And one that ends the process, which must not end ours, least of all as if all were well."""
    code, says = RAISING[name]
    with pytest.raises(Exception) as caught:  # also CaseError, which load_case raises
        compared(tmp_path, code if "def Reference" in code else SAME + code)
    assert says in str(caught.value)


CANDIDATES = {
    "raises": "def forward(self, x): raise RuntimeError('boom')",
    "exits": "def forward(self, x): sys.exit(0)",
    "exits while built": "def __init__(self): sys.exit(0)",
}


@pytest.mark.parametrize("name", CANDIDATES)
def test_a_candidate_that_does(tmp_path: Path, name: str) -> None:
    result = compared(tmp_path, f"Reference = Net\nclass Bad(Net):\n    {CANDIDATES[name]}\nNet = Bad")
    assert result.status == SKIPPED and ("boom" in why(result) or "SystemExit" in why(result))


def noisy(draw: str) -> str:
    forward = f"    def forward(self, x):\n        return super().forward(x + {draw})\n"
    return f"import random, numpy\nclass Noisy(Net):\n{forward}"


DRAWS = {
    "torch": "torch.randn_like(x)",
    "random": "random.random()",
    "numpy": "float(numpy.random.rand())",
}


@pytest.mark.parametrize("kind", DRAWS)
def test_global_random_numbers(tmp_path: Path, kind: str) -> None:
    """Both sides draw the same ones, which is said; a side that draws none is not the same."""
    both = compared(tmp_path, noisy(DRAWS[kind]) + "Reference = Net = Noisy")
    assert both.passed, reason_of(both)
    assert any("global random numbers" in note for note in both.notes)
    assert compared(tmp_path, noisy(DRAWS[kind]) + "Reference = Noisy").status in (DIFFERS, OVER)
    assert compared(tmp_path, noisy(DRAWS[kind]) + "Reference = Net\nNet = Noisy").status in (DIFFERS, OVER)


def test_random_numbers_that_nobody_seeds(tmp_path: Path) -> None:
    code = "class Noisy(Net):\n    def forward(self, x):\n        return super().forward(x + os.urandom(1)[0])\n"
    assert why(compared(tmp_path, code + "Reference = Net = Noisy"))


def test_changed_inputs(tmp_path: Path) -> None:
    """Each run has its own copy; that the reference changes its input is said."""
    code = "class Changing(Net):\n    def forward(self, x):\n        return super().forward(x.mul_(2))\n"
    both = compared(tmp_path, code + "Reference = Net = Changing")
    assert both.passed and any("changes its input x" in note for note in both.notes), reason_of(both)
    assert compared(tmp_path, code + "Reference = Changing").status in (DIFFERS, OVER)
    pure = "class Pure(Net):\n    def forward(self, x):\n        return super().forward(x * 2)\n"
    assert compared(tmp_path, code + pure + "Reference = Changing\nNet = Pure").passed


@pytest.mark.parametrize("change", ["y.transpose(1, 2)", "y[:1]", "y.flatten()", "y[..., None]", "y[:, :0]", "y.sum()"])
def test_other_shapes(tmp_path: Path, change: str) -> None:
    code = f"class Other(Net):\n    def forward(self, x):\n        y = super().forward(x)\n        return {change}\n"
    for sides in ("Reference = Other", "Reference = Net\nNet = Other"):
        text = why(compared(tmp_path, code + sides))
        assert "shape" in text or "elements" in text


NUMBERS = {"nan": "float('nan')", "inf": "float('inf')", "-inf": "float('-inf')"}


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("place", ["output", "everywhere", "inside"])
def test_numbers_that_are_none(tmp_path: Path, number: str, place: str) -> None:
    """On one side or on both, in the output or in a module whose output nobody sees: never a pass."""
    spoil = {
        "output": "y = super().forward(x)\n        y[0, 0, 0] = N",
        "everywhere": "y = super().forward(x) * N",
        "inside": "y = super().forward(x)\n        self.head(torch.full((1, 8), N, dtype=x.dtype))",
    }[place].replace("N", NUMBERS[number])
    code = f"class Bad(Net):\n    def forward(self, x):\n        {spoil}\n        return y\n"
    both, theirs, ours = ("Reference = Net = Bad", "Reference = Bad", "Reference = Net\nNet = Bad")
    # A call that only the candidate makes, and drops, has nothing to be compared with.
    for sides in (both, theirs) if place == "inside" else (both, theirs, ours):
        text = why(compared(tmp_path, code + sides))
        assert "NaN or inf" in text or "never ran" in text, (sides, text)


NOTHING = {
    "a conversion to nothing": "more = {'convert': lambda state: {}}",
    "a conversion to numbers of its own": (
        "more = {'convert': lambda state: {n: torch.full_like(t, 0.1) for n, t in state.items()}}"
    ),
    "everything skipped": "more = {'skip': '.*'}",
    "no list of passes in common": "more = {'reference': Side(build=lambda c: Net(), call={'a': lambda m, i: m(**i)}),"
    " 'inputs': lambda c, d: {'a': inputs(c, d)}}",
}


@pytest.mark.parametrize("name", NOTHING)
def test_nothing_in_common(tmp_path: Path, name: str) -> None:
    path = Path(write_case(tmp_path, SAME))
    code = (
        path.read_text()
        .replace("case = Case(", f"{NOTHING[name]}\ngiven = dict(")
        .replace('**globals().get("more", {}),', "")
    )
    path.write_text(code + "case = Case(**{**given, **more})\n")
    result = compare_case(load_case(str(path)))
    assert why(result)


def test_a_module_that_never_runs(tmp_path: Path) -> None:
    """On the reference's side only, it was never compared."""
    code = """
class Lazy(Net):
    def forward(self, x):
        return self.head(self.blocks[0](self.embed(x)))
"""
    for sides in ("Reference = Lazy", "Reference = Net\nNet = Lazy", "Reference = Net = Lazy"):
        text = why(compared(tmp_path, code + sides))
        assert "blocks.1" in text and ("never ran" in text) == (sides != "Reference = Lazy"), text


def test_what_float64_cannot_run(tmp_path: Path) -> None:
    """It is found, and then the case's baseline decides; without one nothing does."""
    code = """
class Single(Net):
    def forward(self, x):
        if torch.get_default_dtype() == torch.float64:
            raise RuntimeError("not implemented for 'Double'")
        return super().forward(x)
Reference = Net = Single
"""
    assert "float64 cannot run" in why(compared(tmp_path, code))
    assert compared(tmp_path, code + "more = {'baseline': 1e-6}").passed


@pytest.fixture
def trace_file(tmp_path: Path) -> Path:
    file = tmp_path / "trace.safetensors"
    record_reference(load_case(write_case(tmp_path, SAME)), 0).save(file)
    return file


def test_a_trace_of_another_model(tmp_path: Path, trace_file: Path) -> None:
    case = load_case(write_case(tmp_path, SAME))
    assert compare_case(case, trace=Trace.open(trace_file)).passed
    wide = (
        "class Wide(Net):\n    def __init__(self):\n        super().__init__()\n        self.head = nn.Linear(8, 6)\n"
    )
    wide += "Reference = Net = Wide"
    result = compare_case(load_case(write_case(tmp_path, wide)), trace=Trace.open(trace_file))
    assert "fit" in why(result)


def test_a_trace_of_other_weights(tmp_path: Path) -> None:
    """The file that both sides read was exchanged after the reference was recorded."""
    weights = tmp_path / "weights.safetensors"
    plain = load_case(write_case(tmp_path, SAME))
    state = plain.reference.build({}).state_dict()
    save_file({n: torch.randn_like(t) for n, t in state.items()}, weights)
    case = load_case(write_case(tmp_path, f"{SAME}more = {{'weights': {str(weights)!r}}}"))
    trace = Trace.of(record_reference(case, 0))
    assert compare_case(case, trace=trace).passed
    save_file({n: torch.randn_like(t) for n, t in state.items()}, weights)
    assert "other weights" in why(compare_case(case, trace=trace))
    save_file({n: t for n, t in state.items() if n != "head.bias"}, weights)
    with pytest.raises(BadInputError, match=r"head\.bias"):
        compare_case(case)
    weights.write_bytes(b"not weights")
    with pytest.raises(BadInputError, match="weights"):
        compare_case(case)


def test_prints_and_a_process_of_its_own(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """What such a reference leaves behind is compared as any other."""
    code = """
import torch
def call(m, i):
    os.write(1, bytes(range(256)) * 8192)
    torch.nn.functional.gelu = None
    return m(**i)
""".replace("    torch.nn.functional.gelu = None\n", "")
    path = write_case(tmp_path, SAME + code)
    trace = record_elsewhere(path)
    capfd.readouterr()
    quiet = load_case(write_case(tmp_path, SAME, "quiet.py"))
    assert compare_case(quiet, trace=trace).passed and capfd.readouterr() == ("", "")
