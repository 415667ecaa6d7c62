"""Random numbers are seen wherever they come from, and given again; the world's own generators stay as they were."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from parity.compare import DIFFERS, IDENTICAL, ROUNDING, SKIPPED
from parity.draws import GIVEN, GLOBAL, NUMPY, PYTHON, Drawn, OtherDraws, compare_draws, on_grid, watch_draws
from parity.recorder import float64


def log_of(run: Callable[[], Any], seed: int = 0) -> list[Drawn]:
    with watch_draws(seed) as log:
        run()
    return log


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


SOURCES: dict[str, tuple[Callable[[], Any], str, str]] = {
    "given": (lambda: torch.randn(2, 3, generator=seeded()), "torch.randn", GIVEN),
    "global": (lambda: torch.rand(2, 3), "torch.rand", GLOBAL),
    "default by name": (lambda: torch.randn(2, 3, generator=torch.default_generator), "torch.randn", GLOBAL),
    "like": (lambda: torch.randn_like(torch.zeros(2, 3)), "torch.randn_like", GLOBAL),
    "normal": (lambda: torch.normal(0.0, 1.0, (2, 3), generator=seeded()), "torch.normal", GIVEN),
    "in place": (lambda: torch.empty(2, 3).normal_(generator=seeded()), "Tensor.normal_", GIVEN),
    "uniform": (lambda: torch.empty(2, 3).uniform_(), "Tensor.uniform_", GLOBAL),
    "initialisation": (lambda: nn.init.normal_(torch.empty(2, 3)), "nn.init.normal_", GLOBAL),
    "integers": (lambda: torch.randint(9, (2, 3)), "torch.randint", GLOBAL),
    "numpy": (lambda: np.random.randn(2, 3), "numpy.random.randn", NUMPY),
}


@pytest.mark.parametrize("name", SOURCES)
def test_every_draw_is_seen(name: str) -> None:
    run, function, source = SOURCES[name]
    (drawn,) = log_of(run)
    assert (drawn.function, drawn.source) == (function, source) and drawn.values.shape == (2, 3)
    assert drawn.where.startswith("parity.test_draws:") and drawn.seed == (3 if source == GIVEN else None)
    assert drawn.to_json()["shape"] == [2, 3]


@pytest.mark.parametrize(("run", "source"), [(random.random, PYTHON), (np.random.standard_cauchy, NUMPY)])
def test_what_no_function_shows_shows_in_the_state(run: Callable[[], Any], source: str) -> None:
    (drawn,) = log_of(run)
    assert (drawn.function, drawn.source, drawn.values.numel()) == ("unseen", source, 0)


def test_the_worlds_generators_stay_as_they_were() -> None:
    def states() -> list[Any]:
        numpy = np.random.get_state(legacy=False)["state"]["key"].tolist()
        return [torch.get_rng_state().tolist(), numpy, random.getstate()]

    before = states()
    with pytest.raises(ZeroDivisionError), watch_draws(7):
        torch.randn(4), np.random.rand(4), random.random()
        raise ZeroDivisionError
    assert states() == before and np.random.randn.__name__ == "randn"


def test_global_numbers_are_the_same_for_both_sides_and_not_those_of_the_seed() -> None:
    a, b = (log_of(lambda: torch.randn(64), seed=5) for _ in range(2))
    assert torch.equal(a[0].values, b[0].values)
    assert not torch.equal(a[0].values, torch.randn(64, generator=seeded(5)))


def test_numbers_are_given_again_to_a_run_in_float64() -> None:
    def run() -> list[Tensor]:
        made = [torch.randn(17, generator=seeded()), torch.empty(5).normal_(), torch.randn(4, dtype=torch.bfloat16)]
        return [*made, torch.normal(torch.zeros(3), torch.ones(3))]

    with watch_draws(0) as log:
        run()
    with float64(), watch_draws(1, replay=log) as again:
        made = run()
    assert [t.dtype for t in made] == [torch.float64, torch.float64, torch.bfloat16, torch.float64]
    assert all(torch.equal(t.double(), d.values.double()) for t, d in zip(made, log, strict=True))
    assert len(again) == 4
    for other in (lambda: torch.randn(18), lambda: [*run(), torch.randn(1)]):
        with pytest.raises(OtherDraws, match="other random numbers when it runs again"), watch_draws(0, replay=log):
            other()


def verdicts(
    a: Callable[[], Any], b: Callable[[], Any], dtype: torch.dtype = torch.float32
) -> dict[str, tuple[str, str]]:
    return {k: (v.status, v.note) for k, v in compare_draws(log_of(a), log_of(b), dtype).items()}


def test_both_sides_draws_are_compared() -> None:
    def given(seed: int = 3, dtype: Any = None, shape: tuple[int, ...] = (2, 40)) -> Callable[[], Any]:
        return lambda: torch.randn(shape, generator=seeded(seed), dtype=dtype)

    assert verdicts(given(), given()) == {"draw 0": (IDENTICAL, "")}
    status, note = verdicts(given(), lambda: torch.randn(2, 40))["draw 0"]
    assert status == DIFFERS and note.startswith("from a given generator (seed 3) there (parity.test_draws:")
    assert "from torch's global generator here (parity.test_draws:" in note
    assert verdicts(given(), given(4))["draw 0"][1].startswith("seed 3 there, 4 here")
    status, note = verdicts(given(), given(dtype=torch.bfloat16))["draw 0"]
    assert status == DIFFERS and "drawn in float32 there, bfloat16 here" in note and "bfloat16's grid" in note
    assert verdicts(given(), given(dtype=torch.bfloat16), torch.bfloat16)["draw 0"][0] == ROUNDING
    assert verdicts(given(), given(4), torch.bfloat16)["draw 0"][0] == DIFFERS
    assert verdicts(given(), given(shape=(40, 2)))["draw 0"][0] == IDENTICAL  # the same numbers, cut otherwise
    assert verdicts(given(), given(shape=(2, 41)))["draw 0"][1] == "shape (2, 40) there, (2, 41) here"
    status, note = verdicts(given(), lambda: None)["draw 0"]
    assert status == SKIPPED and note.startswith("on the candidate's side: never drawn (torch.randn at")
    status, note = verdicts(lambda: None, given())["draw 0"]
    assert status == SKIPPED and "here torch.randn from a given generator (seed 3)" in note


def test_a_generator_for_each_image_is_no_difference() -> None:
    def each() -> None:
        generator = seeded()
        for _ in range(2):
            torch.randn(1, 64, generator=generator)

    found = verdicts(lambda: torch.randn(2, 64, generator=seeded()), each)
    assert found == {"draw 0": (IDENTICAL, "the same numbers in other pieces: 1 draws there, 2 here")}


def test_seeding_the_global_generator_inside_is_noted() -> None:
    def own() -> None:
        torch.manual_seed(3)
        torch.randn(8)

    status, note = verdicts(lambda: torch.randn(8, generator=seeded()), own)["draw 0"]
    assert status == IDENTICAL and "from torch's global generator here" in note


def test_grids() -> None:
    x = torch.randn(100)
    found = [on_grid(t) for t in (x, x.bfloat16().float(), x.half().double(), x[:4].bfloat16(), torch.arange(9))]
    assert found == ["", "bfloat16", "float16", "", ""]
