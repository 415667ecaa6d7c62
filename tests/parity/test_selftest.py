"""Does the instrument itself tell right from wrong? Faults planted in three families, and correct runs without alarm.

    make selftest

Weights and code are spoiled in the candidate, after it was filled; the reference is the original code's committed
trace, or (`PAIR`) another implementation. Each fault must fail, at exactly its module on both sides; a correct port
must pass at any seed, size and thread count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conversions.flux1.scale import case as cross
from parity.case import ComponentCase
from parity.compare import DIFFERS, GATE, OVER
from parity.component import ComponentResult, compare_component
from parity.outcome import reason_of
from parity.own import compare_case
from parity.run import alignment_of
from parity.trace import Trace
from porter.core.family import families, resolve
from tests.conversions.test_references import port_of
from tests.parity.pair import CONFIG, case
from tests.parity.spoiled import FLUX, PAIR, SD3, Z_IMAGE, Edit, Fault
from tests.parity.test_scale import TINY


class Bed:
    """A family's port with its committed trace."""

    def __init__(self, family: str, name: str, folder: Path, port: Path | None = None) -> None:
        cases = resolve(str(families()[family].cases)).components
        self.case: ComponentCase = next(c for c in cases if c.trace.stem == name)
        self.port = port or port_of(family, self.case, folder)
        self.trace, self.alignment = Trace.open(self.case.trace), alignment_of(self.case, self.port)

    def compare(self, edit: Edit | None = None) -> ComponentResult:
        candidate = self.case.candidates[-1]  # diffusers'
        module = candidate.load(self.port)
        if edit:
            edit(module)
        result = ComponentResult(self.case.component, "trace", candidate.name, "")
        return compare_component(module, candidate, self.trace, self.alignment, result)


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> Bed:
    return Bed("sd3", "transformer-3.5-large", tmp_path_factory.mktemp("sd3"))


@pytest.fixture(scope="module")
def z_image(tmp_path_factory: pytest.TempPathFactory) -> Bed:
    return Bed("z_image", "transformer", tmp_path_factory.mktemp("z_image"))


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory, tiny_port: Path) -> Bed:
    return Bed("flux1", "transformer", tmp_path_factory.mktemp("flux1"), tiny_port / "transformer")


def found(result: ComponentResult, fault: Fault) -> None:
    """It fails, and names the module on both sides; what moves the output less than the gate does so no less."""
    _, reference, candidate, under = fault
    assert result.status in (DIFFERS, OVER), (result.status, reason_of(result))
    assert result.guilty is not None
    assert (result.guilty.reference, result.guilty.candidate) == (reference, candidate), result.guilty.why
    assert (max(v.scaled for v in result.outputs) < GATE) == under


def names(faults: list[Fault]) -> list[str]:
    return [fault[0].__name__ for fault in faults]


@pytest.mark.parametrize("fault", SD3, ids=names(SD3))
def test_faults_in_the_first_family(sd3: Bed, fault: Fault) -> None:
    found(sd3.compare(fault[0]), fault)


@pytest.mark.slow
@pytest.mark.parametrize("fault", Z_IMAGE, ids=names(Z_IMAGE))
def test_faults_in_the_second_family(z_image: Bed, fault: Fault) -> None:
    found(z_image.compare(fault[0]), fault)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FLUX, ids=names(FLUX))
def test_faults_in_the_third_family(flux: Bed, fault: Fault) -> None:
    found(flux.compare(fault[0]), fault)


@pytest.mark.slow
@pytest.mark.parametrize("fault", PAIR, ids=names(PAIR))
def test_faults_between_two_implementations(fault: Fault) -> None:
    result = compare_case(case, edit=fault[0])
    found(result, fault)
    (only,) = result.faults
    assert only.step or only.reference == fault[1]


def test_the_ports_without_a_fault_pass(sd3: Bed, z_image: Bed, flux: Bed) -> None:
    assert sd3.compare().passed and z_image.compare().passed and flux.compare().passed


def correct(run: int) -> ComponentResult:
    """One correct run: another seed, size and thread count each; every third is FLUX.1 in two implementations."""
    if run % 3 == 2:
        sizes = {"num_layers": 1 + run % 2, "num_single_layers": 1 + run % 4, "num_attention_heads": 2 + run % 5}
        return compare_case(cross("diffusers", "native", {**TINY, **sizes}, (3 + run % 9, 2 + run % 3, 3)), seed=run)
    heads = 1 + run % 4
    config = {**CONFIG, "heads": heads, "width": 8 * heads, "depth": 1 + run % 3, "context": 5 + run % 7}
    return compare_case(replace(case, config=config), seed=run)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.parametrize("run", range(6))
def test_no_false_alarm(run: int, threads: Callable[[int], None]) -> None:
    threads(1 + run % 2)
    result = correct(run)
    assert result.passed, reason_of(result)


@pytest.mark.slow
def test_no_false_alarm_in_a_hundred_runs(sd3: Bed, z_image: Bed, flux: Bed, threads: Callable[[int], None]) -> None:
    bad = []
    for run in range(6, 100):  # with the six above
        threads(1 + run % 2)
        if not (result := correct(run)).passed:
            bad.append((run, reason_of(result)))
    assert not bad, bad
    for count in (1, 2):
        threads(count)
        assert sd3.compare().passed and z_image.compare().passed and flux.compare().passed
