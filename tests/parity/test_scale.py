"""A model larger than memory: the same verdicts as in one piece, faults found in their blocks, nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from conversions.flux1.recipe import TRANSFORMER, original_headers
from conversions.flux1.scale import DEV
from conversions.flux1.scale import case as flux
from parity.case import Block, Case, Draw, Side
from parity.compare import DIFFERS, IDENTICAL, ROUNDING, SKIPPED
from parity.drawn import spread
from parity.hollow import Streamed, hollow, parts_of
from parity.ondemand import Converted, drawing, drawn, straight
from parity.own import compare_case
from parity.scale import main
from parity.scaled import Scaled, compare_scaled
from parity.shelf import Shelf, spool, with_tensors
from porter.core.atomic import BusyError
from porter.core.errors import BadInputError, PorterError, RecipeError, ResourceError
from porter.core.execute import apply
from porter.core.ops import Split
from porter.core.recipe import Recipe, Rule, compile_recipe

TINY = {
    **DEV, "num_layers": 2, "num_single_layers": 5, "attention_head_dim": 16, "num_attention_heads": 4,
    "in_channels": 16, "joint_attention_dim": 24, "pooled_projection_dim": 20, "axes_dims_rope": [4, 6, 6],
}  # fmt: skip
WIDTH, DEPTH = 12, 6


class Fused(nn.Module):
    """A reference block: one matrix for what the candidate has as two."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.both, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        a, b = self.both(self.norm(x) + time).chunk(2, -1)
        return x + self.out(F.silu(a) * b)


