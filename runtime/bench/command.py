"""Which cases are measured, and the whole document."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from porter.core.errors import UsageError
from porter.core.family import families, family_named, resolve
from runtime.bench.case import BenchCase
from runtime.bench.document import SCHEMA
from runtime.bench.run import SYSTEMS, environment, run_case
from runtime.memory.exhausted import out_of_memory
from runtime.registry import pick_device


def cases_of(names: Sequence[str]) -> list[BenchCase]:
    """The benchmark cases of families, or of all that declare some.

    Raises:
        UsageError: no such family, or it declares none.
    """
    wanted = [family_named(name) for name in names] or [one for one in families().values() if one.bench]
    if without := [one.name for one in wanted if not one.bench]:
        raise UsageError(
            f"{without[0]} declares no benchmark", found=without[0],
            expected=", ".join(name for name, one in families().items() if one.bench), hint="porter bench runtime",
        )  # fmt: skip
    return [case for family in wanted for case in resolve(str(family.bench))]


def measured(
    names: Sequence[str], *, full: bool, shrunk: bool, systems: Sequence[str], repeats: int, warmup: int, quality: Any,
    attention: str, dtype: torch.dtype | None, device: str | None, progress: Callable[[str], None],
) -> dict[str, Any]:  # fmt: skip
    """The document `porter.bench.runtime/1`.

    Raises:
        UsageError: options that do not go together, no such family, system or device.
        ResourceError: out of memory.
    """
    if full and shrunk:
        raise UsageError("--full and --shrunk are opposites", expected="one of them", found="both")
    if odd := [name for name in systems if name not in SYSTEMS]:
        raise UsageError(f"no system {odd[0]}", expected=" | ".join(SYSTEMS), found=odd[0])
    target = pick_device(device)
    kind = dtype or (torch.bfloat16 if target.type == "cuda" else torch.float32)
    small = shrunk or (target.type != "cuda" and not full)
    return measured_cases(
        [case.shrunk() if small else case for case in cases_of(names)], device=target, dtype=kind, systems=systems,
        repeats=repeats, warmup=warmup, quality=quality, attention=attention, progress=progress,
    )  # fmt: skip


def measured_cases(
    cases: Sequence[BenchCase], *, device: torch.device, dtype: torch.dtype, systems: Sequence[str], repeats: int,
    warmup: int, quality: Any, attention: str, progress: Callable[[str], None],
) -> dict[str, Any]:  # fmt: skip
    """The document of these cases. Raises ResourceError: out of memory."""
    found = []
    for case in cases:
        with out_of_memory():
            one = run_case(
                case, device=device, dtype=dtype, repeats=repeats, warmup=warmup, systems=systems or SYSTEMS,
                quality=quality, attention=attention, progress=progress,
            )  # fmt: skip
        found.append(one | {"ratios": _ratios(one["systems"])})
    return {
        "schema": SCHEMA, "environment": environment(device), "dtype": str(dtype).removeprefix("torch."),
        "quality": quality, "attention": attention, "repeats": repeats, "warmup": warmup, "cases": found,
    }  # fmt: skip


def _ratios(systems: dict[str, Any]) -> dict[str, float]:
    """Ours over diffusers', like with like: below 1 ours is faster."""
    pairs = {"porter / diffusers": ("porter", "diffusers"),
             "porter compiled / diffusers compiled": ("porter compiled", "diffusers compiled")}  # fmt: skip
    return {
        name: systems[ours]["ms_per_step"] / systems[theirs]["ms_per_step"]
        for name, (ours, theirs) in pairs.items()
        if ours in systems and theirs in systems
    }
