"""What was asked of `porter parity`, and how it went."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from parity.compare import GATE, Verdict
from parity.component import ComponentResult
from parity.pipeline import PipelineResult
from porter.core.errors import UsageError
from porter.core.port import PARITY, Port

SCHEMA = "porter.parity/1"
PIPELINE = "pipeline"
OUTPUTS_ONLY = "only outputs were compared, no module was looked at (--level component)"


@dataclass(frozen=True)
class Options:
    """What to compare, and how.

    Attributes:
        components, against: empty for everything there is; `original` only with a checkout. `against` may also hold
            `trace:FILE` and `module:function`.
        level: how deep: `component`, `block`, `module`, or `pipeline`, `step` of pipelines; empty for all.
        dtype: the candidate's; a lossy one is judged by the float64 truth.
        inputs: of live references: `random`, `captured` (by a run of the pipeline), or a safetensors file.
        time_limit: seconds for a reference in a process of its own.
    """

    components: tuple[str, ...] = ()
    against: tuple[str, ...] = ()
    reference_repo: Path | None = None
    source: Path | None = None
    gate: float = GATE
    seed: int = 0
    prompt: str | None = None
    steps: int | None = None
    level: str = ""
    dtype: str = "float32"
    device: str = "cpu"
    inputs: str = "random"
    reference_python: str | None = None
    time_limit: float = 1800.0
    shims: tuple[str, ...] | None = None

    def check_device(self) -> None:
        """Refuse a device that nothing can run on here.

        Raises:
            UsageError: there is no such device, or it is not here.
        """
        try:
            kind = torch.device(self.device).type
        except RuntimeError as error:
            raise UsageError(
                f"--device {self.device}: no such device", found=str(error), hint="leave it out"
            ) from error
        if kind == "meta" or (kind == "cuda" and not torch.cuda.is_available()):
            raise UsageError(f"--device {self.device}: {kind.upper()} is not available here", hint="leave --device out")


@dataclass
class Outcome:
    """All results of a run, of a port or, without one, of a case."""

    port: Port | None
    family: str
    options: Options
    components: list[ComponentResult] = field(default_factory=list)
    pipeline: PipelineResult | None = None
    changed: list[str] = field(default_factory=list)
    unproven: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def results(self) -> list[ComponentResult | PipelineResult]:
        return [*self.components, *([self.pipeline] if self.pipeline else [])]

    @property
    def holds(self) -> bool:
        """Whether everything that ran passes, and something ran."""
        return bool(self.results) and all(r.passed for r in self.results) and not self.changed

    @property
    def passed(self) -> bool:
        """The port's verdict: all was compared and holds, converted components with the original's own answers."""
        return self.holds and not self.unproven and not self.partial

    @property
    def partial(self) -> bool:
        """Whether the user asked for less than everything."""
        asked = self.options
        plain = (asked.level, asked.dtype, asked.device, asked.inputs) == ("", "float32", "cpu", "random")
        return bool(asked.components or asked.against) or not plain

    @property
    def folder(self) -> Path:
        """Where the report belongs; a partial one is no verdict on the port and stands apart."""
        if self.port is None:
            name = self.family.replace(".py", "").replace(":", "-")  # a case's name is no path
            return Path("parity-" + re.sub(r"[^\w.+-]+", "_", name)[:100])
        return self.port.path / PARITY.parent / ("partial" if self.partial else "")

    def conclusion(self) -> str:
        """The last line of the terminal's output."""
        if not self.results:
            return "FAIL nothing was compared"
        for result in self.components:
            if result.guilty:
                return f"FAIL first guilty module: {result.guilty}"
        for failed in self.results:
            if not failed.passed:
                line = f"FAIL {describe(failed)}: {reason_of(failed)}"
                return f"{line}; {OUTPUTS_ONLY}" if self.options.level == "component" else line
        if self.changed:
            return f"FAIL the port's files changed after conversion: {', '.join(self.changed[:3])}"
        lines = [v for r in self.results if (v := r.headline)]
        largest = max(lines, key=lambda v: v.max_abs)
        line = f"PASS max|Δ| = {largest.max_abs:.2g} (floor {largest.floor:.2g})"
        if self.unproven:
            line += f"; not compared with the original: {', '.join(self.unproven)}"
        if self.options.level == "component":
            line += f"; {OUTPUTS_ONLY}"
        return line


def describe(result: ComponentResult | PipelineResult) -> str:
    """`transformer (native) against trace`."""
    if isinstance(result, PipelineResult):
        return "pipeline (native) against diffusers"
    return f"{result.component} ({result.candidate}) against {result.against}"


def _said(verdict: Verdict) -> str:
    """`forward: differs: float64 keeps 3.8e-04`."""
    return ": ".join(filter(None, (verdict.name, verdict.status, verdict.note)))


def reason_of(result: ComponentResult | PipelineResult) -> str:
    """Why a result is not a pass, in one line."""
    if result.reason:
        return result.reason
    if isinstance(result, PipelineResult):
        stage = result.first_failing
        return (
            f"both sides part at {stage.name!r}: {stage.status}, {stage.note or f'max|Δ| {stage.max_abs:.1e}'}"
            if stage
            else ""
        )
    if result.guilty:
        return f"{result.guilty}: {result.guilty.why}"
    if result.unused:
        names = ", ".join(result.unused[:3])
        hint = "a case's further pass runs them, or its `skip` names them"
        return f"{len(result.unused)} modules with weights never ran: {names}; {hint}"
    if isinstance(result, ComponentResult) and result.unwatched:
        return f"the reference recorded nothing of {len(result.unwatched)} modules: {', '.join(result.unwatched[:3])}"
    first = next((v for v in result.verdicts if not v.passed), None)
    return _said(first) if first else result.status
