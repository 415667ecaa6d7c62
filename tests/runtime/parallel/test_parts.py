"""What is asked for, which part each rank holds, and the blocks of a ring: in one process."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conversions.flux1.recipe import ON_LOAD
from porter.core.checkpoint import ANY, spec
from porter.core.errors import RecipeError, UsageError
from porter.core.onload import compile_on_load, on_load
from porter.core.ops import Concat, PermuteBlocks, Split
from porter.core.recipe import OUTPUTS, Rule, Shard
from porter.core.tensorplan import TensorPlan
from runtime.attention import attention_backend
from runtime.parallel.mesh import Parallel, current, start
from runtime.parallel.ring import _merged, with_lse
from runtime.parallel.tensor import part_of
from tests.runtime.test_attention import by_formula

# --- what is asked for ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [{"tp": 0}, {"ulysses": -1}, {"ring": 1.5}, {"cfg": 3}, {"tp": True}], ids=str)
def test_a_size_that_is_none_is_refused_by_name(sizes: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(sizes))):
        Parallel(**sizes)


def test_without_torchrun_the_message_is_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/bin/porter", "generate", "my port", "a cat", "--tp", "2", "--ulysses", "2"])
    with (
        pytest.raises(UsageError, match="ulysses 2 x tp 2 needs 4 processes") as caught,
        start(Parallel(tp=2, ulysses=2)),
    ):
        pass
    assert caught.value.hint == (
        "torchrun --nproc-per-node 4 -m porter.cli generate 'my port' 'a cat' --tp 2 --ulysses 2"
    )


def test_one_process_is_no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    with start(Parallel()) as run:
        assert run is None
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "x",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    with start(Parallel()) as run:
        assert run is current() is None
    with pytest.raises(UsageError, match="torchrun started 1 processes, and the sizes make 2"), start(Parallel(ring=2)):
        pass
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(UsageError, match="RANK='first'"), start(Parallel(ring=2)):
        pass


@pytest.mark.parametrize(
    ("config", "sizes", "named"),
    [
        ({"num_attention_heads": 6}, {"tp": 4}, r"6 attention heads \(num_attention_heads\).*4 ranks"),
        ({"num_attention_heads": 6}, {"tp": 2, "ulysses": 2}, "tp x ulysses of 1, 2, 3, 6"),
        ({"n_heads": 8, "n_kv_heads": 2}, {"tp": 4}, r"2 attention heads \(n_kv_heads\)"),
        ({"width": 64}, {"ulysses": 2}, "does not say how many attention heads"),
    ],
    ids=str,
)
def test_heads_that_ranks_cannot_share_are_refused(config: dict[str, int], sizes: dict[str, int], named: str) -> None:
    with pytest.raises(UsageError, match=f"(?s){named}"):
        Parallel(**sizes).check_heads(config)


def test_heads_that_ranks_can_share_pass() -> None:
    Parallel(tp=2, ulysses=3, ring=5).check_heads({"num_attention_heads": 12})
    Parallel(ring=4, cfg=2).check_heads({})


def test_cfg_parallel_needs_guidance() -> None:
    Parallel(cfg=2).check_guidance(True)
    Parallel(tp=2).check_guidance(False)
    with pytest.raises(UsageError, match="classifier-free guidance"):
        Parallel(cfg=2).check_guidance(False)


# --- which part of each tensor a rank holds ---------------------------------------------------------------------------


class Files:
    """Tensors under their names on disk; remembers how many elements were read."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors, self.elements = tensors, 0

    def read(self, name: str, *index: slice) -> Tensor:
        found = self.tensors[name][index]
        self.elements += found.numel()
        return found


