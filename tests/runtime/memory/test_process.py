"""Whole processes: the most memory that they take, and what they say when there is none left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from porter.core.errors import ResourceError
from porter.core.memory import estimate
from porter.core.plan import ComponentPlan
from porter.core.workload import Workload
from runtime.compiled import blocks_of
from runtime.memory.exhausted import Tried, advice, out_of_memory
from runtime.registry import load
from tests.runtime.memory.test_offload import watched, whole
from tests.runtime.ports import write_port

BIG = Path(__file__).with_name("big.py")
LAYERS = 16
MB = 1 << 20


@pytest.fixture(scope="module")
def ports(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A port with a transformer of some 270 MB, and a small one."""
    from diffusers import FluxTransformer2DModel

    folder = tmp_path_factory.mktemp("ports")
    small, big = write_port(folder / "small"), write_port(folder / "big")
    config = json.loads((big / "transformer" / "config.json").read_text())
    own = {key: value for key, value in config.items() if not key.startswith("_")}
    shape = {"num_attention_heads": 16, "attention_head_dim": 32, "axes_dims_rope": (8, 12, 12)}
    torch.manual_seed(0)
    model = FluxTransformer2DModel(**own | shape | {"num_layers": 1, "num_single_layers": LAYERS})
    model.save_pretrained(big / "transformer")
    return big, small


def process(*arguments: object) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parents[3]
    return subprocess.run(
        [sys.executable, str(BIG), *map(str, arguments)], cwd=root, capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}, check=True,
    )  # fmt: skip


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from /proc")
def test_the_process_takes_less(ports: tuple[Path, Path]) -> None:
    found: dict[str, Any] = json.loads(process("peaks", *ports).stdout)
    assert len({one["digest"] for one in found.values()}) == 1
    peaks = {name: one["peak"] for name, one in found.items()}
    weights = sum(file.stat().st_size for file in (ports[0] / "transformer").glob("*.safetensors"))
    assert weights > 200 * MB
    assert weights < peaks["none"] < 1.3 * weights  # never two copies, not while it is loaded either
    assert peaks["component"] < 1.2 * weights
    assert peaks["layer"] < 0.35 * weights


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="an address space is limited on Linux")
def test_out_of_memory_names_what_helps_and_it_helps(ports: tuple[Path, Path], tmp_path: Path) -> None:
    ran = process("limit", ports[0], 200, tmp_path / "out")
    assert json.loads(ran.stdout.splitlines()[-1]) == [5, 0]
    assert "out of memory while the weights were loaded" in ran.stderr
    assert "--offload component, or --offload layer" in ran.stderr
    written = sorted(path.name for path in (tmp_path / "out").rglob("*"))
    assert written == ["layers.json", "layers.png"]


def test_weights_are_those_that_are_planned(ports: tuple[Path, Path], tmp_path: Path) -> None:
    """As docs/memory.md says: the component, or two blocks of it and what stands outside of blocks."""
    config = json.loads((ports[0] / "transformer" / "config.json").read_text())
    most = {}
    for way in ("component", "layer"):
        pipeline = load(ports[0], dtype=torch.float32, device="cpu", offload=way)
        with watched(pipeline) as seen:
            pipeline.generate("a red circle", height=32, width=32, num_inference_steps=1)
        most[way] = seen["transformer"]
    model = pipeline.denoiser
    size, blocks = whole(model), [whole(block) for block in blocks_of(model)]
    part = ComponentPlan(
        "transformer", "diffusers", "FluxTransformer2DModel", "port", "diffusers", (), size, size // 4, {"F32": size},
        None, config=config,
    )  # fmt: skip
    (planned,) = estimate([part], Workload(height=32, width=32, dtype="F32")).stages
    activations = planned.component_offload - size
    assert most["component"] == planned.component_offload - activations
    uneven = max(blocks) - sum(blocks) / len(blocks)  # the first block is larger than the others
    assert most["layer"] + max(blocks[1:]) <= planned.layer_offload - activations + size - sum(blocks) + uneven


def test_advice_is_what_was_not_tried() -> None:
    assert advice(Tried(native=True))[:2] == ["--offload component", "--offload layer"]
    assert advice(Tried("decoding", True, "component"))[:2] == ["--offload layer", "--vae-tiling"]
    assert "--vae-tiling" not in advice(Tried("denoising", True))
    assert advice(Tried("decoding", True, "layer", None, True, 4, torch.bfloat16))[0] == "--batch-size 2"
    assert advice(Tried("denoising", True, "layer", None, True, 1, torch.bfloat16))[0].endswith("--weights fp8")
    assert not any("--offload" in flag or "--weights" in flag for flag in advice(Tried("denoising")))
    for tried in (Tried(), Tried("decoding", True, "layer", "fp8", True, 1, torch.bfloat16)):
        with pytest.raises(ResourceError) as caught, out_of_memory(lambda tried=tried: tried):
            torch.empty(1 << 60, dtype=torch.uint8)
        assert "--height" in str(caught.value.hint)
        assert caught.value.what.endswith(f"in the stage {tried.stage}" if tried.stage else "out of memory")
