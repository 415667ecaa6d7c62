"""Does the instrument itself tell right from wrong? Faults planted in three families, and correct runs without alarm.

    make selftest

Weights and code are spoiled in the candidate, after it was filled; the reference is the original code's committed
trace, or another implementation. Each fault must fail, at its module; a correct port must pass at any seed, size and
thread count.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from parity.case import ComponentCase
from parity.compare import DIFFERS, OVER
from parity.component import ComponentResult, compare_component
from parity.outcome import reason_of
from parity.own import compare_case
from parity.run import alignment_of
from parity.trace import Trace
from porter.core.family import families, resolve
from tests.conversions.test_references import port_of
from tests.parity.pair import CONFIG, case

Edit = Callable[[Any], object]


def at(path: str, change: Callable[[Any], object]) -> Edit:
    """Change one submodule or parameter."""

    def edit(module: Any) -> None:
        parent, _, last = path.rpartition(".")
        change(getattr(module.get_submodule(parent), last))

    edit.__name__ = path
    return edit


def setting(path: str, name: str, value: Any) -> Edit:
    """Give one submodule another setting."""
    return at(path, lambda m: setattr(m, name, value))


def halves(t: Any) -> None:
    t.data = torch.cat(t.data.chunk(2)[::-1])


def zero(t: Any) -> None:
    t.data.zero_()


def ones(t: Any) -> None:
    t.data.fill_(1.0)


def flip(t: Any) -> None:
    t.data = t.data.t().contiguous()


def rounded(t: Any) -> None:
    t.data = t.data.bfloat16().float()


def one_more(t: Any) -> None:
    t.data += 1


def shifted(t: Any) -> None:
    t.data = t.data.roll(1, 0)


def erf(m: Any) -> None:
    m.approximate = "none"


def swapped(block: str, a: str, b: str) -> Edit:
    def edit(module: Any) -> None:
        parent = module.get_submodule(block)
        one, two = getattr(parent, a), getattr(parent, b)
        setattr(parent, a, two)
        setattr(parent, b, one)

    edit.__name__ = f"{block}.{a}-{b}"
    return edit


# Family, trace, then each fault with the reference module (or the one around it) that must be named.
SD3: list[tuple[Edit, str]] = [
    (at("transformer_blocks.0.attn.to_q.bias", zero), "joint_blocks.0.x_block.attn.qkv"),
    (at("transformer_blocks.1.attn.add_k_proj.weight", rounded), "joint_blocks.1.context_block.attn.qkv"),
    (swapped("transformer_blocks.0.attn", "to_k", "to_v"), "joint_blocks.0.x_block.attn.qkv"),
    (at("transformer_blocks.0.norm1.linear.weight", shifted), "joint_blocks.0.x_block.adaLN_modulation.1"),
    (at("transformer_blocks.0.attn.norm_q.weight", ones), "joint_blocks.0.x_block.attn.ln_q"),
    (setting("transformer_blocks.1.attn.norm_k", "eps", 1e-5), "joint_blocks.1.x_block.attn.ln_k"),
    (at("transformer_blocks.1.ff.net.0", erf), "joint_blocks.1.x_block"),
    (at("transformer_blocks.0.attn.to_add_out.weight", flip), "joint_blocks.0.context_block.attn.proj"),
    (at("norm_out.linear.weight", halves), "final_layer.adaLN_modulation.1"),
    (setting("norm_out.norm", "eps", 1e-5), "final_layer"),
]
Z_IMAGE: list[tuple[Edit, str]] = [
    (at("layers.1.attention.to_out.0.weight", flip), "layers.1.attention.to_out.0"),
    (at("layers.0.feed_forward.w2.weight", rounded), "layers.0.feed_forward.w2"),
    (swapped("layers.0.feed_forward", "w1", "w3"), "layers.0.feed_forward.w"),
    (setting("layers.1.attention.norm_q", "eps", 1e-6), "layers.1.attention.norm_q"),
    (at("layers.0.attention_norm1.weight", one_more), "layers.0.attention_norm1"),
    (at("noise_refiner.0.adaLN_modulation.0.bias", shifted), "noise_refiner.0.adaLN_modulation.0"),
    (at("cap_embedder.1.bias", zero), "cap_embedder.1"),
    (at("context_refiner.1.ffn_norm2.weight", ones), "context_refiner.1.ffn_norm2"),
    (setting("rope_embedder", "theta", 10000.0), ""),
    (at("t_embedder.mlp.0.weight", halves), "t_embedder.mlp.0"),
]
PAIR: list[tuple[Edit, str]] = [
    (setting("layers.1.act", "approximate", "none"), "blocks.1"),
    (setting("layers.2.norm_b", "eps", 1e-5), "blocks.2.norm2"),
    (setting("layers.0.attention.norm_q", "eps", 1e-5), "blocks.0.attn.q_norm"),
    (setting("layers.1.attention", "scale", 0.3), "blocks.1"),
    (at("layers.2.scale_shift.weight", halves), "blocks.2.modulation"),
    (at("layers.1.attention.to_v.weight", rounded), "blocks.1.attn.qkv"),
    (at("layers.0.down.bias", zero), "blocks.0.mlp.2"),
    (setting("final_norm", "num_groups", 2), "norm"),
    (at("layers.0.attention.to_out.weight", flip), "blocks.0.attn.proj"),
    (at("patch.weight", rounded), "embed"),
]


class Bed:
    """A family's port with its committed trace."""

    def __init__(self, family: str, name: str, folder: Path) -> None:
        cases = resolve(str(families()[family].cases)).components
        self.case: ComponentCase = next(c for c in cases if c.trace.stem == name)
        self.port = port_of(family, self.case, folder)
        self.trace, self.alignment = Trace.open(self.case.trace), alignment_of(self.case, self.port)

    def compare(self, edit: Edit | None = None) -> ComponentResult:
        (candidate,) = self.case.candidates
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


