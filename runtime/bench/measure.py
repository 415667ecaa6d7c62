"""Seconds of a call, memory at its peak, the arithmetic that it takes and the rate that the machine reaches."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Timing:
    """Milliseconds of single calls after the warm-up, and of the first call, which compiles."""

    median: float
    fastest: float
    slowest: float
    first: float
    calls: int


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def one_call(call: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds of one call: by CUDA's events on a GPU, by the clock elsewhere."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize(device)
        return float(begin.elapsed_time(end))
    since = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - since)


def in_turn(calls: Sequence[Callable[[], Any]], device: torch.device, *, repeats: int, warmup: int) -> list[Timing]:
    """Time several calls A B A B …, so that a machine that slows down slows all of them.

    Args:
        repeats: measured calls of each; `warmup`: calls of each before that, of which the first is kept apart.
    """
    firsts, found = [], [list[float]() for _ in calls]
    for call in calls:
        synchronize(device)
        since = time.perf_counter()
        call()
        synchronize(device)
        firsts.append(1000 * (time.perf_counter() - since))
        for _ in range(warmup - 1):
            call()
    for _ in range(repeats):
        for call, times in zip(calls, found, strict=True):
            times.append(one_call(call, device))
    return [
        Timing(statistics.median(times), min(times), max(times), first, len(times))
        for times, first in zip(found, firsts, strict=True)
    ]


def reset_peak(device: torch.device) -> None:
    """Begin to look for a new peak."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak(device: torch.device) -> int:
    """Bytes of the device's tensors at the peak; on a CPU, of the process since it began."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def flops(module: nn.Module, call: Callable[[nn.Module], Any]) -> int:
    """Floating-point operations of one call of a module on the meta device: products and attention, as torch counts."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call(module)
    return int(counter.get_total_flops())


def matmul_rate(device: torch.device, dtype: torch.dtype, repeats: int = 5) -> float:
    """Floating-point operations a second that this device reaches in one large matrix product: the bound's rate."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    (timing,) = in_turn([lambda: a @ b], device, repeats=repeats, warmup=2)
    return 2 * side**3 / (timing.fastest / 1000)
