"""The recorder: what it stores, what float64 means, and that it runs alone."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import parity.recorder as recorder
from parity.recorder import Watch, float64, record, sample_indices
from parity.trace import Trace

RECORDER = Path(recorder.__file__)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, scale: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        y = self.a(x) * scale
        return self.b(self.a(y)), {"half": y}


class Net(nn.Module):
    """Upcasts in float32 by name, draws noise, calls one layer twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.block, self.unused = Block(), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=x.dtype)
        grid = torch.arange(8, dtype=torch.float32) / 7
        out, extra = self.block(x.float() + noise, scale=grid.exp())
        return out.to(torch.float32) + extra["half"]


def build() -> nn.Module:
    return Net()


@pytest.fixture
def trace() -> Trace:
    x = torch.linspace(-1, 1, 24).reshape(3, 8)
    passes = {"forward": (lambda m, i: m(**i), {"x": x})}
    return Trace.of(record(Net(), passes, [Watch("block"), Watch(r"block\.[ab]", 5)], {"seed": 0}))


def test_every_call_has_its_own_key(trace: Trace) -> None:
    assert {"forward/block.a#0.out.0", "forward/block.a#1.out.0", "forward/block.b#0.in.input"} <= trace.events.keys()
    assert {"forward/block#0.in.x", "forward/block#0.in.scale", "forward/block#0.out.1.half"} <= trace.events.keys()
    assert trace.modules("forward") == {"block": 1, "block.a": 2, "block.b": 1}


def test_samples_are_spread_and_blocks_complete(trace: Trace) -> None:
    assert trace.value("forward/block#0.out.0").complete
    sampled = trace.value("forward/block.a#0.out.0")
    assert sampled.low.numel() == 5 and not sampled.complete
    x = torch.linspace(-1, 1, 24).reshape(3, 8)
    assert torch.equal(trace.inputs("forward")["x"], x)


@pytest.mark.parametrize(("numel", "count"), [(10, 20), (24, 5), (1024, 100), (1, 1)])
def test_sample_positions_never_repeat(numel: int, count: int) -> None:
    at = sample_indices(numel, count)
    assert len(set(at.tolist())) == min(numel, count) and int(at.max()) < numel


def test_float64_value_and_noise_floor(trace: Trace) -> None:
    """The stored pair is the value of an independent float64 run: same draws, no float32 step left inside."""
    net, x = Net().double(), torch.linspace(-1, 1, 24).reshape(3, 8).double()
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(3)).double()
    y = net.block.a(x.float().double() + noise) * (torch.arange(8, dtype=torch.float64) / 7).exp()
    expected = (net.block.b(net.block.a(y)) + y).detach()
    value = trace.value("forward/=.out.0")
    assert (value.high.reshape(3, 8) - expected).abs().max() < 1e-13
    noise_floor = (value.high - value.low.double()).abs().max()
    assert 1e-9 < noise_floor < 1e-5


def test_float64_restores_everything() -> None:
    net = Net()
    before = {k: (v.data_ptr(), v.dtype) for k, v in net.state_dict().items()}
    with pytest.raises(ZeroDivisionError), float64(net):
        made = [net.block.a.weight, torch.zeros(1), torch.ones(1).to(torch.float32), torch.ones(1).float()]
        assert all(t.element_size() == 8 for t in made)
        assert torch.ones(1).to(torch.bfloat16).dtype == torch.bfloat16
        raise ZeroDivisionError
    assert {k: (v.data_ptr(), v.dtype) for k, v in net.state_dict().items()} == before
    assert torch.zeros(1).dtype == torch.float32 and torch.ones(1).float().dtype == torch.float32


