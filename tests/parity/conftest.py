"""The embedded model's converted components, each with its trace; an interpreter without porter."""

from __future__ import annotations

import re
import subprocess
import sysconfig
import venv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from torch import nn

from conversions.flux1.case import CASES
from parity.align import Alignment
from parity.case import Candidate, ComponentCase
from parity.component import ComponentResult, compare_component
from parity.run import alignment_of
from parity.trace import Trace

OURS = re.compile(
    r"(porter|parity|conversions|runtime|diffusion_porter|__editable__|__pycache__|.*\.pth)", re.IGNORECASE
)


@dataclass
class Bench:
    """One component with its trace and alignment, to be compared again and again."""

    case: ComponentCase
    folder: Path
    trace: Trace

    def alignment(self, candidate: Candidate) -> Alignment:
        """Which of the candidate's modules answers to which of the reference's."""
        return alignment_of(self.case, self.folder, candidate.on_load)

    def compare(self, candidate: Candidate, edit: Callable[[nn.Module], object] | None = None) -> ComponentResult:
        """Load the candidate, let `edit` plant a fault, compare with the committed trace."""
        module = candidate.load(self.folder)
        if edit:
            edit(module)
        result = ComponentResult(self.case.component, "trace", candidate.name, "")
        steps = self.case.output_step
        return compare_component(module, candidate, self.trace, self.alignment(candidate), result, step_names=steps)


def bench(port: Path, component: str) -> Bench:
    case = next(c for c in CASES.components if c.component == component)
    folder = port / component
    return Bench(case, folder, Trace.open(case.trace))


@pytest.fixture(scope="session")
def transformer(tiny_port: Path) -> Bench:
    return bench(tiny_port, "transformer")


@pytest.fixture(scope="session")
def vae(tiny_port: Path) -> Bench:
    return bench(tiny_port, "vae")


@pytest.fixture(scope="session")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An interpreter of its own with all of our packages but porter, as a project's environment is."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=False, symlinks=True)
    packages = next(folder.glob("lib/python*/site-packages"))
    for path in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if not OURS.match(path.name):
            (packages / path.name).symlink_to(path)
    exe = str(folder / "bin" / "python")
    for name in ("porter", "parity"):
        done = subprocess.run([exe, "-c", f"import {name}"], capture_output=True, cwd=folder, env={})
        assert done.returncode == 1 and b"ModuleNotFoundError" in done.stderr
    return exe