def numbered(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    """Tensors of which every element has its own value."""
    found, start = {}, 0
    for name, shape in shapes.items():
        count = int(torch.tensor(shape).prod())
        found[name.replace("__", ".")] = torch.arange(start, start + count, dtype=torch.float64).reshape(shape)
        start += count
    return found


def plan_of(tensors: dict[str, Tensor], *rules: Rule) -> TensorPlan:
    header = {name: spec(ANY, tuple(tensor.shape), name) for name, tensor in tensors.items()}
    return compile_on_load(on_load("parts", *rules, parameters=lambda config: {"h": 4}), {}, header)


def held(tensors: dict[str, Tensor], plan: TensorPlan, rank: int, ranks: int) -> tuple[dict[str, Tensor], int]:
    """The targets as `rank` holds them, and the elements read for them."""
    files, share = Files(tensors), part_of(rank, ranks)
    found = {
        output.name: value
        for step in plan.steps
        for output, value in zip(step.outputs, share(plan, step, files.read), strict=True)
    }
    return found, files.elements


def test_a_packed_projection_is_packed_per_rank_from_its_rows_alone() -> None:
    tensors = numbered(q__weight=(4, 3), k__weight=(4, 3), v__weight=(8, 3), q__bias=(4,), k__bias=(4,), v__bias=(8,))
    plan = plan_of(tensors, Rule(("q.{p:weight|bias}", "k.{p}", "v.{p}"), "qkv.{p}", Concat(), shard=OUTPUTS))
    found, read = held(tensors, plan, 1, 2)
    for leaf in ("weight", "bias"):
        q, k, v = (tensors[f"{name}.{leaf}"] for name in "qkv")
        assert torch.equal(found[f"qkv.{leaf}"], torch.cat([q[2:], k[2:], v[4:]]))
    assert read == sum(tensor.numel() for tensor in tensors.values()) / 2


def test_inputs_are_shared_part_by_part_and_the_bias_whole() -> None:
    tensors = numbered(out__weight=(3, 20), out__bias=(3,), rest=(5,))
    plan = plan_of(tensors, Rule("out.{p:weight|bias}", "out.{p}", shard=Shard(1, ("h", "4*h"))))
    found, read = held(tensors, plan, 1, 2)
    weight = tensors["out.weight"]
    assert torch.equal(found["out.weight"], torch.cat([weight[:, 2:4], weight[:, 12:]], dim=1))
    assert torch.equal(found["out.bias"], tensors["out.bias"])
    assert torch.equal(found["rest"], tensors["rest"])
    assert read == 30 + 3 + 5


def test_parts_named_by_the_rule_cut_a_tensor_that_was_packed_on_disk() -> None:
    tensors = numbered(qkv__weight=(12, 2))
    plan = plan_of(tensors, Rule("qkv.{p:weight}", "qkv.{p}", shard=Shard(0, ("h", "h", "h"))))
    q, k, v = tensors["qkv.weight"].split(4)
    assert torch.equal(held(tensors, plan, 0, 4)[0]["qkv.weight"], torch.cat([q[:1], k[:1], v[:1]]))


def test_other_ops_run_before_the_cut() -> None:
    tensors = numbered(gate=(4, 2), up=(4, 2), both=(8, 2))
    plan = plan_of(
        tensors,
        Rule(("gate", "up"), "packed", (Concat(), PermuteBlocks((1, 0))), shard=Shard(0, ("h", "h"))),
        Rule("both", ("first", "second"), Split(("h", "h")), shard=OUTPUTS),
    )
    found, _ = held(tensors, plan, 1, 2)
    assert torch.equal(found["packed"], torch.cat([tensors["up"][2:], tensors["gate"][2:]]))
    assert torch.equal(found["first"], tensors["both"][2:4])
    assert torch.equal(found["second"], tensors["both"][6:])


def test_what_cannot_be_shared_evenly_is_refused_by_name() -> None:
    tensors = numbered(q__weight=(6, 2), k__weight=(4, 2))
    packed = Rule(("q.{p:weight}", "k.{p}"), "qk.{p}", Concat(), shard=OUTPUTS)
    with pytest.raises(UsageError, match=r"(?s)4 ranks cannot share qk\.weight.*6 of shape \[10, 2\]"):
        held(tensors, plan_of(tensors, packed), 0, 4)
    wrong = replace(packed, shard=Shard(0, ("h", "h")))
    with pytest.raises(RecipeError, match=r"(?s)parts of qk\.weight do not fill it.*4 \+ 4 = 8"):
        held(tensors, plan_of(tensors, wrong), 0, 2)


def test_the_parts_of_all_ranks_are_the_model(bare_port: Path) -> None:
    """Every element of FLUX.1's weights is on one rank, or on all where no rule shares it."""
    config = json.loads((bare_port / "transformer" / "config.json").read_text())
    from safetensors.torch import load_file

    tensors = load_file(bare_port / "transformer" / "diffusion_pytorch_model.safetensors")
    header = {name: spec(ANY, tuple(tensor.shape), name) for name, tensor in tensors.items()}
    plan = compile_on_load(ON_LOAD, config, header)
    parts = [held(tensors, plan, rank, 3)[0] for rank in range(3)]
    whole = held(tensors, plan, 0, 1)[0]
    for step, output in plan.outputs():
        elements = [part[output.name].flatten() for part in parts]
        if elements[0].numel() == whole[output.name].numel():
            assert all(torch.equal(each, whole[output.name].flatten()) for each in elements)
            assert plan.rules[step.rule].shard in (None, Shard(1), Shard(1, ("h", "4*h")))
        else:
            assert torch.equal(torch.cat(elements).sort().values, whole[output.name].flatten().sort().values)


# --- the blocks of a ring ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["sdpa", "math"])
def test_blocks_merge_to_the_whole(backend: str) -> None:
    """The second picture has no key in the second block, the first none in the third."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 9, 3, 8, dtype=torch.float64) for _ in range(3))
    mask = torch.tensor([[1, 1, 1, 0, 1, 1, 0, 0, 0], [0, 1, 1, 0, 0, 0, 1, 1, 1]]).bool()
    with attention_backend(backend, ("sdpa", "math")):
        blocks = [with_lse(q, k[:, i : i + 3], v[:, i : i + 3], mask[:, i : i + 3]) for i in (0, 3, 6)]
        whole, lse = with_lse(q, k, v, mask)
    out = blocks[0]
    for block in blocks[1:]:
        out = _merged(*out, *block)
    expected = by_formula(q, k, v, mask[:, None, None, :])
    assert (out[0].flatten(2) - expected).abs().max() < 1e-14
    assert (whole.flatten(2) - expected).abs().max() < 1e-14
    assert (out[1] - lse).abs().max() < 1e-14


def test_a_picture_without_any_key_gets_zeros_not_nan() -> None:
    q = torch.randn(1, 4, 2, 8)
    nothing = with_lse(q, q, q, torch.zeros(1, 4, dtype=torch.bool))
    something = with_lse(q, q, q, None)
    for pair in (_merged(*nothing, *something), _merged(*something, *nothing)):
        assert torch.equal(pair[0], something[0])
    assert torch.equal(_merged(*nothing, *nothing)[0], torch.zeros(1, 4, 2, 8))


def test_a_backend_without_the_log_sum_exp_is_refused() -> None:
    q = torch.randn(1, 4, 2, 8)
    with pytest.raises(UsageError, match="log-sum-exp"), attention_backend("cudnn", ("cudnn",)):
        with_lse(q, q, q, None)