def test_code_that_asks_for_the_dtype_goes_the_way_it_went_in_float32() -> None:
    class Strict(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            assert x.dtype == torch.float32, "as some originals have it"
            turned = torch.view_as_complex(x.reshape(-1, 2)).to(torch.complex64) * torch.polar(x[:1], x[1:2])
            return torch.view_as_real(turned).to(x.dtype)

    x = torch.linspace(0.1, 1, 8)
    trace = Trace.of(record(Strict(), {"forward": (lambda m, i: m(i["x"]), {"x": x})}, [], {}))
    exact = x.double().reshape(-1, 2)
    spun = torch.view_as_complex(exact) * torch.polar(exact[0, 0], exact[0, 1])
    assert trace.meta.get("float64") is None
    gap = trace.value("forward/=.out.0").high.reshape(-1, 2) - torch.view_as_real(spun)
    assert gap.abs().max() < 1e-14


def test_an_eps_that_follows_the_dtype_stays_that_of_float32() -> None:
    net, x = nn.RMSNorm(4), torch.full((1, 4), 1e-4)
    trace = Trace.of(record(net, {"forward": (lambda m, i: m(i["x"]), {"x": x})}, [], {}))
    value = trace.value("forward/=.out.0")
    assert (value.high - value.low.double()).abs().max() < 1e-6


@functools.lru_cache
def places(count: int) -> Tensor:
    return (torch.arange(count, dtype=torch.float32) / 7).sin()


def test_a_table_that_a_function_keeps_is_made_again_in_each_precision() -> None:
    class Keeps(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            table: Tensor = places(5)
            return x * table

    passes = {"forward": (lambda m, i: m(i["x"]), {"x": torch.ones(5)})}
    for _ in range(2):
        value = Trace.of(record(Keeps(), passes, [], {})).value("forward/=.out.0")
        exact = (torch.arange(5, dtype=torch.float64) / 7).sin()
        assert (value.high - exact).abs().max() < 1e-14 < (value.low.double() - exact).abs().max()


def test_modules_that_never_ran_are_named(trace: Trace) -> None:
    assert trace.meta["idle"] == ["unused"]


def test_casts_are_recorded() -> None:
    class Rope(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x.double() * 2).float()

    net = nn.Sequential(Rope())
    passes = {"forward": (lambda m, i: m(i["x"]), {"x": torch.ones(2)})}
    assert Trace.of(record(net, passes, [Watch("0")], {})).casts["0"] == ["float32", "float64"]


def test_round_trip_through_a_file(trace: Trace, tmp_path: Path) -> None:
    x = torch.linspace(-1, 1, 24).reshape(3, 8)
    recording = record(Net(), {"forward": (lambda m, i: m(**i), {"x": x})}, [Watch("block")], {"seed": 7})
    recording.save(tmp_path / "t.safetensors")
    back = Trace.open(tmp_path / "t.safetensors")
    assert list(back.events) == [e.key for e in recording.events] and back.meta["seed"] == 7
    for key in back.events:
        assert torch.equal(back.value(key).low, Trace.of(recording).value(key).low)
    assert [p.name for p in tmp_path.iterdir()] == ["t.safetensors"]


def test_runs_alone_in_another_interpreter(tmp_path: Path) -> None:
    """A copied file, an empty folder, no project on the path."""
    (tmp_path / "recorder.py").write_bytes(RECORDER.read_bytes())
    source = Path(__file__).read_text()
    body = source[source.index("class Block") : source.index("@pytest.fixture")]
    (tmp_path / "mine.py").write_text("import torch\nfrom torch import Tensor, nn\n\n\n" + body)
    save_file({"x": torch.linspace(-1, 1, 24).reshape(3, 8)}, tmp_path / "inputs.safetensors")
    command = [sys.executable, "-I", "recorder.py", "--module", "mine.py:build", "--inputs", "inputs.safetensors"]
    command += ["--watch", "block", "--watch", r"block\.[ab]@5", "--source", "inputs.safetensors", "--commit", "abc"]
    subprocess.run([*command, "-o", "trace.safetensors"], cwd=tmp_path, check=True)
    with safe_open(str(tmp_path / "trace.safetensors"), "pt") as f:
        meta = json.loads(f.metadata()["trace"])
    assert (
        meta["reference"] == {"name": "mine.py:build", "commit": "abc"}
        and meta["source"]["file"] == "inputs.safetensors"
    )
    assert len(meta["source"]["sha256"]) == 64 and meta["torch"] == torch.__version__
    assert Trace.open(tmp_path / "trace.safetensors").value("forward/block.a#1.out.0").low.numel() == 5


def test_recorder_imports_nothing_of_the_project() -> None:
    found = {
        line.split()[1].split(".")[0]
        for line in RECORDER.read_text().splitlines()
        if line.startswith(("from ", "import "))
    }
    assert not found & {"porter", "parity", "conversions", "runtime", "numpy", "diffusers"}