class Reference(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.start, self.time, self.end = nn.Linear(4, WIDTH), nn.Linear(1, WIDTH), nn.Linear(WIDTH, 4)
        self.table = nn.Parameter(torch.zeros(1, WIDTH))
        self.layers = nn.ModuleList(Fused() for _ in range(DEPTH))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x, time = self.start(x) + self.table, self.time(t)
        for layer in self.layers:
            x = layer(x, time=time)
        return self.end(x)


class Two(nn.Module):
    """The candidate's block; takes its arguments under other names."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.a, self.b, self.out = nn.LayerNorm(WIDTH), *(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, hidden: Tensor, temb: Tensor) -> tuple[Tensor]:
        y = self.norm(hidden) + temb
        return (hidden + self.out(F.silu(self.a(y)) * self.b(y)),)


class Candidate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.start, self.time, self.end = nn.Linear(4, WIDTH), nn.Linear(1, WIDTH), nn.Linear(WIDTH, 4)
        self.table = nn.Parameter(torch.zeros(1, WIDTH))
        self.blocks = nn.ModuleList(Two() for _ in range(DEPTH))
        self.between: Callable[[int, Tensor], Tensor] = lambda index, x: x

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x, time = self.start(x) + self.table, self.time(t)
        for index, block in enumerate(self.blocks):
            (x,) = block(self.between(index, x), temb=time)
        return self.end(x)


def _rules() -> Iterator[Rule]:
    for name in ("start", "time", "end"):
        yield Rule(f"{name}.{{p:weight|bias}}", f"{name}.{{p}}")
    yield Rule("table", "table")
    for name in ("norm", "out"):
        yield Rule(f"layers.{{i:int}}.{name}.{{p:weight|bias}}", f"blocks.{{i}}.{name}.{{p}}")
    halves = ("blocks.{i}.a.{p}", "blocks.{i}.b.{p}")
    yield Rule("layers.{i:int}.both.{p:weight|bias}", halves, (Split((WIDTH, WIDTH)),))


RECIPE = Recipe("toy", "original", "port", tuple(_rules()))
MAP = Block(
    r"layers\.\d+",
    force=lambda theirs, own: {"hidden": theirs["x"]},
    inputs=lambda own, shapes: {"x": own["hidden"], "time": own["temb"]},
)


def inputs(config: Mapping[str, Any], draw: Draw) -> dict[str, Tensor]:
    return {"x": draw("x", 2, 5, 4), "t": draw.uniform("t", 2, 1, 1)}


TOY = Case(Side(lambda c: Reference()), Side(lambda c: Candidate()), inputs, RECIPE, blocks=(MAP,))
CROSS = flux("diffusers", "native", TINY, (7, 4, 3))


def state(build: Callable[[], nn.Module]) -> dict[str, Tensor]:
    shapes = {name: tuple(tensor.shape) for name, tensor in build().state_dict().items()}
    return {name: drawn(name, shape, 0) for name, shape in shapes.items()}


def taps(scaled: Scaled) -> dict[str, Any]:
    return {tap.key: tap for tap in scaled.result.taps}


@pytest.mark.parametrize("case", [TOY, CROSS], ids=["recipe", "same names"])
def test_the_same_numbers_as_in_one_piece(case: Case, tmp_path: Path) -> None:
    weights = tmp_path / "weights.safetensors"
    save_file(state(lambda: case.reference.build(case.config)), weights)
    whole = compare_case(replace(case, weights=weights), level="block")
    blockwise = compare_scaled(case, tmp_path)
    assert whole.passed and blockwise.result.passed and blockwise.result.status == whole.status
    ours = taps(blockwise)
    assert {tap.key for tap in whole.taps} <= ours.keys()
    for tap in whole.taps:
        assert ours[tap.key].free.max_abs == tap.free.max_abs, tap.key
        if tap.kind == "out" and tap.reset:
            assert ours[tap.key].reset.max_abs == tap.reset.max_abs, tap.key
    assert blockwise.result.outputs[0].max_abs == whole.outputs[0].max_abs
    read = compare_scaled(replace(case, weights=weights), tmp_path)
    assert [v.max_abs for v in read.result.verdicts] == [v.max_abs for v in blockwise.result.verdicts]


def test_float64_decides_about_the_first_the_middle_the_last_and_the_worst(tmp_path: Path) -> None:
    scaled = compare_scaled(TOY, tmp_path)
    alone = scaled.figures["float64"]["forward"]
    assert {"layers.0#0", "layers.3#0", "layers.5#0"} <= set(alone)
    outs = {k: t.reset for k, t in taps(scaled).items() if t.reset and t.kind == "out"}
    worst = max(outs, key=lambda k: outs[k].scaled)
    assert worst.partition("/")[2].rpartition(".out.")[0] in alone
    for key, verdict in outs.items():
        exact = key.partition("/")[2].rpartition(".out.")[0] in alone
        assert exact == (verdict.max_abs64 < 1e-12) and verdict.passed
        assert exact or "float32 alone" in verdict.note
    assert {v.status for v in scaled.result.outputs} <= {ROUNDING, IDENTICAL}


@pytest.mark.parametrize("block", [0, 1, 4, 5])
def test_a_fault_is_found_in_its_block(block: int, tmp_path: Path) -> None:
    def edit(module: Any) -> None:
        module.blocks[block].norm.eps = 1.1e-5  # far below the gate

    result = compare_scaled(TOY, tmp_path, edit=edit).result
    assert result.status == DIFFERS and result.guilty is not None
    assert (result.guilty.candidate, result.guilty.reference) == (f"blocks.{block}", f"layers.{block}")
    assert result.guilty.others == () and "layers.{i:int}" in result.guilty.rule
    wrong = {tap.module for tap in result.taps if tap.reset and not tap.reset.passed}
    assert wrong == {f"layers.{block}"}
    last = next(tap for tap in result.taps if tap.key.endswith("layers.5#0.out.0"))
    assert last.free.max_abs > 0 and (last.reset and last.reset.passed) == (block != 5)


def test_two_faults_are_both_named(tmp_path: Path) -> None:
    def edit(module: Any) -> None:
        module.blocks[1].out.register_forward_hook(lambda m, a, out: out * 1.001)
        module.blocks[4].out.register_forward_hook(lambda m, a, out: out * 1.002)

    result = compare_scaled(TOY, tmp_path, gate=1.0, edit=edit).result
    assert result.guilty and result.guilty.reference == "layers.1"
    assert result.guilty.others == ("blocks.4 ↔ layers.4",)


def test_a_fault_between_two_blocks_and_outside_of_them(tmp_path: Path) -> None:
    def between(module: Any) -> None:
        module.between = lambda index, x: x * 1.0001 if index == 3 else x

    guilty = compare_scaled(TOY, tmp_path, edit=between).result.guilty
    assert guilty and (guilty.candidate, guilty.reference) == ("the step before blocks.3", "layers.3")

    def behind(module: Any) -> None:
        module.end.register_forward_hook(lambda m, a, out: out + 1e-6)

    guilty = compare_scaled(TOY, tmp_path, edit=behind).result.guilty
    assert guilty and (guilty.candidate, guilty.reference) == ("end", "end")

    def before(module: Any) -> None:
        module.time.register_forward_hook(lambda m, a, out: out * 1.000001)

    guilty = compare_scaled(TOY, tmp_path, edit=before).result.guilty
    assert guilty and guilty.reference == "time"


def test_a_wrong_recipe_is_found(tmp_path: Path) -> None:
    pattern = "layers.{i:int}.both.{p:weight|bias}"
    swapped = RECIPE.replace_rule(pattern, targets=("blocks.{i}.b.{p}", "blocks.{i}.a.{p}"))
    result = compare_scaled(replace(TOY, convert=swapped), tmp_path).result
    assert not result.passed and result.guilty and result.guilty.reference == "layers.0"


def test_what_was_left_out_is_no_pass(tmp_path: Path) -> None:
    unmapped = compare_scaled(replace(TOY, blocks=()), tmp_path).result
    assert unmapped.status == SKIPPED and "declare a Block" in str([t.reset for t in unmapped.taps])

    class Idle(Candidate):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            (y,) = self.blocks[0](self.start(x) + self.table, self.time(t))
            return self.end(y)

    idle = compare_scaled(replace(TOY, candidate=Side(lambda c: Idle())), tmp_path).result
    assert not idle.passed and "blocks.5.out" in idle.unused and idle.counts["skipped"] > 0


class Twice(Two):
    def forward(self, hidden: Tensor, temb: Tensor) -> tuple[Tensor]:
        return (2 * super().forward(hidden, temb)[0],)


class Doubled(Candidate):
    """Blocks answer twice what the reference's do, and whoever takes it halves it: no rearrangement."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Twice() for _ in range(DEPTH))
        self.between = lambda index, x: x / 2 if index else x
        self.end.register_forward_pre_hook(lambda m, args: (args[0] / 2,))


def test_answers_that_are_no_rearrangement_are_handed_on_as_they_are(tmp_path: Path) -> None:
    halve = replace(MAP, outputs=lambda own, shapes: {"0": own["0"] / 2})
    halved = replace(TOY, candidate=Side(lambda c: Doubled()), blocks=(halve,))
    result = compare_scaled(halved, tmp_path).result
    assert len([note for note in result.notes if "hands on the candidate's own answer" in note]) == DEPTH
    assert result.passed, result.guilty

    def wrong(module: Any) -> None:
        module.end.register_forward_hook(lambda m, args, out: out * 1.0001)

    guilty = compare_scaled(halved, tmp_path, edit=wrong).result.guilty
    assert guilty and guilty.reference == "end"
    plain = compare_scaled(TOY, tmp_path).result
    assert not [note for note in plain.notes if "own answer" in note]


def test_one_block_of_weights_at_a_time() -> None:
    with hollow():
        module = Reference()
    names = module.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in names.items()}
    blocks = [f"layers.{i}" for i in range(DEPTH)]
    streamed = Streamed(module, blocks, names, straight(drawing(shapes, 0)))
    assert [p.path for p in streamed.parts] == ["", "start", "time", "end", *blocks]
    assert sorted(n for part in streamed.parts for n in part.names) == sorted(names)
    block = sum(p.numel() * 4 for p in module.layers[0].parameters())
    alive: list[Any] = []

    def around(path: str, call: int, run: Any, args: Any, kwargs: Any) -> Any:
        assert not any(ref() is not None for ref in alive), "a block's weights outlive it"
        out = run(*args, **kwargs)
        filled = [p for p in module.parameters() if not p.is_meta]
        assert sum(p.numel() * 4 for p in filled) == block + 4 * WIDTH == streamed.live
        alive.extend(weakref.ref(p) for p in module.get_submodule(path).parameters())
        return out

    given = inputs({}, Draw(0))
    with streamed.running(around):
        out = module(**given)
    assert len(alive) == DEPTH * 6 and not any(ref() is not None for ref in alive)
    assert all(p.is_meta for p in module.parameters()) and streamed.live == 0
    assert streamed.most == block + 4 * WIDTH and streamed.drawn == 4 * sum(p.numel() for p in module.parameters())
    assert "forward" not in vars(module.layers[0])
    filled = Reference()
    filled.load_state_dict({name: drawn(name, shape, 0) for name, shape in shapes.items()})
    assert torch.equal(out, filled(**given))


