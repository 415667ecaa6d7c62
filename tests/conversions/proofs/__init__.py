"""What a recipe's tests are made of: one `Proof` for each component, and the checks that all of them go through.

A proof names facts that others made: diffusers' own converter, the classes' tables in `layouts.json`, the recorded
trace of the original code. None of them shares code with the recipe.
"""

from __future__ import annotations

import importlib
import json
import math
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file
from torch import Tensor, nn

from porter.core.architectures import fold
from porter.core.checkpoint import read_header
from porter.core.execute import execute
from porter.core.family import resolve
from porter.core.recipe import Recipe, compile_recipe
from porter.core.variants import Shape
from tests.conversions.headers import differing, fingerprint, shapes_of, write

ROOT = Path(__file__).parents[3]
Config = Mapping[str, Any]
Oracle = Callable[[dict[str, Tensor], Config], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Table:
    """A layout in a family's `layouts.json`: what a class has, as that class itself said.

    `model` is the entry's; empty for an entry that names none among others of the class.
    """

    family: str
    class_name: str
    model: str | None = None
    layout: str | None = None  # where two layouts' classes share a name

    def templates(self) -> dict[str, Counter[Shape]]:
        """Template → how often each shape."""
        name = f"conversions/{self.family}/layouts.json"
        found = [
            entry
            for entry in json.loads((ROOT / name).read_text())["layouts"]
            if entry["class"] == self.class_name
            and self.model in (None, entry.get("model", ""))
            and self.layout in (None, entry["layout"])
        ]
        assert len(found) == 1, f"{len(found)} layouts of {self.class_name} ({self.model}) in {name}"
        return {
            key: Counter({tuple(shape): count for count, shape in shapes})
            for key, shapes in found[0]["templates"].items()
        }


@dataclass(frozen=True)
class Real:
    """A released model: its config, and the tables that the original class and the target class have at that size."""

    name: str
    config: Config
    source: Table
    target: Table


@dataclass(frozen=True)
class Proof:
    """One component's recipe and the facts it is held to.

    Attributes:
        name: for the test's id.
        recipe: `"module:attribute"`.
        tiny: a config of the target class at a small size, in which no two widths are equal.
        target: config -> the target class's module; built on the meta device.
        real: released models.
        oracle: diffusers' own converter: (source tensors, config) -> target tensors. None: `no_oracle` says why.
        oracle_config: a config at the width that the oracle has hard-coded; default `tiny`.
    """

    name: str
    recipe: str
    tiny: Config
    target: Callable[[Config], nn.Module]
    real: tuple[Real, ...]
    oracle: Oracle | None = None
    oracle_config: Config | None = None
    no_oracle: str = ""

    def load(self) -> Recipe:
        found: Recipe = resolve(self.recipe)
        return found


def of_class(library: str, class_name: str) -> Callable[[Config], nn.Module]:
    """config -> a module of `library`'s class."""

    def build(config: Config) -> nn.Module:
        cls = getattr(importlib.import_module(library), class_name)
        given = {key: value for key, value in config.items() if not key.startswith("_")}
        module: nn.Module = cls(**given) if library == "diffusers" else cls(cls.config_class(**given))
        return module

    return build


def run(recipe: Recipe, config: Config, source: Path, out: Path) -> Path:
    """Convert a file through the engine."""
    execute(compile_recipe(recipe, config, read_header(source)[0]), out, overwrite=True)
    return out


def check_there_and_back(proof: Proof, folder: Path) -> None:
    """Every element distinct: the way back restores every byte, and nothing stays where it was by chance."""
    recipe = proof.load()
    arrays = fingerprint(shapes_of(recipe.source_headers(proof.tiny)))
    source = write(folder / "source.safetensors", arrays)
    plan = compile_recipe(recipe, proof.tiny, read_header(source)[0])
    execute(plan, folder / "port.safetensors")
    there = load_file(folder / "port.safetensors")
    assert shapes_of(recipe.target_headers(proof.tiny)) == {name: array.shape for name, array in there.items()}
    if plan.exactness == "exact":
        back = plan.rebind(read_header(folder / "port.safetensors")[0]).inverse()
    else:  # what was dropped comes from the original
        back = plan.rebind(read_header(folder / "port.safetensors")[0]).inverse(read_header(source)[0])
    execute(back, folder / "back.safetensors")
    assert differing(load_file(folder / "back.safetensors"), arrays) == []


def check_config_is_read_off_the_tensors(proof: Proof) -> None:
    """The config comes back whole from the header and what no tensor shows."""
    recipe = proof.load()
    header = recipe.source_headers(proof.tiny)
    full = recipe.infer_config(header, proof.tiny)
    assert {key: value for key, value in full.items() if not key.startswith("_")} == {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in proof.tiny.items()
        if not key.startswith("_")
    }


def check_against_the_target_class(proof: Proof) -> None:
    """At tiny size the target's headers are what the real class has."""
    with torch.device("meta"):
        module = proof.target(proof.tiny)
    real = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    assert shapes_of(proof.load().target_headers(proof.tiny)) == real


def check_real(proof: Proof, real: Real) -> None:
    """At the released size both sides are complete, as their own classes say, and nothing is left over."""
    recipe = proof.load()
    source = recipe.source_headers(real.config, "BF16")
    for header, table in ((source, real.source), (recipe.target_headers(real.config, "BF16"), real.target)):
        found, wanted = fold(shapes_of(header)), table.templates()
        assert found.keys() == wanted.keys(), sorted(found.keys() ^ wanted.keys())[:6]
        assert {key: (found[key], wanted[key]) for key in found if found[key] != wanted[key]} == {}
    config = recipe.infer_config(source, real.config)
    plan = compile_recipe(recipe, config, source)
    assert len(plan.targets) == sum(counts.total() for counts in real.target.templates().values())


def check_oracle(proof: Proof, folder: Path) -> None:
    """Equal to diffusers' own converter, bit for bit."""
    assert proof.oracle is not None
    recipe, config = proof.load(), proof.oracle_config or proof.tiny
    shapes = shapes_of(recipe.source_headers(config))
    countable = sum(map(math.prod, shapes.values())) < 2**24
    arrays = fingerprint(shapes) if countable else _large(shapes)
    source = write(folder / "source.safetensors", arrays)
    ours = load_file(run(recipe, config, source, folder / "port.safetensors"))
    theirs = proof.oracle({name: torch.from_numpy(array.copy()) for name, array in arrays.items()}, config)
    assert differing(ours, {name: tensor.contiguous().numpy() for name, tensor in theirs.items()}) == []


def _large(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Where float32 cannot count every element: random numbers, seeded by the name."""
    return {
        name: np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, dtype=np.float32)
        for name, shape in shapes.items()
    }
