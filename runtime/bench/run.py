"""One case: both implementations with random weights on the device, timed in turn, as a JSON document."""

from __future__ import annotations

import gc
import importlib
import platform
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from porter.core.family import resolve
from porter.core.version import VERSION
from runtime.attention import attention_backend
from runtime.bench.case import BenchCase, Given, drawn
from runtime.bench.measure import flops, in_turn, matmul_rate, peak, reset_peak
from runtime.compiled import compile_blocks
from runtime.meta import parameters_on_meta
from runtime.quality import Quality, at_quality

SYSTEMS = ("diffusers", "diffusers compiled", "porter", "porter compiled")


def build(cls: Any, config: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A module with small random weights, made on the device itself."""
    with parameters_on_meta():
        module: nn.Module = cls.from_config(dict(config))
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                made = torch.empty(parameter.shape, dtype=dtype, device=device).normal_(0, 0.02)
                part._parameters[name] = nn.Parameter(made, requires_grad=False)
        for name, table in part._buffers.items():  # tables that a class computes are real
            part._buffers[name] = None if table is None else table.to(device)
    return module.eval()


def run_case(
    case: BenchCase, *, device: torch.device, dtype: torch.dtype, repeats: int, warmup: int,
    systems: Sequence[str] = SYSTEMS, quality: Quality = "lossless", attention: str = "sdpa",
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:  # fmt: skip
    """Measure one case.

    Returns:
        Its part of the document: per system milliseconds a step, first call, memory, ratio to the bound; and the
        arithmetic of a step.
    """
    diffusers = importlib.import_module("diffusers")
    classes = {"diffusers": getattr(diffusers, case.diffusers_class), "porter": resolve(case.native)}
    work = count_flops(case, classes["porter"], dtype)
    rate = matmul_rate(device, dtype)
    found: dict[str, Any] = {}
    for side in ("diffusers", "porter"):
        named = [name for name in systems if name.split()[0] == side]
        if not named:
            continue
        progress(f"{case.name}: {side}")
        reset_peak(device)
        module = build(classes[side], case.config, device, dtype)
        given = case.inputs(case.config, case.sizes, drawn(device, dtype))
        given = case.native_inputs(module, given) if side == "porter" else given
        for name in named:  # eager first: compiled blocks stay compiled
            if name.endswith("compiled"):
                progress(f"{case.name}: {name}")
                compile_blocks(module)
            found[name] = _timed(module, given, side, case, device, repeats, warmup, quality, attention, work, rate)
        del module, given
        gc.collect()
        reset_peak(device)
    return {
        "name": case.name, "config": dict(case.config), "sizes": dict(case.sizes), "passes": case.passes,
        "tflop_per_step": work / 1e12, "tflops_reached_by_matmul": rate / 1e12,
        "bound_ms": 1000 * work / rate, "systems": found,
    }  # fmt: skip


def _timed(
    module: nn.Module, given: Given, side: str, case: BenchCase, device: torch.device, repeats: int, warmup: int,
    quality: Quality, attention: str, work: int, rate: float,
) -> dict[str, Any]:  # fmt: skip
    answer = {"return_dict": False} if side == "diffusers" else {}

    def step() -> None:
        for _ in range(case.passes):
            module(**given, **answer)

    backends = getattr(module, "supported_attention_backends", (attention,))
    with torch.no_grad(), at_quality(quality), attention_backend(attention, backends):
        (timing,) = in_turn([step], device, repeats=repeats, warmup=warmup)
    return {
        "ms_per_step": timing.median, "fastest_ms": timing.fastest, "slowest_ms": timing.slowest,
        "first_call_ms": timing.first, "calls": timing.calls, "peak_bytes": peak(device),
        "times_the_bound": timing.median / (1000 * work / rate),
    }  # fmt: skip


def count_flops(case: BenchCase, cls: Any, dtype: torch.dtype) -> int:
    """Floating-point operations of a step, counted on the native class without weights."""
    with torch.device("meta"):
        module: nn.Module = cls.from_config(dict(case.config)).to(dtype).eval()
    meta = torch.device("meta")
    given = case.inputs(case.config, case.sizes, lambda *shape: torch.empty(*shape, dtype=dtype, device=meta))
    given = {name: value.to(meta) if isinstance(value, torch.Tensor) else value for name, value in given.items()}
    given = case.native_inputs(module, given)
    return case.passes * flops(module, lambda model: model(**given))


def environment(device: torch.device) -> dict[str, Any]:
    """What a figure is worth nothing without."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else f"CPU {platform.machine()}",
        "cuda_device": torch.cuda.get_device_name(device) if cuda else None,
        "threads": torch.get_num_threads(), "python": platform.python_version(), "cuda": torch.version.cuda,
        "versions": {"porter": VERSION} | {name: version(name) for name in ("torch", "diffusers")},
    }  # fmt: skip
