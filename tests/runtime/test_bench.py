"""The runtime's benchmark: arithmetic at real size, both sides measured in one run, document, chart, bad options."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import torch

from porter.cli import main
from porter.core.errors import UsageError
from porter.core.family import families
from runtime.bench.case import BenchCase
from runtime.bench.command import cases_of, measured, measured_cases
from runtime.bench.document import chart, rows, write
from runtime.bench.measure import in_turn, matmul_rate
from runtime.bench.run import SYSTEMS, count_flops, run_case

CPU = torch.device("cpu")
# TFLOP of a forward at full size, counted by hand from the layers' shapes (docs of the models' authors agree).
KNOWN = {"flux1": 74.4, "qwen_image": 68.7, "wan": 283, "z_image": 55.6}


def tiny(case: BenchCase) -> BenchCase:
    small = case.shrunk()
    config = {**small.config, "num_layers": 1, "num_single_layers": 1, "num_attention_heads": 1}
    sizes = {"text": 4, "rows": 4, "columns": 4}
    return BenchCase(small.name, config, small.native, small.diffusers_class, small.inputs, sizes, small.native_inputs)


@pytest.mark.parametrize("family", KNOWN)
def test_the_arithmetic_at_full_size_is_the_known_one(family: str) -> None:
    (case, *_) = cases_of([family])
    forward = count_flops(case, _native(case), torch.bfloat16) / case.passes
    assert abs(forward / 1e12 / KNOWN[family] - 1) < 0.01


def _native(case: BenchCase) -> Any:
    from porter.core.family import resolve

    return resolve(case.native)


def test_both_sides_are_measured_and_stand_beside_the_bound() -> None:
    case, told = tiny(cases_of(["flux1"])[0]), list[str]()
    found = run_case(
        case,
        device=CPU,
        dtype=torch.float32,
        repeats=3,
        warmup=1,
        systems=("diffusers", "porter"),
        progress=told.append,
    )
    assert list(found["systems"]) == ["diffusers", "porter"] and len(told) == 2
    for one in found["systems"].values():
        assert 0 < one["fastest_ms"] <= one["ms_per_step"] <= one["slowest_ms"] and one["calls"] == 3
        assert one["times_the_bound"] == pytest.approx(one["ms_per_step"] / found["bound_ms"]) and one["peak_bytes"] > 0
    assert found["tflop_per_step"] * 1e12 == count_flops(case, _native(case), torch.float32)


def test_guidance_counts_twice() -> None:
    case = tiny(cases_of(["flux1"])[0])
    twice = BenchCase(case.name, case.config, case.native, case.diffusers_class, case.inputs, case.sizes,
                      case.native_inputs, passes=2)  # fmt: skip
    assert count_flops(twice, _native(case), torch.float32) == 2 * count_flops(case, _native(case), torch.float32)


def test_calls_are_timed_in_turn() -> None:
    order: list[str] = []
    first, second = in_turn([lambda: order.append("a"), lambda: order.append("b")], CPU, repeats=3, warmup=2)
    assert order == list("aabb" + "ababab") and first.calls == second.calls == 3
    assert 1e7 < matmul_rate(CPU, torch.float32, repeats=3) < 1e15


def test_every_declared_case_counts_and_shrinks() -> None:
    declared = [name for name, family in families().items() if family.bench]
    assert "flux1" in declared
    for case in cases_of([]):
        small = case.shrunk()
        assert count_flops(small, _native(case), torch.float32) < 2e11, case.name  # a CPU's second or so
        assert small.name.endswith("shrunk") and small.config != case.config


def test_document_table_and_chart(tmp_path: Path) -> None:
    made = measured_cases(
        [tiny(cases_of(["flux1"])[0])], device=CPU, dtype=torch.float32, systems=("porter", "diffusers"), repeats=3,
        warmup=1, quality="lossless", attention="sdpa", progress=lambda line: None,
    )  # fmt: skip
    out = tmp_path / "bench"
    assert [path.name for path in write(made, out)] == ["runtime-cpu.json", "runtime-cpu.svg"]
    document = json.loads((out / "runtime-cpu.json").read_text())
    assert document["schema"] == "porter.bench.runtime/1" and document["environment"]["versions"]["torch"]
    (one,) = document["cases"]
    assert one["ratios"]["porter / diffusers"] == pytest.approx(
        one["systems"]["porter"]["ms_per_step"] / one["systems"]["diffusers"]["ms_per_step"]
    )
    assert [name for name, *_ in rows(one)] == ["diffusers", "porter"]
    drawn = ET.fromstring((out / "runtime-cpu.svg").read_text())
    assert drawn.tag.endswith("svg") and len(drawn.findall(".//{*}rect")) == 3  # the ground and two bars
    document["cases"][0]["name"] = "<script>"
    assert "<script>" not in chart(document)


@pytest.mark.slow
def test_the_command_on_shrunk_sizes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = ["--system", "porter", "--system", "diffusers", "--repeats", "3", "--warmup", "1", "--quiet", "--json"]
    assert main(["bench", "runtime", "flux1", "--device", "cpu", "-o", str(tmp_path), *options]) == 0
    document = json.loads(capfd.readouterr().out)
    assert document == json.loads((tmp_path / "runtime-cpu.json").read_text())


@pytest.mark.parametrize(
    ("names", "options", "says"),
    [
        (("flux9",), {}, "flux9"),
        (("sd1",), {}, "declares no benchmark"),
        ((), {"full": True, "shrunk": True}, "opposites"),
        ((), {"systems": ("tensorrt",)}, "tensorrt"),
        ((), {"device": "cuda:77"}, "cuda:77"),
    ],
    ids=str,
)
def test_bad_options(names: tuple[str, ...], options: dict[str, Any], says: str) -> None:
    given: dict[str, Any] = {"full": False, "shrunk": False, "systems": SYSTEMS, "repeats": 3, "warmup": 1,
                             "quality": "lossless", "attention": "sdpa", "dtype": None, "device": "cpu"}  # fmt: skip
    with pytest.raises(UsageError, match=says):
        measured(names, **given | options, progress=lambda line: None)