def test_hollow_modules_keep_what_they_compute() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
            self.b.weight = self.a.weight
            self.register_buffer("steps", torch.arange(4.0), persistent=False)
            self.loose = nn.ParameterList([nn.Parameter(torch.ones(2))])

    register = nn.Module.register_parameter
    with hollow():
        net = Net()
    assert net.a.weight.is_meta and net.b.weight is net.a.weight and net.steps.tolist() == [0, 1, 2, 3]
    assert nn.Module.register_parameter is register and not nn.Linear(2, 2).weight.is_meta
    with pytest.raises(ZeroDivisionError), hollow():
        1 / 0  # noqa: B018
    assert nn.Module.register_parameter is register
    assert {p.path: p.names for p in parts_of(net, ["a"], net.state_dict())}[""] == ("loose.0",)


def test_drawn_weights() -> None:
    name, shape = "blocks.0.weight", (70, 1000)
    tensor = drawn(name, shape, 3)
    assert torch.equal(tensor, drawn(name, shape, 3)) and tensor.dtype == torch.float32
    assert not torch.equal(tensor, drawn(name, shape, 4)) and not torch.equal(tensor, drawn("b.weight", shape, 3))
    assert float(tensor.std()) == pytest.approx(1000**-0.5, rel=0.02) and float(tensor.mean()) == pytest.approx(
        0, abs=1e-3
    )
    assert spread("a.bias", (9,)) == (0.0, 0.1) and float(drawn("a.bias", (999,), 0).abs().max()) <= 0.1
    vector = drawn("norm.weight", (999,), 0)
    assert 0.75 <= float(vector.min()) < 0.8 and 1.2 < float(vector.max()) <= 1.25
    assert drawn("scalar", (), 0).shape == () and drawn("empty.weight", (0, 4), 0).shape == (0, 4)


