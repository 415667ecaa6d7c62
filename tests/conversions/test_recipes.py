"""Every recipe of the catalogue through the same checks; what each is held to stands in `proofs/<family>.py`."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

import pytest

from tests.conversions import proofs
from tests.conversions.proofs import (
    Proof,
    Real,
    check_against_the_target_class,
    check_config_is_read_off_the_tensors,
    check_oracle,
    check_real,
    check_there_and_back,
)  # fmt: skip

MODULES = [
    importlib.import_module(f"{proofs.__name__}.{found.name}") for found in pkgutil.iter_modules(proofs.__path__)
]
PROOFS: tuple[Proof, ...] = tuple(proof for module in MODULES for proof in module.PROOFS)
every = pytest.mark.parametrize("proof", PROOFS, ids=lambda proof: proof.name)


@every
def test_there_and_back(proof: Proof, tmp_path: Path) -> None:
    check_there_and_back(proof, tmp_path)


@every
def test_the_config_is_read_off_the_tensors(proof: Proof) -> None:
    check_config_is_read_off_the_tensors(proof)


@every
def test_target_headers_are_the_real_class(proof: Proof) -> None:
    check_against_the_target_class(proof)


@pytest.mark.parametrize(
    ("proof", "real"), [pytest.param(p, r, id=f"{p.name} {r.name}") for p in PROOFS for r in p.real]
)
def test_released_sizes_are_complete(proof: Proof, real: Real) -> None:
    check_real(proof, real)


@pytest.mark.parametrize("proof", [p for p in PROOFS if p.oracle], ids=lambda proof: proof.name)
def test_equal_to_diffusers_own_converter(proof: Proof, tmp_path: Path) -> None:
    check_oracle(proof, tmp_path)


def test_a_recipe_without_an_oracle_says_why() -> None:
    assert [proof.name for proof in PROOFS if proof.oracle is None and not proof.no_oracle] == []