def found(result: ComponentResult, where: str) -> None:
    """It fails, and names the module or one around it."""
    assert result.status in (DIFFERS, OVER), (result.status, reason_of(result))
    assert result.guilty is not None
    named = result.guilty.reference
    assert named.startswith(where) or (named and where.startswith(named)), (str(result.guilty), result.guilty.why)


@pytest.mark.parametrize(("edit", "where"), SD3, ids=[e.__name__ for e, _ in SD3])
def test_faults_in_the_first_family(sd3: Bed, edit: Edit, where: str) -> None:
    found(sd3.compare(edit), where)


@pytest.mark.parametrize(("edit", "where"), Z_IMAGE, ids=[e.__name__ for e, _ in Z_IMAGE])
def test_faults_in_the_second_family(z_image: Bed, edit: Edit, where: str) -> None:
    found(z_image.compare(edit), where)


@pytest.mark.parametrize(("edit", "where"), PAIR, ids=[e.__name__ for e, _ in PAIR])
def test_faults_in_the_third_family(edit: Edit, where: str) -> None:
    result = compare_case(case, edit=edit)
    found(result, where)
    assert len(result.faults) == 1 and result.faults[0].reference.startswith(where)


def test_the_ports_without_a_fault_pass(sd3: Bed, z_image: Bed) -> None:
    assert sd3.compare().passed and z_image.compare().passed


def correct(run: int) -> ComponentResult:
    """One correct run: another seed, size and thread count each."""
    heads = 1 + run % 4
    config = {**CONFIG, "heads": heads, "width": 8 * heads, "depth": 1 + run % 3, "context": 5 + run % 7}
    before = torch.get_num_threads()
    torch.set_num_threads(1 + run % 2)
    try:
        return compare_case(replace(case, config=config), seed=run)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("run", range(6))
def test_no_false_alarm(run: int) -> None:
    result = correct(run)
    assert result.passed, reason_of(result)


@pytest.mark.slow
def test_no_false_alarm_in_a_hundred_runs(sd3: Bed, z_image: Bed) -> None:
    bad = [(run, reason_of(result)) for run in range(100) if not (result := correct(run)).passed]
    assert not bad, bad
    for threads in (1, 2):
        torch.set_num_threads(threads)
        assert sd3.compare().passed and z_image.compare().passed