def test_converting_piece_by_piece_is_converting() -> None:
    header = original_headers(TINY, "F32")
    plan = compile_recipe(TRANSFORMER, TINY, header)
    source = drawing({name: info.shape for name, info in header.items()}, 0)
    whole = apply(plan, {name: source(name) for name in header})
    names = list(plan.targets)
    pieces: dict[str, Tensor] = {}
    for wanted in (names[::3], names[1::3], names[2::3]):
        made = {name: tensor for job in Converted(plan, source)(wanted) for name, tensor in job().items()}
        assert made.keys() == set(wanted)
        pieces |= made
    assert all(torch.equal(pieces[name], whole[name]) for name in names)


def test_the_shelf_keeps_bytes_and_writes_them_once(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    tensors = [
        torch.randn(3, 4).T, torch.tensor(1.5, dtype=torch.float64), torch.randn(2, 2).bfloat16(),
        torch.arange(5), torch.tensor([True, False]), torch.empty(0, 3),
    ]  # fmt: skip
    for tensor in tensors:
        back = shelf.get(shelf.put(tensor))
        assert back.dtype == tensor.dtype and torch.equal(back, tensor)
    before = shelf.bytes
    shelf.put(tensors[0].clone())
    assert shelf.bytes == before and len(list(tmp_path.iterdir())) == len(tensors)
    with pytest.raises(ResourceError, match="cannot be written"):
        Shelf(tmp_path / "gone").put(torch.ones(1))


@dataclass
class Answer:
    sample: Tensor
    extra: dict[str, Any]


def test_tensors_inside_anything_are_replaced() -> None:
    value = (Answer(torch.ones(1), {"a": [torch.ones(1), "text"]}), None)
    found = with_tensors(value, {"0.sample": torch.zeros(2), "0.extra.a.0": torch.zeros(3)})
    assert found[0].sample.shape == (2,) and found[0].extra["a"][0].shape == (3,) and found[0].extra["a"][1] == "text"
    assert value[0].sample.shape == (1,) and value[0].extra["a"][0].shape == (1,)


def _raises(*args: Any, **kwargs: Any) -> None:
    raise ValueError("out of range")


def test_activations_are_removed_whatever_happens(tmp_path: Path) -> None:
    compare_scaled(TOY, tmp_path)
    assert not list(tmp_path.iterdir())

    def edit(module: Any) -> None:
        module.blocks[2].norm.register_forward_hook(_raises)

    broken = compare_scaled(TOY, tmp_path, edit=edit).result
    assert broken.status == SKIPPED and "ValueError: out of range" in broken.reason
    with pytest.raises(BadInputError, match="the reference does not run: ValueError"):
        compare_scaled(replace(TOY, reference=Side(lambda c: Reference(), _raises)), tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path: Path) -> None:
    case, out = tmp_path / "mine.py", tmp_path / "out"
    case.write_text(
        "import os, signal\nfrom dataclasses import replace\nfrom parity.case import Side\n"
        "from tests.parity.test_scale import Reference, TOY as good\n\n"
        "class Killed(Reference):\n    def forward(self, x, t):\n        super().forward(x, t)\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n\n"
        "killed = replace(good, reference=Side(lambda c: Killed()))\n"
    )
    command = [sys.executable, "-m", "parity.scale", f"{case}:killed", "-o", str(out)]
    assert subprocess.run(command, capture_output=True, timeout=120).returncode == -signal.SIGKILL
    assert [p.name.startswith(".activations-") for p in out.iterdir()] == [True]
    assert main([f"{case}:good", "-o", str(out)]) == 0
    assert [p.name for p in out.iterdir()] == ["parity-scale.json"]


def test_a_folder_that_cannot_be_used_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="cannot write"):
        compare_scaled(TOY, tmp_path / "file")
    with spool(tmp_path), pytest.raises(BusyError, match="another process is writing"):
        compare_scaled(TOY, tmp_path)


