"""Memory formulas of denoisers against torch's tracker, for released models at real sizes; and the tracker itself."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from porter.core.formulas import module_sources
from porter.core.memory import estimate, formula_of
from porter.core.workload import Workload, full_config
from tests import denoiser_inputs as inputs
from tests.memory_tracker import DTYPES, cast, measure
from tests.real_denoisers import DENOISERS, Denoiser
from tests.repeated import some

MIB = 2**20


def points() -> Iterator[Any]:
    """Every model at every size, batch and dtype; in every run, one model of a class, cut in depth, at two of them."""
    seen: set[str] = set()
    for model in DENOISERS:
        works = model.points()
        for work in works:
            name = f"{model.name} {work.batch}x{work.frames}x{work.height}x{work.width} {work.dtype}"
            yield pytest.param(model, work, id=name, marks=pytest.mark.slow)
            if model.class_name not in seen and work == works[-1]:
                yield pytest.param(model.shallow(), work, id=f"{name} shallow")
        seen.add(model.class_name)


@pytest.mark.filterwarnings("ignore:.* is deprecated and will be removed:FutureWarning")  # diffusers in its own classes
@pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning")  # float32 is what Mochi's positions are in without it
@pytest.mark.parametrize(("model", "work"), list(points()))
def test_a_denoiser_needs_what_the_tracker_sees(model: Denoiser, work: Workload) -> None:
    formula = formula_of(model.class_name)
    assert formula is not None
    estimate, measured = formula(model.full(), work), model.measured(work).activations
    print(f"{model.name:25}{work.dtype:5}{measured / MIB:10.1f} MiB measured, ratio {estimate / measured:.3f}")
    assert 0.95 <= estimate / measured <= 1.05, (estimate, measured)  # 15 % is promised; a wrong moment is less


@pytest.mark.parametrize(("batch", "dtype"), [(1, "BF16"), (2, "F32")])
def test_in_a_small_video_reading_the_face_is_the_peak(batch: int, dtype: str) -> None:
    model = next(model for model in DENOISERS if model.name == "Wan2.2-Animate-14B").shallow()
    formula = formula_of(model.class_name)
    assert formula is not None
    work = replace(model.base, height=256, width=256, frames=29, batch=batch, dtype=dtype)
    measured = model.measured(work).activations
    assert formula(model.full(), work) == pytest.approx(measured, rel=0.05)
    fewer = formula(model.full() | {"motion_encoder_batch_size": 4}, work)
    assert fewer < 0.8 * measured


def test_a_timestep_for_each_frame_takes_more_and_causal_blocks_are_not_estimated() -> None:
    model = next(model for model in DENOISERS if model.name == "SkyReels-V2-T2V-14B-540P")
    formula, config = formula_of(model.class_name), model.full()
    assert formula is not None
    plain, forced = (formula(config, replace(model.base, frame_timesteps=forced)) for forced in (False, True))
    assert forced > 2 * plain
    assert formula(config | {"inject_sample_info": True}, model.base) == forced  # such a model takes no other call
    with pytest.raises(ValueError, match="causal blocks"):
        formula(config | {"num_frame_per_block": 5}, model.base)


@dataclass(frozen=True)
class Part:
    """A component as a plan knows it."""

    name: str
    library: str
    class_name: str
    config: dict[str, Any]
    parameters: int
    dtypes: dict[str, int]
    bytes: int


@pytest.mark.parametrize("name", some(["SD3-medium", "Wan2.1-T2V-1.3B", "Kandinsky-5.0-T2V-Lite"], 1))
def test_weights_take_what_the_tracker_sees(name: str) -> None:
    model = next(model for model in DENOISERS if model.name == name)
    with torch.device("meta"):
        state = getattr(diffusers, model.class_name)(**model.config).state_dict()
    count = sum(tensor.numel() for tensor in state.values())
    part = Part("transformer", "diffusers", model.class_name, model.config, count, {"F32": 4 * count}, 4 * count)
    for dtype in ("BF16", "F32"):
        seen = model.measured(replace(model.base, dtype=dtype)).weights
        assert estimate([part], replace(model.base, dtype=dtype)).weights == pytest.approx(seen, rel=0.02), dtype


def test_no_choice_of_experts_is_the_peak_in_16_bits() -> None:
    """Evenly shared out among four, which is what the other tests measure, or all tokens to the same two."""
    model = next(model for model in DENOISERS if model.name == "HiDream-I1-Full").shallow()
    given = model.shapes(model.full(), model.base)
    build = getattr(diffusers, model.class_name)
    seen = {measure(lambda: build(**model.config), given, experts=experts).activations for experts in (2, 4)}
    assert len(seen) == 1


GROWING = (
    "FLUX.1-dev", "HunyuanVideo", "Wan2.1-T2V-14B", "Wan2.1-VACE-1.3B", "Wan2.2-Animate-14B", "SkyReels-V2-DF-14B-540P",
    "HunyuanDiT-v1.2",
)  # fmt: skip


@pytest.mark.parametrize("name", GROWING)
def test_an_estimate_grows_with_what_makes_it_grow(name: str) -> None:
    model = next(model for model in DENOISERS if model.name == name)
    formula = formula_of(model.class_name)
    assert formula is not None
    at = formula(model.full(), model.base)
    for more in ({"height": 2 * model.base.height}, {"batch": 2}, {"dtype": "F32"}, {"text_tokens": 1024}):
        assert formula(model.full(), replace(model.base, **more)) > at, more


def test_every_formula_is_found_by_its_class_and_by_no_other_module() -> None:
    seen: set[str] = set()
    for name, _ in module_sources():
        module = importlib.import_module(name)
        for class_name, formula in module.FORMULAS.items():
            assert class_name not in seen and formula_of(class_name) is formula, (name, class_name)
            seen.add(class_name)
        assert set(getattr(module, "KEPT", {})) <= set(module.FORMULAS)
    assert {model.class_name for model in DENOISERS} <= seen


def test_formulas_import_no_torch() -> None:
    code = (
        "import sys\nfrom porter.core.memory import formula_of\n"
        f"assert all(formula_of(name) for name in {sorted({model.class_name for model in DENOISERS})})\n"
        "assert not {'torch', 'diffusers', 'transformers', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


class Steps(nn.Module):
    """Five products of 8 MiB each, one after the other; `keep` lets them all live."""

    def __init__(self, keep: bool) -> None:
        super().__init__()
        self.matrix, self.keep = nn.Linear(1024, 4096, bias=False), keep

    def forward(self, x: Tensor) -> list[Tensor]:
        kept = []
        for _ in range(5):
            product = self.matrix(x)
            if self.keep:
                kept.append(product)
            del product
        return kept


@pytest.mark.parametrize(("keep", "alive"), [(False, 1), (True, 5)])
def test_the_tracker_sees_what_is_released(keep: bool, alive: int) -> None:
    seen = measure(lambda: Steps(keep), {"x": (1, 1024, 1024)})
    assert seen.weights == 1024 * 4096 * 2
    assert seen.activations == 2 * MIB + alive * 8 * MIB  # the input, and what lives


class Attend(nn.Module):
    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused

    def forward(self, query: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.fused:
            return nn.functional.scaled_dot_product_attention(query, query, query, attn_mask=mask)
        return (query @ query.transpose(-1, -2)).softmax(-1) @ query


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_the_tracker_counts_fused_attention_as_no_matrix_of_scores(dtype: str) -> None:
    given = 8 * 4096 * 64 * (2 if dtype == "BF16" else 4)
    shape = (1, 8, 4096, 64)
    assert measure(lambda: Attend(True), {"query": shape}, dtype).activations == 2 * given
    masked = measure(lambda: Attend(True), {"query": shape, "mask": ((1, 4096), torch.bool)}, dtype).activations
    assert 2 * given < masked < 2.01 * given
    assert measure(lambda: Attend(False), {"query": shape}, dtype).activations > 60 * given


SMALL_ENOUGH_TO_RUN = [
    ("PixArtTransformer2DModel", {"num_layers": 2, "caption_channels": 4096, "use_additional_conditions": False},
     inputs.pixart, Workload(dtype="F32", height=512, width=512, text_tokens=300)),
    ("WanTransformer3DModel", {"num_layers": 2, "num_attention_heads": 12, "ffn_dim": 8960},
     inputs.wan, Workload(dtype="BF16", height=240, width=416, frames=9, temporal=4)),
]  # fmt: skip


@pytest.mark.parametrize(("class_name", "config", "shapes", "work"), SMALL_ENOUGH_TO_RUN)
def test_the_tracker_counts_what_a_run_allocates(class_name: str, config: Any, shapes: Any, work: Workload) -> None:
    """Two blocks of real width, run on the CPU with numbers; the profiler reports every allocation and release."""
    build = getattr(diffusers, class_name)
    given = shapes(full_config("diffusers", class_name, config), work)
    module = build(**config).eval()
    cast(module, DTYPES[work.dtype])
    tensors = {
        name: torch.zeros(value, dtype=DTYPES[work.dtype]) if isinstance(value[0], int) else torch.ones(value[0]).long()
        for name, value in given.items()
        if isinstance(value, tuple)
    }
    others = {name: value for name, value in given.items() if name not in tensors}
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        module(**tensors, **others)
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = sum(tensor.nbytes for tensor in tensors.values())
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    assert measure(lambda: build(**config), given, work.dtype).activations == pytest.approx(peak, rel=0.01)