def test_cases_that_cannot_be_compared_block_after_block(tmp_path: Path) -> None:
    wrong: dict[str, tuple[Case, type[PorterError]]] = {
        "a function converts whole states": (replace(TOY, convert=lambda state: state), BadInputError),
        "the candidate does not build": (replace(TOY, candidate=Side(_raises)), BadInputError),
        "do not fill the candidate": (replace(TOY, candidate=TOY.reference), RecipeError),
        "table is to stay as Reference computes it": (replace(TOY, keep="table"), BadInputError),
        "one by one": (replace(TOY, blocks=(), skip=r"layers\.\d+"), BadInputError),
    }
    for words, (case, kind) in wrong.items():
        with pytest.raises(kind, match=words):
            compare_scaled(case, tmp_path)
    weights = tmp_path / "weights.safetensors"
    save_file({k: v for k, v in state(Reference).items() if k != "table"}, weights)
    with pytest.raises(BadInputError, match="beginning with table"):
        compare_scaled(replace(TOY, weights=weights), tmp_path)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = tmp_path / "mine.py"
    case.write_text("from tests.parity.test_scale import CROSS as good, TOY as toy, faulty\n")
    assert main([f"{case}:good", "-o", str(tmp_path / "out"), "--threads", str(torch.get_num_threads())]) == 0
    said = capsys.readouterr()
    assert "PASS identical" in said.out and "7 of 7 blocks" in said.err
    data = json.loads((tmp_path / "out" / "parity-scale.json").read_text())
    assert data["schema"] == "porter.parity-scale/1" and data["passed"] and data["peak_resident_bytes"] > 2**20
    assert data["figures"]["blocks"] == {"forward": 7} and data["counts"]["skipped"] == 0
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["parity-scale.json"]
    assert main([f"{case}:faulty", "-o", str(tmp_path / "out")]) == 1
    assert "FAIL first guilty module: the steps after its last module" in capsys.readouterr().out
    for words in ([f"{case}:nothing"], [str(tmp_path / "none.py")], [f"{case}:good", "--gate", "0"]):
        with pytest.raises(PorterError):
            main(words)


class Faulty(Candidate):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x, t) * 1.00001


faulty = replace(TOY, candidate=Side(lambda c: Faulty()))


@pytest.mark.reference
@pytest.mark.skipif("PORTER_REFERENCES" not in os.environ, reason="PORTER_REFERENCES names no folder with checkouts")
@pytest.mark.parametrize("candidate", ["native", "diffusers"])
def test_the_original_code_block_after_block(candidate: str, tmp_path: Path) -> None:
    original = flux("original", candidate, TINY, (7, 4, 3))
    result = compare_scaled(original, tmp_path).result
    assert result.passed and result.counts["skipped"] == 0, result.guilty

    def edit(module: Any) -> None:
        block = module.single_transformer_blocks[2]
        block.act_mlp = nn.GELU()  # erf for tanh

    guilty = compare_scaled(original, tmp_path, edit=edit).result.guilty
    assert guilty and guilty.candidate == "single_transformer_blocks.2" and guilty.others == ()
